"""The mLSTM of xLSTM: a matrix memory with exponential input gates, in matrix products, and its normaliser."""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide, widest
from dualform.core.tree import state_class
from dualform.layers.heads import head_width
from dualform.layers.mamba import check_sizes
from dualform.layers.mixer import Hint, Mixer, check_kind
from dualform.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_update
from dualform.ops.linear_scan import linear_scan

_LARGEST = 80.0  # of an exponent; a memory so small that it would need more comes out as zero


@options
class MLSTMConfig:
    """An mLSTM.

    Args:
        heads: H.
        d_key: N, width of the queries and keys of a head; None is ``d_model / heads``.
        d_value: P, width of the values of a head; None is ``d_model / heads``.
        gate_cap: c, the bound of ``c tanh(z / c)`` through which the arguments z of the gates pass; None for none.
        bias: whether the projections have one; those of the gates have it always.
        eps: added to the normaliser.
        norm_eps: epsilon of the norm of each head's output.
    """

    heads: int = 4
    d_key: int | None = None
    d_value: int | None = None
    gate_cap: float | None = 15.0
    bias: bool = False
    eps: float = 1e-6
    norm_eps: float = 1e-6

    def build(self, d_model: int) -> "MLSTM":
        """The layer, freshly initialised."""
        return MLSTM(self, d_model)


@state_class
class MLSTMState(NamedTuple):
    """Constant in the length of the context; what the recurrence holds is ``exp(m) h``."""

    h: Tensor  # (B, H, N, P + 1), keys by values, and in the last column the sum of keys that normalises
    m: Tensor  # (B, H), the logarithm of the scale


class MLSTM(Mixer):
    """``C_t = f_t C_{t-1} + i_t k_t v_t^T``, ``n_t = f_t n_{t-1} + i_t k_t``, ``u_t = C_t^T q_t / max(|n_t q_t|, 1)``.

    That is in each head, with queries divided by ``sqrt(N)``. Then ``y_t = out(s(o_t) * norm(u_t))``, where the norm is
    a layer norm of each head, without a bias unless the projections have one. q, k, v and o are linear maps of the
    input, and so are a and b, of which the gates are made: ``i = exp(a)``, ``f = s(b)``; s is the logistic function.

    C and n are kept divided by ``exp(m_t)``, where ``m_t = max(log f_t + m_{t-1}, a_t)`` and ``m_0 = 0``, so that
    nothing overflows. In the authors' code ``eps`` is added to the normaliser of those, and here as well.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, H heads with keys of width N and values of width P.

    Raises:
        ConfigError: when ``heads`` does not divide ``d_model`` and a width is not given, for a size below 1, or a bound
            or epsilon that is not positive.

    References:
        Beck et al. (2024), "xLSTM", arXiv:2405.04517: equations 19 to 27, appendix A.3 (scale); Beck et al. (2025),
        "xLSTM 7B", arXiv:2503.13427: section 3 (the layer, and the bound of its gates).
    """

    hints: ClassVar[dict[str, Hint]] = {"gate_bias": Hint(decay=False), "norm_weight": Hint(decay=False)}

    def __init__(self, config: MLSTMConfig, d_model: int):
        super().__init__()
        c, self.config, self.d_model = config, config, d_model
        self.heads, self.d_key = c.heads, head_width("mlstm", d_model, c.heads, c.d_key, of="d_key")
        self.d_value = head_width("mlstm", d_model, c.heads, c.d_value, of="d_value")
        for name, value in (("gate_cap", c.gate_cap), ("eps", c.eps), ("norm_eps", c.norm_eps)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"mlstm: {name} is {value}, expected a positive number")
        check_sizes("mlstm", d_model=d_model)
        keys, values = c.heads * self.d_key, c.heads * self.d_value
        self.in_proj = nn.Linear(d_model, 2 * keys + 2 * values, bias=c.bias)
        self.gate_proj = nn.Linear(d_model, 2 * c.heads, bias=False)
        self.gate_bias = nn.Parameter(torch.cat([torch.full((c.heads,), -10.0), torch.linspace(3, 6, c.heads)]))
        self.norm_weight = nn.Parameter(torch.ones(values))
        self.norm_bias = nn.Parameter(torch.zeros(values)) if c.bias else None
        self.out_proj = nn.Linear(values, d_model, bias=c.bias)

    def init_state(self, batch: int, *, max_len: int = 0) -> MLSTMState:
        """Zeros; ``max_len`` is ignored."""
        dtype, new = wide(self.norm_weight), self.norm_weight.new_zeros
        return MLSTMState(
            h=new(batch, self.heads, self.d_key, self.d_value + 1, dtype=dtype), m=new(batch, self.heads, dtype=dtype)
        )

    def forward(
        self, x: Float[Tensor, "B T D"], state: MLSTMState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], MLSTMState]:
        """The parallel form."""
        check_features("mlstm", x, self.d_model)
        packing = Packing.of("mlstm", cu_seqlens, x)
        state = self.init_state(x.shape[0] if packing is None else packing.rows) if state is None else state
        check_kind("mlstm", state, MLSTMState)
        q, k, v, o, a, log_f = self._maps(x)
        before, m, last = scales(log_f, a, state.m, packing)
        decay, v = self._scaled(v, a, log_f, before, m)
        y, h = gated_linear_attention(q, k, v, decay, initial_state=state.h, cu_seqlens=packing)
        return self._out(y, m, o), MLSTMState(h, last)

    def step(self, x: Float[Tensor, "B D"], state: MLSTMState) -> tuple[Float[Tensor, "B D"], MLSTMState]:
        """The recurrent form."""
        check_features("mlstm", x, self.d_model, "B")
        check_kind("mlstm", state, MLSTMState)
        q, k, v, o, a, log_f = self._maps(x)
        before = state.m.to(a.dtype)
        m = torch.maximum(log_f + before, a)
        decay, v = self._scaled(v, a, log_f, before, m)
        y, h = gated_linear_attention_update(state.h, q, k, v, decay)
        return self._out(y, m, o), MLSTMState(h, m)

    def _maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """Q and k ``(..., H, N)``, v ``(..., H, P)``, o ``(..., H P)``, a and log f ``(..., H)``.

        Those of the gates in the dtype of states.
        """
        keys, values = self.heads * self.d_key, self.heads * self.d_value
        q, k, v, o = self.in_proj(x).split([keys, keys, values, values], -1)
        gates = self.gate_proj(x).to(wide(self.gate_bias, x)) + self.gate_bias
        if self.config.gate_cap is not None:
            gates = self.config.gate_cap * torch.tanh(gates / self.config.gate_cap)
        a, b = gates.chunk(2, -1)
        q, k, v = (m.unflatten(-1, (self.heads, -1)) for m in (q / math.sqrt(self.d_key), k, v))
        return q, k, v, o, a, F.logsigmoid(b)

    def _scaled(self, v: Tensor, a: Tensor, log_f: Tensor, before: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of decays of the scaled memory, and what is added to it: the values, and 1."""
        decay = (log_f + before - m)[..., None].expand(*m.shape, self.d_key)
        one = torch.ones_like(v[..., :1], dtype=m.dtype)
        return decay, torch.exp(a - m)[..., None] * torch.cat([v.to(m.dtype), one], -1)

    def _out(self, y: Tensor, m: Tensor, o: Tensor) -> Tensor:
        u, n = y[..., :-1], y[..., -1]
        least = torch.exp((-m).clamp(max=_LARGEST))
        u = u / (torch.maximum(n.abs(), least) + self.config.eps)[..., None]
        u = F.layer_norm(u, (self.d_value,), eps=self.config.norm_eps).flatten(-2).to(o.dtype) * self.norm_weight
        return self.out_proj(torch.sigmoid(o) * (u if self.norm_bias is None else u + self.norm_bias))


def scales(
    log_f: Float[Tensor, "B T H"], a: Float[Tensor, "B T H"], start: Float[Tensor, "R H"], packing: Packing | None
) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"], Float[Tensor, "R H"]]:
    """``m_t = max(log f_t + m_{t-1}, a_t)`` for every step, without a loop: m_{t-1}, m_t, and the last of each row.

    Which of the two is larger is known from a running maximum; given that, m is a linear recurrence.

    Args:
        log_f: logarithms of forget gates.
        a: the same of input gates.
        start: m before the first step.
        packing: of the inputs.
    """
    length, start = a.shape[1], start.to(a.dtype)
    ids, at = (None, torch.arange(length, device=a.device)) if packing is None else packing.places(length)
    first, from_start = (at == 0)[None, :, None], start[:, None] if ids is None else start[ids][None]
    with torch.no_grad():
        kept = _kept(log_f, a, from_start, first, ids)
    m, last = linear_scan(kept.to(a.dtype), torch.where(kept, log_f, a), start, cu_seqlens=packing)
    return torch.where(first, from_start, m.roll(1, 1)), m, last


def _kept(log_f: Tensor, a: Tensor, from_start: Tensor, first: Tensor, ids: Tensor | None) -> Tensor:
    """Whether ``log f_t + m_{t-1}`` is larger than ``a_t``, that is, whether an earlier step is the largest still.

    The logarithm of what is left of step s at step t is a difference of sums. Packed sequences are kept apart by
    adding a multiple of the range of all values to each.
    """
    log_f, a, from_start = (g.to(widest(g)).nan_to_num(0.0, 0.0, -1e4) for g in (log_f, a, from_start))
    given = torch.where(first, torch.maximum(a, log_f + from_start), a) - log_f.cumsum(1)
    if ids is not None:
        some = F.pad(given, (0, 0, 1, 0))  # of no steps there is no range
        given = given + ids[None, :, None] * (some.amax(1, keepdim=True) - some.amin(1, keepdim=True) + 1)
    step = torch.arange(a.shape[1], device=a.device)[None, :, None]
    return torch.where(first, log_f + from_start > a, given.cummax(1).indices != step)
