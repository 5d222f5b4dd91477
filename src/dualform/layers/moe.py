"""A mixture of experts: a feed-forward of which every element of a sequence uses a part that is chosen for it."""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.layers.activation import activation
from dualform.layers.context import Context
from dualform.layers.mlp import MLP, MLPConfig, hidden_width
from dualform.layers.part import Part
from dualform.layers.router import Router, RouterConfig, Routing
from dualform.ops.grouped_linear import grouped_linear


@options
class MoEConfig(RouterConfig):
    """The options of a :class:`MoE`: those of its router, :class:`~dualform.layers.router.RouterConfig`, and these.

    Args:
        d_hidden: the inner width of an expert; None as in :class:`~dualform.layers.mlp.MLPConfig`.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``relu2``.
        gated: whether the activation is that of a gate.
        d_shared: the inner width of an expert that all elements use beside those chosen for them; 0 for none. Several
            such experts are one, of the sum of their widths.
        shared_gate: whether what that expert returns is multiplied by ``sigmoid(w . x)``.
        balance: weight of the router's ``balance_loss`` in the loss of a training. With 0 a correction stays as it is.
        z: weight of its ``z_loss``.
    """

    d_hidden: int | None = None
    activation: str = "silu"
    gated: bool = True
    d_shared: int = 0
    shared_gate: bool = False
    balance: float = 0.01
    z: float = 0.001

    def build(self, d_model: int) -> "MoE":
        """The layer for inputs of ``d_model`` features, with random weights."""
        return MoE(self, d_model)


class MoE(Part):
    """``y = sum_k w_k E_k(x)``, over the experts that a router chooses for x; ``(..., D) -> (..., D)``.

    An expert is an :class:`~dualform.layers.mlp.MLP` without biases. No element is dropped: they are sorted by expert,
    and each expert's matrices are multiplied with as many as there are. So an output does not depend on what else is
    in the batch. Experts are axis 0 of ``gate_up_proj``, or ``up_proj`` without a gate, and of ``down_proj``.

    While a model trains, ``forward`` adds ``balance`` times the router's balance loss and ``z`` times its z loss to the
    ``context`` that it is given, once per call.

    Raises:
        ConfigError: for an option that is out of range.

    References:
        Shazeer et al. (2017), arXiv:1701.06538, equation 1; Fedus et al. (2021), arXiv:2101.03961; Dai et al. (2024),
        arXiv:2401.06066, section 3.2 (shared experts).
    """

    residual: ClassVar[tuple[str, ...]] = ("down_proj", "shared.down_proj.weight")
    in_context = True

    def __init__(self, config: MoEConfig, d_model: int):
        super().__init__()
        _check(config)
        self.config, self.activation = config, activation("moe", config.activation)
        d_hidden = hidden_width("moe", config.d_hidden, d_model, gated=config.gated)
        self.router = Router(config, d_model)
        if self.router.correction is not None and not config.balance:
            self.router.correction.requires_grad_(False)  # which only that loss moves
        if config.gated:
            self.gate_up_proj = _matrices(config.experts, 2 * d_hidden, d_model)
        else:
            self.up_proj = _matrices(config.experts, d_hidden, d_model)
        self.down_proj = _matrices(config.experts, d_model, d_hidden)
        width = (3 if config.gated else 2) * d_hidden * d_model
        self.idle = (config.experts - config.top_k) * width
        shared = MLPConfig(config.d_shared, activation=config.activation, gated=config.gated)
        self.shared = MLP(shared, d_model) if config.d_shared else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if config.shared_gate else None

    def forward(self, x: Float[Tensor, "... D"], *, context: Context | None = None) -> Float[Tensor, "... D"]:
        """The outputs for ``x``; every step is mapped by itself.

        Args:
            x: the inputs.
            context: of the model's call; where it collects losses, those of the router are added to it.
        """
        rows = x.reshape(-1, x.shape[-1])
        routing = self.router(rows)
        y = self._routed(rows, routing)
        if self.shared is not None:
            beside = self.shared(rows)
            y = y + (beside if self.shared_gate is None else self.shared_gate(rows).sigmoid() * beside)
        if context is not None and context.collects:
            counted = None if context.counted is None else context.counted.flatten()
            for weight, loss in ((self.config.balance, self.router.balance_loss), (self.config.z, self.router.z_loss)):
                if weight:
                    context.add_loss(weight * loss(routing, counted))
        return y.view_as(x)

    def _routed(self, x: Float[Tensor, "N D"], routing: Routing) -> Float[Tensor, "N D"]:
        """What the chosen experts return, weighted and added up."""
        chosen = routing.experts.flatten()  # (N * K)
        order = chosen.argsort(stable=True)
        ends = torch.searchsorted(chosen[order], torch.arange(self.config.experts, device=x.device), right=True)
        y = self._experts(x[order // self.config.top_k], ends)[order.argsort()].unflatten(0, routing.experts.shape)
        return (y.to(routing.weights.dtype) * routing.weights[..., None]).sum(1).to(x.dtype)

    def _experts(self, x: Float[Tensor, "M D"], ends: Tensor) -> Float[Tensor, "M D"]:
        """Rows that are sorted by expert, through theirs."""
        if not self.config.gated:
            return grouped_linear(self.activation(grouped_linear(x, self.up_proj, ends)), self.down_proj, ends)
        gate, up = grouped_linear(x, self.gate_up_proj, ends).chunk(2, -1)
        return grouped_linear(self.activation(gate) * up, self.down_proj, ends)


def _matrices(experts: int, rows: int, columns: int) -> nn.Parameter:
    """A matrix per expert, initialised as those of ``nn.Linear``."""
    bound = 1 / math.sqrt(columns)
    return nn.Parameter(torch.empty(experts, rows, columns).uniform_(-bound, bound))


def _check(c: MoEConfig) -> None:
    if c.d_shared < 0:
        raise ConfigError(f"moe: d_shared is {c.d_shared}, expected a width, or 0 for no shared expert")
    if c.shared_gate and not c.d_shared:
        raise ConfigError("moe: shared_gate is set, but there is no shared expert", hint="set d_shared to its width")
    for name in ("balance", "z"):
        if not 0 <= getattr(c, name) < math.inf:
            raise ConfigError(f"moe: {name} is {getattr(c, name)}, expected a number that is not negative")
