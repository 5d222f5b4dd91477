"""Structured layers with a diagonal state matrix: S4D and DSS."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Complex, Float, Int, Real
from torch import Tensor

from dualform.core.discretize import held
from dualform.core.shapes import wide
from dualform.layers.mixer import check_intervals
from dualform.layers.spans import in_spans
from dualform.layers.structured import Structured
from dualform.ops.diagonal_ssm import diagonal_ssm
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

    def run(
        self, u: Tensor, h: Tensor, cu_seqlens: Tensor | None, C: Tensor, intervals: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``2 Re(C h)`` ``(B, T, D)`` and the final states ``(rows, D, N)``; ``intervals`` ``(B, T)``."""
        if intervals is not None:
            return self._irregular(u.to(h.real.dtype), h, cu_seqlens, C, intervals)
        b = _reached(self.b)
        y, last = diagonal_ssm(u, self.a, C * b, h / b, cu_seqlens=cu_seqlens)
        return y, last * b

    def kernel(self, C: Tensor, length: int) -> Tensor:
        """``2 Re(C a^l b)`` for ``l < length``, ``(D, length)``."""
        log_a = torch.complex(self.log_a.real.clamp_min(-300), self.log_a.imag)  # a may be zero
        return vandermonde_kernel(log_a, C * self.b, length)

    def _irregular(
        self, u: Tensor, h: Tensor, cu_seqlens: Tensor | None, C: Tensor, intervals: Tensor
    ) -> tuple[Tensor, Tensor]:
        """:meth:`run` as a scan from step to step; states are held one span at a time."""

        def span(h: Tensor, cu_seqlens: Tensor | None, *parts: Tensor) -> tuple[Tensor, Tensor]:
            u, steps, log_a, b, C = parts
            a, weight = held(log_a, steps[..., None, None])
            hs, h = linear_scan(a, weight * b * u[..., None], h, cu_seqlens=cu_seqlens)
            return 2 * (C * hs).sum(-1).real, h

        weights = self.log_a, self.b, C
        return in_spans(span, h, (u, intervals), weights, width=self.log_a.numel(), cu_seqlens=cu_seqlens)


def _reached(b: Tensor) -> Tensor:
    """``b``, but small where it vanishes beside the other modes of its channel: states are divided by it."""
    size, info = b.detach().abs(), torch.finfo(b.dtype)
    least = (info.eps * size.amax(-1, keepdim=True)).clamp_min(info.tiny**0.5)
    return b + 2 * least * (size < least)


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
        """The parallel form. States are never held for every token."""
        intervals = check_intervals(self._name, x, intervals, wide(self.log_dt))
        return self._forward(x, state, cu_seqlens, rate, *(() if intervals is None else (intervals,)))

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
