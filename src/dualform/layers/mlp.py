"""The feed-forward layers of language models. They map every step by itself, and so have no state."""

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.shapes import wide
from dualform.layers.activation import activation
from dualform.layers.part import Part
from dualform.layers.projection import plain, project
from dualform.layers.quantized import group_of
from dualform.layers.stream_step import StreamStep, runs_as_stream_step, size_of, weights_of, wide_of
from dualform.ops.mlp_step import ACTIVATIONS, MLPStep, mlp_step_op


@options
class MLPConfig:
    """The options of an :class:`MLP`.

    Args:
        d_hidden: the inner width. None is ``4 d_model``, or with a gate ``8/3 d_model`` rounded up to a multiple of 8:
            the matrices then have together as many entries, with a gate or without.
        bias: whether a bias is added after each matrix.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``relu2``.
        gated: whether the activation is that of a gate.
        gate_scale: a factor of what the activation reads.
    """

    d_hidden: int | None = None
    bias: bool = False
    activation: str = "silu"
    gated: bool = True
    gate_scale: float = 1.0

    def build(self, d_model: int) -> "MLP":
        """The layer for inputs of ``d_model`` features, with random weights."""
        return MLP(self, d_model)


class MLP(Part):
    """``y = W_down (f(W_gate x) * W_up x)``, or without a gate ``W_down f(W_up x)``; ``(..., D) -> (..., D)``.

    With a gate, ``W_gate`` and ``W_up`` are the two halves of one matrix, ``gate_up_proj``. The default, a gate and
    SiLU, is called SwiGLU.

    Raises:
        ConfigError: for an inner width below 1, or an activation that does not exist.

    References:
        Shazeer (2020), arXiv:2002.05202, equations 1 to 6.
    """

    residual: ClassVar[tuple[str, ...]] = ("down_proj.weight",)

    def __init__(self, config: MLPConfig, d_model: int):
        super().__init__()
        d_hidden = hidden_width("mlp", config.d_hidden, d_model, gated=config.gated)
        self.gated, self.function, self.activation = (
            config.gated,
            config.activation,
            activation("mlp", config.activation),
        )
        self.gate_scale = config.gate_scale
        if config.gated:
            self.gate_up_proj = nn.Linear(d_model, 2 * d_hidden, bias=config.bias)
        else:
            self.up_proj = nn.Linear(d_model, d_hidden, bias=config.bias)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=config.bias)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The outputs for ``x``; every step is mapped by itself."""
        if not self.gated:
            return project(self.down_proj, self.activation(self._scaled(project(self.up_proj, x))))
        gate, up = project(self.gate_up_proj, x).chunk(2, -1)
        return project(self.down_proj, self.activation(self._scaled(gate)) * up)

    def prepare_residual(self, norm: Any) -> StreamStep | None:
        """By :func:`dualform.ops.mlp_step.mlp_step`, on a CPU."""
        up: Any = self.gate_up_proj if self.gated else self.up_proj
        if not plain(self, kind=MLP) or not runs_as_stream_step(norm, self, up, self.down_proj, devices=("cpu",)):
            return None
        weights = wide_of(norm.weight), *weights_of(up, self.down_proj)
        options = self.gated, list(ACTIVATIONS).index(self.function), float(self.gate_scale), norm.eps, group_of(up)
        record = lambda x: MLPStep(x, *weights, *options)  # noqa: E731
        return StreamStep(mlp_step_op, record, tuple, wide(norm.weight), size_of(self))

    def _scaled(self, gate: Tensor) -> Tensor:
        return gate if self.gate_scale == 1 else self.gate_scale * gate

    def adapted(self) -> tuple[str, tuple[int, ...]]:
        """The map that low-rank matrices of a shared block are added to, and the rows of each of its pieces."""
        name = "gate_up_proj" if self.gated else "up_proj"
        return name, (getattr(self, name).out_features,)


def hidden_width(where: str, d_hidden: int | None, d_model: int, *, gated: bool) -> int:
    """The inner width of a feed-forward, by default that of :class:`MLPConfig`.

    Raises:
        ConfigError: for a width below 1.
    """
    if d_hidden is None:
        return -(-d_model // 3) * 8 if gated else 4 * d_model
    if d_hidden < 1:
        raise ConfigError(f"{where}: d_hidden is {d_hidden}, expected at least 1")
    return d_hidden
