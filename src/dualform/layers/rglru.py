"""Griffin's recurrent block: a short convolution and the real-gated linear recurrent unit beside a GELU branch."""

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
from dualform.layers.elapsed import advanced, positions
from dualform.layers.heads import head_width
from dualform.layers.mamba import check_sizes
from dualform.layers.mixer import Hint, Mixer, check_kind
from dualform.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from dualform.ops.linear_scan import linear_scan


@options
class RGLRUConfig:
    """A recurrent block of Griffin.

    Args:
        d_inner: E, channels of the recurrence; None is ``d_model``.
        heads: blocks on the diagonal of the matrices of both gates.
        d_conv: W, width of the short convolution.
        c: how many times a decay is applied per step where its gate is fully open.
        a_min: smallest ``a^c`` at the start.
        a_max: largest ``a^c`` at the start; they are spread evenly.
        scale_first: whether ``sqrt(1 - a_t^2)`` multiplies the first input of a sequence too, as in the paper.
            RecurrentGemma takes that input as it is.
    """

    d_inner: int | None = None
    heads: int = 4
    d_conv: int = 4
    c: float = 8.0
    a_min: float = 0.9
    a_max: float = 0.999
    scale_first: bool = True

    def build(self, d_model: int) -> "RGLRU":
        """The layer, freshly initialised."""
        return RGLRU(self, d_model)


@state_class
class RGLRUState(NamedTuple):
    """Constant in the length of the context."""

    conv: Tensor  # (B, E, W-1), the last inputs of the convolution, oldest first
    h: Tensor  # (B, E)
    length: Tensor  # (B,) int64, steps each row has seen


class RGLRU(Mixer):
    """``h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t v_t``, ``y_t = out(h_t gelu(z_t))``, elementwise on E channels.

    z and u are affine maps of the input, ``v = conv(u)``, and the gates are ``r_t = s(W_a v_t + b_a)`` and
    ``i_t = s(W_x v_t + b_x)``, with block-diagonal matrices and the logistic function s; ``a_t = a^(c r_t)`` where
    ``a = exp(-softplus(decay))``. The gelu is the approximation by a tanh.

    The gradient of the root is exact, and finite also where ``a_t`` rounds to 1.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``.

    Raises:
        ConfigError: when ``heads`` does not divide the channels, for a size below 1, or decays outside of (0, 1).

    References:
        De et al. (2024), "Griffin", arXiv:2402.19427: section 2.3 (block), equations 1 to 4 (unit), section 2.4
        (initialisation); Botev et al. (2024), arXiv:2404.07839 (RecurrentGemma).
    """

    hints: ClassVar[dict[str, Hint]] = {"decay": Hint(decay=False), "gate_bias": Hint(decay=False)}

    def __init__(self, config: RGLRUConfig, d_model: int):
        super().__init__()
        c, self.config, self.d_model = config, config, d_model
        check_sizes("rglru", d_model=d_model, d_conv=c.d_conv)
        self.d_inner = d_model if c.d_inner is None else c.d_inner
        width = head_width("rglru", self.d_inner, c.heads, name="d_model" if c.d_inner is None else "d_inner")
        if not 0 < c.a_min <= c.a_max < 1:
            raise ConfigError(f"rglru: a_min {c.a_min} and a_max {c.a_max}, expected 0 < a_min <= a_max < 1")
        if not 0 < c.c < math.inf:
            raise ConfigError(f"rglru: c is {c.c}, expected a positive number")
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner)
        bound = 1 / math.sqrt(c.d_conv)
        self.conv_weight = nn.Parameter(torch.empty(self.d_inner, c.d_conv).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(self.d_inner).uniform_(-bound, bound))
        self.gate_weight = nn.Parameter(torch.randn(2, c.heads, width, width) / math.sqrt(width))  # of r and i
        self.gate_bias = nn.Parameter(torch.zeros(2, c.heads, width))
        once = -torch.empty(self.d_inner).uniform_(c.a_min, c.a_max).log() / c.c
        self.decay = nn.Parameter(torch.expm1(once).log())
        self.out_proj = nn.Linear(self.d_inner, d_model)

    def init_state(self, batch: int, *, max_len: int = 0) -> RGLRUState:
        """Zeros; ``max_len`` is ignored."""
        dtype, new = wide(self.decay), self.decay.new_zeros
        return RGLRUState(
            conv=new(batch, self.d_inner, self.config.d_conv - 1, dtype=dtype),
            h=new(batch, self.d_inner, dtype=dtype),
            length=new(batch, dtype=torch.int64),
        )

    def forward(
        self, x: Float[Tensor, "B T D"], state: RGLRUState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], RGLRUState]:
        """The parallel form."""
        check_features("rglru", x, self.d_model)
        packing = Packing.of("rglru", cu_seqlens, x)
        if state is not None:
            check_kind("rglru", state, RGLRUState)
        conv, h, length = (None, None, None) if state is None else state
        z, u = self.in_proj(x).chunk(2, -1)
        v, conv = causal_conv1d(u, self.conv_weight, self.conv_bias, initial_state=conv, cu_seqlens=packing)
        a, b = self._gated(v, positions(x, length, packing))
        ys, h = linear_scan(a, b, h, cu_seqlens=packing)
        return self._out(ys, z), RGLRUState(conv, h, advanced(x, length, packing))

    def step(self, x: Float[Tensor, "B D"], state: RGLRUState) -> tuple[Float[Tensor, "B D"], RGLRUState]:
        """The recurrent form."""
        check_features("rglru", x, self.d_model, "B")
        check_kind("rglru", state, RGLRUState)
        z, u = self.in_proj(x).chunk(2, -1)
        v, conv = causal_conv1d_update(u, state.conv, self.conv_weight, self.conv_bias)
        a, b = self._gated(v, state.length)
        h = a * state.h + b
        return self._out(h, z), RGLRUState(conv, h, state.length + 1)

    def _gated(self, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and inputs of the recurrence, in the dtype of states; ``v`` ``(..., E)`` at positions ``(...)``."""
        dtype, by_head = wide(self.decay, v), v.unflatten(-1, (self.config.heads, -1))
        gates = torch.einsum("...hp,ghpq->...ghq", by_head, self.gate_weight) + self.gate_bias
        r, i = torch.sigmoid(gates.to(dtype)).flatten(-2).unbind(-2)
        log_a = -self.config.c * F.softplus(self.decay.to(dtype)) * r
        # At 0 the root has no slope, but that of log_a, which it is multiplied by, is 0 there.
        scale = (-torch.expm1(2 * log_a)).clamp(min=torch.finfo(dtype).tiny).sqrt()
        if not self.config.scale_first:
            scale = torch.where((at == 0)[..., None], 1, scale)
        return log_a.exp(), scale * i * v.to(dtype)

    def _out(self, h: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(h.to(z.dtype) * F.gelu(z, approximate="tanh"))
