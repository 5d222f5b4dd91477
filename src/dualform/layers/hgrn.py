"""HGRN and HGRN2: gated linear recurrences whose forget gates have a lower bound, elementwise and as a matrix."""

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
from dualform.layers.mamba import check_sizes
from dualform.layers.mixer import Hint, Mixer, check_kind
from dualform.layers.norm import RMSNorm
from dualform.layers.norms import LayerNorm
from dualform.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_update
from dualform.ops.linear_scan import linear_scan


@options
class HGRNConfig:
    """A layer of HGRN.

    Args:
        d_inner: E, complex channels of the recurrence; None is ``d_model``.
        lower_bound: the least that a step keeps of a state, from 0 to below 1. In the paper it is learned, and grows
            from layer to layer; here it is a constant of the layer.
        rope: base of the angles by which states turn at the start.
        norm_eps: epsilon of the norm before the projection out.
    """

    d_inner: int | None = None
    lower_bound: float = 0.0
    rope: float = 10000.0
    norm_eps: float = 1e-5

    def build(self, d_model: int) -> "HGRN":
        """The layer, freshly initialised."""
        return HGRN(self, d_model)


@state_class
class HGRNState(NamedTuple):
    """Constant in the length of the context."""

    h: Tensor  # (B, E), complex


class HGRN(Mixer):
    """``h_t = f_t exp(i theta) h_{t-1} + (1 - f_t) c_t``, ``y_t = out(norm(s(g_t) [Re h_t, Im h_t]))``.

    The real and imaginary parts of c are each the SiLU of an affine map of the input, g is another, of 2 E channels,
    and so is m, of which the forget gate is ``f = b + (1 - b) s(m)`` with the lower bound b and the logistic function
    s. The angles theta are parameters, and the norm is a layer norm.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, E complex channels.

    Raises:
        ConfigError: for a size below 1, or a bound outside of [0, 1).

    References:
        Qin, Yang and Zhong (2023), "Hierarchically gated recurrent neural network for sequence modeling",
        arXiv:2311.04823, section 3.2.
    """

    hints: ClassVar[dict[str, Hint]] = {"theta": Hint(decay=False)}

    def __init__(self, config: HGRNConfig, d_model: int):
        super().__init__()
        c, self.config, self.d_model = config, config, d_model
        self.d_inner = d_model if c.d_inner is None else c.d_inner
        check_sizes("hgrn", d_model=d_model, d_inner=self.d_inner)
        _check("hgrn", c.lower_bound, c.norm_eps)
        if not 0 < c.rope < math.inf:
            raise ConfigError(f"hgrn: rope is {c.rope}, expected a base above 0")
        self.in_proj = nn.Linear(d_model, 5 * self.d_inner)
        self.theta = nn.Parameter(c.rope ** (-torch.arange(self.d_inner) / self.d_inner))
        self.norm = LayerNorm(2 * self.d_inner, c.norm_eps)
        self.out_proj = nn.Linear(2 * self.d_inner, d_model)

    def init_state(self, batch: int, *, max_len: int = 0) -> HGRNState:
        """Zeros; ``max_len`` is ignored."""
        dtype = torch.promote_types(wide(self.theta), torch.complex64)
        return HGRNState(self.theta.new_zeros(batch, self.d_inner, dtype=dtype))

    def forward(
        self, x: Float[Tensor, "B T D"], state: HGRNState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], HGRNState]:
        """The parallel form."""
        check_features("hgrn", x, self.d_model)
        packing = Packing.of("hgrn", cu_seqlens, x)
        if state is not None:
            check_kind("hgrn", state, HGRNState)
        a, b, g = self._maps(x)
        hs, h = linear_scan(a, b, None if state is None else state.h, cu_seqlens=packing)
        return self._out(hs, g), HGRNState(h)

    def step(self, x: Float[Tensor, "B D"], state: HGRNState) -> tuple[Float[Tensor, "B D"], HGRNState]:
        """The recurrent form."""
        check_features("hgrn", x, self.d_model, "B")
        check_kind("hgrn", state, HGRNState)
        a, b, g = self._maps(x)
        h = a * state.h + b
        return self._out(h, g), HGRNState(h)

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Complex decays and inputs of the recurrence, in the dtype of states, and what the output is gated by."""
        c, m, g = self.in_proj(x).split([2 * self.d_inner, self.d_inner, 2 * self.d_inner], -1)
        dtype = wide(self.theta, m)
        c, m = F.silu(c.to(dtype)), m.to(dtype)
        f, new = _forget(m, self.config.lower_bound).exp(), (1 - self.config.lower_bound) * torch.sigmoid(-m)
        theta = self.theta.to(dtype)
        return f * torch.complex(theta.cos(), theta.sin()), new * torch.complex(*c.chunk(2, -1)), g

    def _out(self, h: Tensor, g: Tensor) -> Tensor:
        return self.out_proj(self.norm(torch.sigmoid(g) * torch.cat([h.real, h.imag], -1).to(g.dtype)))


@options
class HGRN2Config:
    """A layer of HGRN2.

    Args:
        heads: H.
        d_head: N, width of a head, and of the rows of its state; None is ``d_model / heads``.
        lower_bound: the least that a step keeps of a state, as in :class:`HGRNConfig`.
        norm_eps: epsilon of the norm before the projection out.
    """

    heads: int = 4
    d_head: int | None = None
    lower_bound: float = 0.0
    norm_eps: float = 1e-5

    def build(self, d_model: int) -> "HGRN2":
        """The layer, freshly initialised."""
        return HGRN2(self, d_model)


@state_class
class HGRN2State(NamedTuple):
    """Constant in the length of the context."""

    h: Tensor  # (B, H, N, N), keys by values


class HGRN2(Mixer):
    """``h_t = diag(f_t) h_{t-1} + (1 - f_t) v_t^T``, ``y_t = out(rms(h_t^T silu(q_t)))`` in each head.

    q, m and v are linear maps of the input; the forget gate is ``f = b + (1 - b) s(m)`` with the lower bound b and the
    logistic function s. The norm is over all heads together.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, H heads of width N.

    Raises:
        ConfigError: when ``heads`` does not divide ``d_model`` and no ``d_head`` is given, for a size below 1, or a
            bound outside of [0, 1).

    References:
        Qin et al. (2024), "HGRN2: gated linear RNNs with state expansion", arXiv:2404.07904, section 3.
    """

    def __init__(self, config: HGRN2Config, d_model: int):
        super().__init__()
        c, self.config, self.d_model = config, config, d_model
        self.heads, self.d_head = c.heads, head_width("hgrn2", d_model, c.heads, c.d_head)
        _check("hgrn2", c.lower_bound, c.norm_eps)
        width = c.heads * self.d_head
        self.in_proj = nn.Linear(d_model, 3 * width, bias=False)
        self.norm = RMSNorm(width, c.norm_eps)
        self.out_proj = nn.Linear(width, d_model, bias=False)

    def init_state(self, batch: int, *, max_len: int = 0) -> HGRN2State:
        """Zeros; ``max_len`` is ignored."""
        weight = self.norm.weight
        return HGRN2State(weight.new_zeros(batch, self.heads, self.d_head, self.d_head, dtype=wide(weight)))

    def forward(
        self, x: Float[Tensor, "B T D"], state: HGRN2State | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], HGRN2State]:
        """The parallel form."""
        check_features("hgrn2", x, self.d_model)
        packing = Packing.of("hgrn2", cu_seqlens, x)
        if state is not None:
            check_kind("hgrn2", state, HGRN2State)
        start = None if state is None else state.h
        y, h = gated_linear_attention(*self._maps(x), initial_state=start, cu_seqlens=packing)
        return self.out_proj(self.norm(y.flatten(-2))), HGRN2State(h)

    def step(self, x: Float[Tensor, "B D"], state: HGRN2State) -> tuple[Float[Tensor, "B D"], HGRN2State]:
        """The recurrent form."""
        check_features("hgrn2", x, self.d_model, "B")
        check_kind("hgrn2", state, HGRN2State)
        y, h = gated_linear_attention_update(state.h, *self._maps(x))
        return self.out_proj(self.norm(y.flatten(-2))), HGRN2State(h)

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and logarithms of decays, ``(..., H, N)``; those and keys in the dtype of states."""
        q, m, v = self.in_proj(x).unflatten(-1, (3, self.heads, self.d_head)).unbind(-3)
        m, bound = m.to(wide(m)), self.config.lower_bound
        return F.silu(q), (1 - bound) * torch.sigmoid(-m), v, _forget(m, bound)


def _forget(m: Tensor, bound: float) -> Tensor:
    """``log(bound + (1 - bound) s(m))``, exact for gates near 0 and near 1."""
    if bound == 0:
        return F.logsigmoid(m)
    return torch.log1p(-(1 - bound) * torch.sigmoid(-m))


def _check(kind: str, bound: float, norm_eps: float) -> None:
    if not 0 <= bound < 1:
        raise ConfigError(f"{kind}: lower_bound is {bound}, expected at least 0 and below 1")
    if not 0 < norm_eps < math.inf:
        raise ConfigError(f"{kind}: norm_eps is {norm_eps}, expected a small positive number")
