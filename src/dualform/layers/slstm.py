"""The sLSTM of xLSTM: a true recurrence in heads, with exponential input gates and a normaliser."""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.tree import state_class
from dualform.layers.heads import head_width
from dualform.layers.mixer import Hint, Mixer, check_kind
from dualform.ops.slstm import slstm

_NOTHING = -1e30  # the scale before the first step, of which nothing is kept


@options
class SLSTMConfig:
    """An sLSTM.

    Args:
        heads: H, which see each other's outputs only through the projections of later layers.
        d_head: P, width of a head; None is ``d_model / heads``.
        norm_eps: epsilon of the norm of each head's output.
    """

    heads: int = 4
    d_head: int | None = None
    norm_eps: float = 1e-6

    def build(self, d_model: int) -> "SLSTM":
        """The layer, freshly initialised."""
        return SLSTM(self, d_model)


@state_class
class SLSTMState(NamedTuple):
    """Constant in the length of the context; cells and normaliser are divided by ``exp(m)``."""

    h: Tensor  # (B, H, P), the last output
    c: Tensor  # (B, H, P), cells
    n: Tensor  # (B, H, P), the normaliser
    m: Tensor  # (B, H, P), the logarithm of the scale


class SLSTM(Mixer):
    """``c_t = f_t c_{t-1} + i_t z_t``, ``n_t = f_t n_{t-1} + i_t``, ``h_t = o_t c_t / n_t``, ``y_t = out(norm(h_t))``.

    ``z = tanh(...)``, ``i = exp(...)``, ``f = s(...)`` and ``o = s(...)``, with the logistic function s, each of a map
    ``W x_t + R h_{t-1} + b`` of its own, where R has one block for each head. The norm is a layer norm of each head,
    without a bias. As ``h_{t-1}`` is among what the gates see, every form is a loop over time; see
    :func:`~dualform.ops.slstm.slstm`, which also says how c and n are scaled.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, H heads of width P.

    Raises:
        ConfigError: when ``heads`` does not divide ``d_model`` and no ``d_head`` is given, or for a size below 1.

    References:
        Beck et al. (2024), "xLSTM", arXiv:2405.04517: equations 8 to 17; appendix A.2 (initialisation).
    """

    hints: ClassVar[dict[str, Hint]] = {"gate_bias": Hint(decay=False), "norm_weight": Hint(decay=False)}

    def __init__(self, config: SLSTMConfig, d_model: int):
        super().__init__()
        c, self.config, self.d_model = config, config, d_model
        self.heads, self.d_head = c.heads, head_width("slstm", d_model, c.heads, c.d_head)
        if not 0 < c.norm_eps < math.inf:
            raise ConfigError(f"slstm: norm_eps is {c.norm_eps}, expected a small positive number")
        width = c.heads * self.d_head
        self.in_proj = nn.Linear(d_model, 4 * width, bias=False)
        self.gate_weight = nn.Parameter(torch.randn(4, c.heads, self.d_head, self.d_head) / math.sqrt(self.d_head))
        bias = torch.zeros(4, c.heads, self.d_head)
        bias[2] = torch.linspace(3, 6, self.d_head)
        self.gate_bias = nn.Parameter(bias)
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, d_model, bias=False)

    def init_state(self, batch: int, *, max_len: int = 0) -> SLSTMState:
        """Zeros, and a scale that forgets them; ``max_len`` is ignored."""
        zeros = self.gate_bias.new_zeros(batch, self.heads, self.d_head, dtype=wide(self.gate_bias))
        return SLSTMState(zeros, zeros.clone(), zeros.clone(), torch.full_like(zeros, _NOTHING))

    def forward(
        self, x: Float[Tensor, "B T D"], state: SLSTMState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], SLSTMState]:
        """The whole sequence, step by step; packed sequences run side by side, without padding."""
        check_features("slstm", x, self.d_model)
        packing = Packing.of("slstm", cu_seqlens, x)
        state = self.init_state(x.shape[0] if packing is None else packing.rows) if state is None else state
        check_kind("slstm", state, SLSTMState)
        gates = self.in_proj(x).unflatten(-1, (4, self.heads, self.d_head))
        gates = gates.to(wide(gates)) + self.gate_bias
        y, *after = slstm(gates, self.gate_weight.to(gates.dtype), *state, cu_seqlens=packing)
        y = F.layer_norm(y, (self.d_head,), eps=self.config.norm_eps).flatten(-2).to(x.dtype)
        return self.out_proj(y * self.norm_weight), SLSTMState(*after)
