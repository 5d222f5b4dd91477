"""The recurrence that S5 and LRU share: diagonal and complex, every input reaches every state."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.discretize import held
from dualform.layers.spans import in_spans
from dualform.ops.linear_scan import linear_scan


class Mimo(NamedTuple):
    """``h_t = a h_{t-1} + B u_t``, ``y_t = Re(C h_t)``; everything complex but u and y."""

    a: Tensor  # (N,)
    log_a: Tensor  # (N,), which counts where steps are not all alike
    B: Tensor  # (N, D)
    C: Tensor  # (D, N)

    def run(
        self, u: Tensor, h: Tensor, *, cu_seqlens: Tensor | None = None, intervals: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The parallel form: ``u`` ``(B, T, D)`` from the states ``h`` ``(rows, N)``.

        With ``intervals`` ``(B, T)`` the input at t is held over so many steps. Of a long sequence the states are
        held for one span at a time.
        """
        inputs, decay = ((u,), self.a) if intervals is None else ((u, intervals), self.log_a)
        weights = decay, self._into(), self._out()
        return in_spans(_span, h, inputs, weights, width=len(decay), cu_seqlens=cu_seqlens)

    def step(self, u: Tensor, h: Tensor, interval: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The recurrent form: ``u`` ``(B, D)``, ``h`` ``(B, N)``, ``interval`` ``(B,)``."""
        a, b = self.a, _complex(u @ self._into())
        if interval is not None:
            a, weight = held(self.log_a, interval[:, None])
            b = weight * b
        h = a * h + b
        return torch.view_as_real(h).flatten(-2) @ self._out(), h

    def _into(self) -> Tensor:
        """``(D, 2 N)`` real, so that ``u @ into`` is ``B u`` with real and imaginary parts side by side."""
        return torch.stack([self.B.real, self.B.imag], -1).transpose(0, 1).flatten(1)

    def _out(self) -> Tensor:
        """``(2 N, D)`` real: ``Re(C h) = Re(C) Re(h) - Im(C) Im(h)``."""
        return torch.stack([self.C.real, -self.C.imag], -1).flatten(1).T


def _span(h: Tensor, cu_seqlens: Tensor | None, u: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """One span; ``rest`` is the intervals where there are any, then a or its logarithm, ``into`` and ``out``."""
    *intervals, a, into, out = rest
    b = _complex(u @ into)
    if intervals:
        a, weight = held(a, intervals[0][..., None])
        b = weight * b
    hs, h = linear_scan(a.expand_as(b), b, h, cu_seqlens=cu_seqlens)
    return torch.view_as_real(hs).flatten(-2) @ out, h


def _complex(m: Tensor) -> Tensor:
    return torch.view_as_complex(m.unflatten(-1, (-1, 2)))
