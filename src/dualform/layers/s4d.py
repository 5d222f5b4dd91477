"""S4D: a diagonal, time-invariant state space model per channel, then GELU and a gated output map."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from dualform.core.discretize import RULES
from dualform.core.errors import ConfigError
from dualform.core.hippo import legs_diagonal
from dualform.core.packing import check_cu_seqlens, from_lengths, sequence_ids
from dualform.core.shapes import check_tensors, wide
from dualform.layers.mixer import Hint, Mixer
from dualform.ops.linear_scan import linear_scan

_SPAN = 256 * 64  # tokens of a row whose chunks run side by side; it bounds the memory of a long sequence
_CHUNK = 64  # tokens per matrix product: two real numbers per pole and channel then weigh as much as the tokens


def lin(n: int) -> Tensor:
    """S4D-Lin: ``-1/2 + i pi k``, the poles of a Fourier series; ``(N // 2,)`` complex128."""
    k = torch.arange(n // 2, dtype=torch.float64)
    return torch.complex(torch.full_like(k, -0.5), math.pi * k)


def inv(n: int) -> Tensor:
    """S4D-Inv: ``-1/2 + i (N / pi) (N / (2k + 1) - 1)``, close to HiPPO-LegS; ``(N // 2,)`` complex128."""
    k = torch.arange(n // 2, dtype=torch.float64)
    return torch.complex(torch.full_like(k, -0.5), n / math.pi * (n / (2 * k + 1) - 1))


def real(n: int) -> Tensor:
    """S4D-Real: ``-(k + 1)``; ``(N // 2,)`` complex128."""
    k = torch.arange(n // 2, dtype=torch.float64)
    return torch.complex(-(k + 1), torch.zeros_like(k))


INITS: dict[str, Callable[[int], Tensor]] = {"lin": lin, "inv": inv, "real": real, "legs": legs_diagonal}
_STABLE_RULES = ("zoh", "bilinear")  # these map every pole of the left half plane into the unit disc


@dataclass(frozen=True)
class S4DConfig:
    """Sizes and initialisation of an :class:`S4D`.

    Args:
        d_state: state size of a channel, real numbers; even, as poles come in conjugate pairs.
        init: the poles at the start, a key of :data:`INITS`: ``lin``, ``inv``, ``real`` or ``legs``.
        rule: discretisation, ``zoh`` or ``bilinear``.
        dt_min: smallest step size at the start; steps are spread evenly in their logarithm.
        dt_max: largest step size at the start.
    """

    d_state: int = 64
    init: str = "lin"
    rule: str = "zoh"
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    def build(self, d_model: int) -> "S4D":
        """The layer, freshly initialised."""
        return S4D(self, d_model)


class S4D(Mixer):
    """``h_t = Abar h_{t-1} + Bbar x_t``, ``s_t = 2 Re(C h_t) + D x_t``, ``y_t = GLU(W gelu(s_t) + b)``.

    Each of D channels has N = ``d_state / 2`` poles ``A = -exp(log_A_re) + i A_im``, one of each conjugate pair, and
    a step ``dt = exp(log_dt)``; ``Abar, Bbar`` discretise ``(A, 1)``, the input vector being part of C. The state is
    h, ``(B, D, N)``, complex64 or, with float64 weights, complex128; everything before the output map is computed
    in that precision.

    The parallel form cuts time into chunks: within a chunk a causal Toeplitz product with the kernel
    ``2 Re(C Abar^l Bbar)``, from chunk to chunk a scan of states.

    Raises:
        ConfigError: for an odd ``d_state``, an unknown ``init`` or ``rule``, or step sizes that are not positive.

    References:
        Gu, Goel, Gupta and Re (2022), arXiv:2206.11893: equation 2 (system), section 3 (kernel, parametrisation),
        section 4 (initialisations).
    """

    hints: ClassVar[dict[str, Hint]] = {
        "log_dt": Hint(decay=False, max_lr=1e-3),
        "log_A_re": Hint(decay=False, max_lr=1e-3),
        "A_im": Hint(decay=False, max_lr=1e-3),
        "D": Hint(decay=False),
    }

    def __init__(self, config: S4DConfig, d_model: int):
        super().__init__()
        c = config
        if c.d_state < 2 or c.d_state % 2:
            raise ConfigError(f"s4d: d_state is {c.d_state}, expected an even number: poles come in conjugate pairs")
        for name, value, known in (("init", c.init, tuple(INITS)), ("rule", c.rule, _STABLE_RULES)):
            if value not in known:
                raise ConfigError(f"s4d: {name} {value!r} is unknown", hint=f"one of {', '.join(known)}")
        if not 0 < c.dt_min <= c.dt_max:
            raise ConfigError(f"s4d: dt_min {c.dt_min} and dt_max {c.dt_max}, expected 0 < dt_min <= dt_max")
        self.d_model, self.rule, dtype = d_model, RULES[c.rule], torch.get_default_dtype()
        A = INITS[c.init](c.d_state)
        self.log_dt = nn.Parameter(math.log(c.dt_min) + torch.rand(d_model) * math.log(c.dt_max / c.dt_min))
        self.log_A_re = nn.Parameter((-A.real).log().to(dtype).repeat(d_model, 1))
        self.A_im = nn.Parameter(A.imag.to(dtype).repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(d_model, len(A), 2) * math.sqrt(0.5))  # (real, imaginary)
        self.D = nn.Parameter(torch.randn(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def init_state(self, batch: int, *, max_len: int = 0) -> Complex[Tensor, "B D N"]:
        """Zeros."""
        return torch.zeros(batch, *self.A_im.shape, dtype=self._complex(), device=self.A_im.device)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: Complex[Tensor, "rows D N"] | None = None,
        *,
        cu_seqlens: Int[Tensor, " n"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Complex[Tensor, "rows D N"]]:
        """The parallel form. States are held once per chunk of 64 tokens, never for every token."""
        check_tensors("s4d", x=(x, f"B T {self.d_model}"))
        rows = x.shape[0] if cu_seqlens is None else check_cu_seqlens("s4d", cu_seqlens, *x.shape[:2])
        h = self._state(x, state, rows)
        if x.numel() == 0:
            return x, h
        borders = None if cu_seqlens is None else cu_seqlens.to(x.device, torch.int64)
        longest = x.shape[1] if borders is None else int(borders.diff().max())
        with _exactly(x.device.type):
            tables = self._tables(min(_CHUNK, longest))
        outputs = []
        for part in x.split(_SPAN, 1) if borders is None else [x]:
            with _exactly(x.device.type):
                u = part.to(wide(self.log_dt))
                y, h = _whole(u, h, tables) if borders is None else _packed(u[0], borders, h, tables)
            outputs.append(self._out(y, x))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), h

    def step(
        self, x: Float[Tensor, "B D"], state: Complex[Tensor, "B D N"]
    ) -> tuple[Float[Tensor, "B D"], Complex[Tensor, "B D N"]]:
        """The recurrent form."""
        check_tensors("s4d", x=(x, f"B {self.d_model}"))
        h, u = self._state(x, state, len(x)), x.to(wide(self.log_dt))
        Abar, Bbar, C = self._discrete()
        h = Abar * h + Bbar * u[..., None]
        return self._out(2 * (C * h).sum(-1).real + self.D.to(u.dtype) * u, x), h

    def kernel(self, length: int) -> Float[Tensor, "D K"]:
        """The response of the state space models to an impulse, ``2 Re(C Abar^l Bbar)``, without the skip D.

        From the zero state s is the causal convolution of x with it, plus ``D x``. Holds ``(D, N, length)``.
        """
        Abar, Bbar, C = self._discrete()
        return 2 * torch.einsum("dn,dnk->dk", C * Bbar, _powers(Abar, length)[..., :length]).real

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """Abar, Bbar and C, each ``(D, N)`` and complex."""
        dtype = wide(self.log_dt)
        A = torch.complex(-self.log_A_re.to(dtype).exp(), self.A_im.to(dtype))
        return *self.rule(A, self.log_dt.to(dtype).exp()[:, None]), torch.view_as_complex(self.C.to(dtype))

    def _tables(self, chunk: int) -> "_Tables":
        Abar, Bbar, C = self._discrete()
        powers, later = _powers(Abar, chunk), torch.arange(chunk, device=Abar.device)
        kernel = 2 * torch.einsum("dn,dnk->dk", C * Bbar, powers[..., :chunk]).real
        kernel = kernel + F.pad(self.D.to(kernel.dtype)[:, None], (0, chunk - 1))
        within = F.pad(kernel, (chunk, 0))[:, chunk + later - later[:, None]]
        after = 2 * C[..., None] * powers[..., 1:]
        into = (Bbar[..., None] * powers[..., :-1].flip(-1)).mT
        out = torch.cat([within, after.real, -after.imag], 1)
        return _Tables(chunk, powers, out, torch.cat([into.real, into.imag], 2))

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(y).to(x.dtype)), -1)

    def _state(self, x: Tensor, state: Tensor | None, rows: int) -> Tensor:
        if state is None:
            return self.init_state(rows)
        width, poles = self.A_im.shape
        check_tensors("s4d", x=(x, "* ..."), state=(state, f"{rows} {width} {poles}"))
        return state.to(self._complex())

    def _complex(self) -> torch.dtype:
        return torch.promote_types(wide(self.log_dt), torch.complex64)


def _exactly(device: str) -> AbstractContextManager[object]:
    """Matrix products in the dtype of their factors, autocast or not."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class _Tables(NamedTuple):
    """What a chunk of K tokens needs, per channel; N complex numbers are 2 N real ones, the real parts first."""

    chunk: int
    powers: Tensor  # (D, N, K + 1) complex, Abar^0 .. Abar^K
    out: Tensor  # (D, K + 2 N, K), from K tokens and the state before them to K outputs
    into: Tensor  # (D, K, 2 N), from K tokens to what they add to the state after them


def _powers(a: Tensor, last: int) -> Tensor:
    """``a^0 .. a^last`` on a new last axis, by doubling, so that rounding grows with the logarithm."""
    p = torch.stack([torch.ones_like(a), a], -1)
    while p.shape[-1] <= last:
        p = torch.cat([p, p[..., 1:] * p[..., -1:]], -1)
    return p[..., : last + 1]


def _outputs(x: Tensor, h: Tensor, out: Tensor) -> Tensor:
    """Chunks ``x`` ``(M, k, D)`` and the states before them ``h`` ``(M, D, N)`` -> ``(M, k, D)``."""
    k, chunk = x.shape[1], out.shape[2]
    table = out if k == chunk else torch.cat([out[:, :k, :k], out[:, chunk:, :k]], 1)
    before = h.transpose(0, 1)
    return torch.bmm(torch.cat([x.permute(2, 0, 1), before.real, before.imag], -1), table).permute(1, 2, 0)


def _added(x: Tensor, into: Tensor) -> Tensor:
    """What chunks ``x`` ``(M, k, D)`` add to the states after them, ``(M, D, N)`` complex."""
    k, chunk = x.shape[1], into.shape[1]
    re, im = torch.bmm(x.permute(2, 0, 1), into[:, chunk - k :]).chunk(2, -1)
    return torch.complex(re, im).transpose(0, 1)


def _whole(x: Tensor, h: Tensor, tables: _Tables) -> tuple[Tensor, Tensor]:
    """``x`` ``(B, T, D)`` from the states ``h`` ``(B, D, N)``: the full chunks, then the rest."""
    rows, length, width = x.shape
    chunk, powers, out, into = tables
    full = length // chunk
    grid = x[:, : full * chunk].reshape(rows * full, chunk, width)
    hs, last = linear_scan(powers[None, None, ..., chunk], _added(grid, into).unflatten(0, (rows, full)), h)
    before = torch.cat([h[:, None], hs], 1)[:, :full].flatten(0, 1)
    y = _outputs(grid, before, out).reshape(rows, full * chunk, width)
    rest = x[:, full * chunk :]
    if rest.shape[1] == 0:
        return y, last
    y = torch.cat([y, _outputs(rest, last, out)], 1)
    return y, powers[..., rest.shape[1]] * last + _added(rest, into)


def _packed(x: Tensor, borders: Tensor, h: Tensor, tables: _Tables) -> tuple[Tensor, Tensor]:
    """``x`` ``(total, D)``, n sequences end to end, from the states ``h`` ``(n, D, N)``.

    The full chunks of all sequences side by side, then the rests of all sequences, padded to a chunk.
    """
    chunk, powers, out, into = tables
    at = torch.arange(chunk, device=x.device)
    lengths = borders.diff()
    chunks, rest = from_lengths(lengths // chunk), (lengths % chunk)[:, None]
    full = int(chunks[-1])
    owner = sequence_ids(chunks, full)
    begin = borders[owner] + chunk * (torch.arange(full, device=x.device) - chunks[owner])
    token = begin[:, None] + at
    grid = x[token]
    hs, last = linear_scan(powers[None, None, ..., chunk], _added(grid, into)[None], h, cu_seqlens=chunks)
    first = chunks[:-1][chunks.diff() > 0]
    before = hs[0].roll(1, 0).index_put((first,), h[chunks.diff() > 0])
    y = _outputs(grid, before, out).flatten(0, 1)

    token_left, keep_left = borders[1:, None] - rest + at, at < rest
    left = torch.where(keep_left[..., None], x[token_left.clamp(max=len(x) - 1)], 0)
    right = torch.where((at >= chunk - rest)[..., None], x[(borders[1:, None] - chunk + at).clamp(min=0)], 0)
    y = torch.cat([y, _outputs(left, last, out)[keep_left]])
    order = torch.cat([token.flatten(), token_left[keep_left]]).argsort()
    decay = powers.permute(2, 0, 1)[rest[:, 0]]
    return y[order][None], decay * last + _added(right, into)
