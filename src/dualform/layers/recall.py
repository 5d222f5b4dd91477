"""A part whose output does not depend on its input, but on what an earlier part has saved."""

from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.options import options
from dualform.layers.context import Context
from dualform.layers.part import Part


@options
class RecallConfig:
    """What a :class:`Recall` reads.

    Args:
        name: that a sub-layer before it saves.
        bias: whether the map has one.
    """

    name: str = "embedding"
    bias: bool = False

    def build(self, d_model: int) -> "Recall":
        """The layer, freshly initialised."""
        return Recall(self, d_model)


class Recall(Part):
    """``y_t = W m_t``, where ``m`` ``(B, T, D)`` is what the model's context has under a name; the input is not read.

    In Zamba it brings what a shared block made to the layers of Mamba.

    References:
        Glorioso et al. (2024), arXiv:2405.16712, equation 6.
    """

    in_context = True

    def __init__(self, config: RecallConfig, d_model: int):
        super().__init__()
        self.name = config.name
        self.out_proj = nn.Linear(d_model, d_model, bias=config.bias)

    def forward(self, x: Float[Tensor, "B T D"], *, context: Context | None = None) -> Float[Tensor, "B T D"]:
        """The outputs at the elements of ``x``."""
        m = x if context is None else context[self.name]
        return self.out_proj(m.to(x.dtype))
