"""Structured layers with a diagonal state matrix: S4D and DSS."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int, Real
from torch import Tensor

from dualform.core.discretize import held
from dualform.core.dplr import as_complex, as_real
from dualform.core.shapes import wide
from dualform.layers.chunked import CHUNK, Tables, Transition, toeplitz
from dualform.layers.mixer import check_intervals
from dualform.layers.spans import in_spans
from dualform.layers.structured import Structured
from dualform.ops.linear_scan import linear_scan
from dualform.ops.vandermonde import vandermonde_kernel


class Poles:
    """``h_t = a h_{t-1} + b u_t`` per channel and pole; a structured :class:`~dualform.layers.structured.System`.

    Args:
        log_a: ``(D, N)``, complex, which counts where steps are not all alike.
        a: ``(D, N)``, complex.
        b: ``(D, N)``, complex.
    """

    def __init__(self, log_a: Tensor, a: Tensor, b: Tensor):
        self.log_a, self.a, self.b = log_a, a, b

    def step(self, u: Tensor, h: Tensor, interval: Tensor | None = None) -> Tensor:
        """The next states: ``u`` ``(B, D)``, ``h`` ``(B, D, N)``, ``interval`` ``(B,)``."""
        if interval is None:
            return self.a * h + self.b * u[..., None]
        a, weight = held(self.log_a, interval[:, None, None])
        return a * h + weight * self.b * u[..., None]

    def tables(self, C: Tensor, D: Tensor, longest: int) -> Tables:
        """What a chunk of sequences up to ``longest`` needs, for the outputs ``2 Re(C h) + D u``."""
        chunk = min(CHUNK, longest)
        powers = _powers(self.a, chunk)
        kernel = 2 * torch.einsum("dn,dnk->dk", C * self.b, powers[..., :chunk]).real
        after = 2 * C[..., None] * powers[..., 1:]
        into = self.b[..., None] * powers[..., :-1].flip(-1)
        after, into = (torch.stack(m, 2).flatten(1, 2) for m in ((after.real, -after.imag), (into.real, into.imag)))
        return Tables(toeplitz(kernel + F.pad(D[:, None], (0, chunk - 1))), after, into.mT, Diagonal(powers))

    def kernel(self, C: Tensor, length: int) -> Tensor:
        """``2 Re(C a^l b)`` for ``l < length``, ``(D, length)``."""
        log_a = torch.complex(self.log_a.real.clamp_min(-300), self.log_a.imag)  # a may be zero
        return vandermonde_kernel(log_a, C * self.b, length)

    def irregular(
        self, u: Tensor, h: Tensor, borders: Tensor | None, C: Tensor, intervals: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``2 Re(C h)`` and the final states over ``intervals`` ``(B, T)``; states are held one span at a time."""

        def span(h: Tensor, cu_seqlens: Tensor | None, *parts: Tensor) -> tuple[Tensor, Tensor]:
            u, steps, log_a, b, C = parts
            a, weight = held(log_a, steps[..., None, None])
            hs, h = linear_scan(a, weight * b * u[..., None], h, cu_seqlens=cu_seqlens)
            return 2 * (C * hs).sum(-1).real, h

        weights = self.log_a, self.b, C
        return in_spans(span, h, (u, intervals), weights, width=self.log_a.numel(), cu_seqlens=borders)


class Diagonal(Transition):
    """Every pole by itself.

    Args:
        powers: ``(D, N, K + 1)``, complex, ``a^0 .. a^K``.
    """

    def __init__(self, powers: Tensor):
        self.powers = powers

    def scan(self, added: Tensor, h: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self.powers[None, None, ..., -1], as_complex(added).permute(1, 2, 0, 3)
        hs, last = linear_scan(a, b, h, cu_seqlens=cu_seqlens)
        if cu_seqlens is None:
            before = torch.cat([h[:, None], hs], 1)[:, :-1].flatten(0, 1)
        else:
            some = cu_seqlens.diff() > 0
            before = hs[0].roll(1, 0).index_put((cu_seqlens[:-1][some],), h[some])
        return as_real(before).transpose(0, 1), last

    def advance(self, h: Tensor, count: int | Tensor) -> Tensor:
        power = self.powers[..., count] if isinstance(count, int) else self.powers.permute(2, 0, 1)[count]
        return power * h


class DiagonalMixer(Structured):
    """A :class:`Structured` layer whose ``_system`` is :class:`Poles`.

    With ``intervals`` the parallel form is a scan from step to step: Abar spans the interval by its powers, and the
    input acts for as long.
    """

    continuous: ClassVar[bool] = True

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: Complex[Tensor, "rows D N"] | None = None,
        *,
        cu_seqlens: Int[Tensor, " n"] | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        """The parallel form. States are held once per chunk of 64 tokens, never for every token."""
        intervals = check_intervals(self._name, x, intervals, wide(self.log_dt))
        return self._forward((x,) if intervals is None else (x, intervals), state, cu_seqlens, rate)

    def step(
        self,
        x: Float[Tensor, "B D"],
        state: Complex[Tensor, "B D N"],
        interval: Real[Tensor, " B"] | None = None,
        *,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B D"], Complex[Tensor, "B D N"]]:
        """The recurrent form."""
        interval = check_intervals(self._name, x, interval, wide(self.log_dt))
        h, u = self._begin_step(x, state)
        return self._end_step(x, u, self._system(self._dt(rate)).step(u, h, interval))

    @abstractmethod
    def _system(self, dt: Tensor) -> Poles: ...

    def _run(
        self,
        system: Any,
        inputs: tuple[Tensor, ...],
        h: Tensor,
        borders: Tensor | None,
        output: tuple[Tensor, Tensor],
        finish: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        if len(inputs) == 1:
            return super()._run(system, inputs, h, borders, output, finish)
        (x, intervals), (C, D) = inputs, output
        u = x.to(wide(self.log_dt))
        s, h = system.irregular(u, h, borders, C, intervals)
        return finish(s + D * u), h


def _powers(a: Tensor, last: int) -> Tensor:
    """``a^0 .. a^last`` on a new last axis, by doubling, so that rounding grows with the logarithm."""
    p = torch.stack([torch.ones_like(a), a], -1)
    while p.shape[-1] <= last:
        p = torch.cat([p, p[..., 1:] * p[..., -1:]], -1)
    return p[..., : last + 1]
