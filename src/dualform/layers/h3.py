"""H3: a shift and a diagonal state space model between multiplications, in place of attention's comparisons."""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dualform.core.discretize import EXPONENTS, RULES
from dualform.core.errors import ConfigError
from dualform.core.nplr import DIAGONALS
from dualform.core.options import options
from dualform.core.packing import check_cu_seqlens, sequence_ids
from dualform.core.shapes import check_tensors, wide
from dualform.core.tree import state_class
from dualform.layers.diagonal import Poles
from dualform.layers.mixer import Hint, Mixer, exactly
from dualform.layers.structured import check_choice, check_pairs
from dualform.ops.causal_conv1d import causal_conv1d_update
from dualform.ops.chunks import CHUNK

INITS = DIAGONALS  # the poles at the start


@options
class H3Config:
    """Sizes and initialisation of an :class:`H3`.

    Args:
        d_state: state size of both models: the shift keeps ``d_state`` keys, and a channel of the diagonal model has
            as many real numbers; even, as poles come in conjugate pairs.
        d_head: P, width of a head; every head has ``P * P`` channels of the diagonal model, which share its poles.
        init: the poles at the start, a key of :data:`INITS`, see :func:`dualform.core.nplr.diagonal`.
        rule: discretisation, ``zoh`` or ``bilinear``.
        dt_min: smallest step size at the start; steps are spread evenly in their logarithm.
        dt_max: largest step size at the start.
        bias: whether the projections have one.
    """

    d_state: int = 64
    d_head: int = 1
    init: str = "lin"
    rule: str = "zoh"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    bias: bool = True

    def build(self, d_model: int) -> "H3":
        """The layer, freshly initialised."""
        return H3(self, d_model)


@state_class
class H3State(NamedTuple):
    """Constant in the length of the context."""

    shift: Tensor  # (B, H P, d_state - 1), the last keys, oldest first
    h: Tensor  # (B, H, P, P, d_state / 2), complex, the diagonal model of every pair of key and value channels


class H3(Mixer):
    """``y_t = W_out (q_t SSM_diag(SSM_shift(k) v^T)_t)``, a head at a time, with ``q, k, v = W x + b``.

    The shift model is a short causal convolution, ``kbar_t = sum_{j < d_state} shift_j k_{t-j}``: its state is a line
    of keys that moves on by one place, its input vector the first unit vector, and ``shift`` its output vector with
    the skip added to the first place. The diagonal model of a head, ``h_t = Abar h_{t-1} + Bbar kbar_t v_t^T``,
    ``z_t = 2 Re(C h_t) + D kbar_t v_t^T``, is that of :class:`~dualform.layers.s4d.S4D`; it runs on each of the
    ``P x P`` products of a key and a value channel, and ``q_t z_t`` sums over the key channels.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, H = d_model / P heads of width P. The parallel form holds
        ``(B, T, d_model * P)`` numbers, and never the states of every token.

    Raises:
        ConfigError: for an odd ``d_state``, an unknown ``init`` or ``rule``, step sizes that are not positive, or a
            ``d_head`` that does not divide ``d_model``.

    References:
        Fu, Dao, Saab, Thomas, Rudra and Re (2023), "Hungry hungry hippos", arXiv:2212.14052: section 3.1 and
        algorithm 1.
    """

    hints: ClassVar[dict[str, Hint]] = {
        "shift": Hint(decay=False),
        "log_dt": Hint(decay=False, max_lr=1e-3),
        "log_A_re": Hint(decay=False, max_lr=1e-3),
        "A_im": Hint(decay=False, max_lr=1e-3),
        "D": Hint(decay=False),
    }

    def __init__(self, config: H3Config, d_model: int):
        super().__init__()
        c, self.config, self.d_model, dtype = config, config, d_model, torch.get_default_dtype()
        check_pairs("h3", c.d_state)
        check_choice("h3", "init", c.init, tuple(INITS))
        check_choice("h3", "rule", c.rule, tuple(EXPONENTS))
        if not 0 < c.dt_min <= c.dt_max:
            raise ConfigError(f"h3: dt_min {c.dt_min} and dt_max {c.dt_max}, expected 0 < dt_min <= dt_max")
        if c.d_head < 1 or d_model % c.d_head:
            raise ConfigError(
                f"h3: d_head is {c.d_head}, which does not divide d_model {d_model}",
                hint=f"set d_head to a divisor of {d_model}",
            )
        self.heads = d_model // c.d_head
        A = INITS[c.init](c.d_state).expand(self.heads, -1)
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=c.bias)
        self.shift = nn.Parameter(torch.randn(d_model, c.d_state))
        self.log_dt = nn.Parameter(math.log(c.dt_min) + torch.rand(self.heads) * math.log(c.dt_max / c.dt_min))
        self.log_A_re = nn.Parameter((-A.real).clamp_min(1e-4).log().to(dtype))
        self.A_im = nn.Parameter(A.imag.to(dtype, copy=True, memory_format=torch.contiguous_format))
        self.C = nn.Parameter(torch.randn(*A.shape, 2) * math.sqrt(0.5))  # (real, imaginary)
        self.D = nn.Parameter(torch.randn(self.heads))
        self.out_proj = nn.Linear(d_model, d_model, bias=c.bias)

    def init_state(self, batch: int, *, max_len: int = 0) -> H3State:
        """Zeros; ``max_len`` is ignored."""
        c, dtype, new = self.config, wide(self.log_dt), self.log_dt.new_zeros
        return H3State(
            shift=new(batch, self.d_model, c.d_state - 1, dtype=dtype),
            h=new(batch, self.heads, c.d_head, c.d_head, c.d_state // 2, dtype=_complex(dtype)),
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: H3State | None = None,
        *,
        cu_seqlens: Int[Tensor, " n"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], H3State]:
        """The parallel form."""
        check_tensors("h3", x=(x, f"B T {self.d_model}"))
        rows = x.shape[0] if cu_seqlens is None else check_cu_seqlens("h3", cu_seqlens, *x.shape[:2])
        state = self._state(x, state, rows)
        if x.numel() == 0:
            return x, state
        q, k, v = (m.to(wide(self.log_dt)) for m in self.qkv_proj(x).chunk(3, -1))
        with exactly(x.device.type):
            k, shift = _shift(k, self.shift.to(k.dtype), state.shift, cu_seqlens)
            y, h = self._diagonal(self._heads(q), self._heads(k), self._heads(v), state.h, cu_seqlens)
        return self.out_proj(y.flatten(2).to(x.dtype)), H3State(shift, h)

    def step(self, x: Float[Tensor, "B D"], state: H3State) -> tuple[Float[Tensor, "B D"], H3State]:
        """The recurrent form."""
        check_tensors("h3", x=(x, f"B {self.d_model}"))
        state = self._state(x, state, len(x))
        q, k, v = (m.to(wide(self.log_dt)) for m in self.qkv_proj(x).chunk(3, -1))
        k, shift = causal_conv1d_update(k, state.shift, self.shift.to(k.dtype).flip(1))
        with exactly(x.device.type):
            kv = self._heads(k)[..., :, None] * self._heads(v)[..., None, :]
            u, C = kv.permute(2, 3, 0, 1), self._C()
            h = self._system().step(u.flatten(0, 2), _fold(state.h))
            z = (2 * (C * h).sum(-1).real).view(u.shape) + self.D.to(u.dtype) * u
            y = torch.einsum("bhi,ijbh->bhj", self._heads(q), z)
        return self.out_proj(y.flatten(1).to(x.dtype)), H3State(shift, _unfold(h, state.h))

    def kernel(self, length: int) -> Float[Tensor, "H K"]:
        """The response of the diagonal models to an impulse, ``2 Re(C Abar^l Bbar)``, without the skip D."""
        return self._system().kernel(self._C(), length)

    def _diagonal(self, q: Tensor, k: Tensor, v: Tensor, h: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(B, T, H, P)`` -> the same. Products are further rows of one batch, or further sequences of one line."""
        (rows, length), products = k.shape[:2], k.shape[3] ** 2
        kv = (k[..., :, None] * v[..., None, :]).permute(3, 4, 0, 1, 2)  # (P, P, B, T, H)
        if cu_seqlens is None:
            borders, u = None, kv.reshape(products * rows, length, self.heads)
        else:
            cu_seqlens = cu_seqlens.to(k.device, torch.int64)
            u = kv.reshape(1, products * length, self.heads)
            begin = length * torch.arange(products, device=k.device)[:, None] + cu_seqlens[:-1]
            borders = torch.cat([begin.flatten(), begin.new_full((1,), products * length)])
        z, last = self._system().run(u, _fold(h), borders, self._C())
        z = torch.addcmul(z, u, self.D.to(u.dtype)).view(kv.shape)
        return torch.einsum("bthi,ijbth->bthj", q, z), _unfold(last, h)

    def _system(self) -> Poles:
        dtype, rule = wide(self.log_dt), self.config.rule
        A = torch.complex(-self.log_A_re.to(dtype).exp(), self.A_im.to(dtype))
        dt = self.log_dt.to(dtype).exp()[:, None]
        return Poles(EXPONENTS[rule](A, dt), *RULES[rule](A, dt))

    def _C(self) -> Tensor:
        return torch.view_as_complex(self.C.to(wide(self.log_dt)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.config.d_head))

    def _state(self, x: Tensor, state: H3State | None, rows: int) -> H3State:
        if state is None:
            return self.init_state(rows)
        c, dtype = self.config, wide(self.log_dt)
        expected = {
            "state.shift": (state.shift, f"{rows} {self.d_model} {c.d_state - 1}"),
            "state.h": (state.h, f"{rows} {self.heads} {c.d_head} {c.d_head} {c.d_state // 2}"),
        }
        check_tensors("h3", x=(x, "* ..."), **expected)
        return H3State(state.shift.to(dtype), state.h.to(_complex(dtype)))


def _shift(k: Tensor, taps: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """``kbar_t = sum_j taps_j k_{t-j}`` of ``(B, T, D)`` behind the earlier keys, and the last ones ``(rows, D, W-1)``.

    Packed sequences lie on one line, each behind its own earlier keys.
    """
    length, (rows, _, reach) = k.shape[1], state.shape
    if cu_seqlens is None:
        line = torch.cat([state.mT, k], 1)
        return _banded(line, taps), line[:, length:].mT.contiguous()
    borders = cu_seqlens.to(k.device, torch.int64)
    before = reach * torch.arange(rows, device=k.device)[:, None] + torch.arange(reach, device=k.device)
    token = torch.arange(length, device=k.device) + reach * (sequence_ids(borders, length) + 1)
    line = k.new_zeros(length + rows * reach, k.shape[2])
    line = line.index_put((token,), k[0]).index_put((borders[:-1, None] + before,), state.mT)
    return _banded(line[None], taps)[:, token - reach], line[borders[1:, None] + before].mT.contiguous()


def _banded(line: Tensor, taps: Tensor) -> Tensor:
    """``y_t = sum_j taps_j line_{t+W-1-j}``, ``(B, T + W - 1, D)`` -> ``(B, T, D)``: a matrix product per chunk."""
    (batch, total, width), reach = line.shape, taps.shape[1] - 1
    length = total - reach
    chunk = min(CHUNK, length)
    count, at = -(-length // chunk), torch.arange(reach + chunk, device=line.device)
    frames = F.pad(line, (0, 0, 0, count * chunk - length)).unfold(1, reach + chunk, chunk)
    band = F.pad(taps, (chunk, chunk))[:, chunk + reach + at[:chunk] - at[:, None]]  # (D, W - 1 + chunk, chunk)
    y = torch.bmm(frames.permute(2, 0, 1, 3).flatten(1, 2), band)
    return y.view(width, batch, count * chunk)[..., :length].permute(1, 2, 0)


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.complex64)


def _fold(h: Tensor) -> Tensor:
    """``(rows, H, P, P, N)`` -> ``(P P rows, H, N)``."""
    return h.permute(2, 3, 0, 1, 4).flatten(0, 2)


def _unfold(h: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_fold`, to the shape of ``like``, in memory of its own."""
    rows, heads, width = like.shape[:3]
    h = h.reshape(width, width, rows, heads, h.shape[-1])
    return h.permute(2, 3, 0, 1, 4).contiguous()
