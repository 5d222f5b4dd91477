"""The past of a signal in a few numbers: HiPPO's online projection, and the signal read back from it.

The signal is taken to be constant during a step: it equals sample k on ``[k dt, (k+1) dt)``. For such a signal the
updates are exact in every measure, so that the result does not depend on how the samples are divided among calls.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.discretize import discretize_dense
from dualform.core.errors import ArgumentError
from dualform.core.hippo import transition
from dualform.core.linalg import as_tensors, check_finite, orbit
from dualform.core.shapes import check_tensors

_SPAN = 1024  # samples whose basis functions are in memory at once


@explained
class Memory:
    """The coefficients of a signal's past in the basis of a HiPPO measure, updated sample by sample.

    ``legs`` remembers everything since the first sample, all of it with the same weight: its state obeys
    ``c'(t) = (A c(t) + B u(t)) / t``, solved exactly for an input that is constant during a step. It is the orthogonal
    projection on Legendre polynomials over ``[0, t]``, and needs no time scale. The other measures slide along the
    signal: ``c' = A c + B u`` in the time scale of ``window``, discretised by a zero-order hold.

        legs                   polynomials on everything since the first sample
        legt, lmu              polynomials on the last ``window`` of time
        fout, fourier2         sines and cosines on the last ``window`` of time
        lagt                   Laguerre functions of the age over ``window``: all ages, recent ones best
        tlagt, glagt           Laguerre polynomials, in a weight fading as ``exp(-beta age / window)``

    Before its first sample a signal counts as zero. With a window of finite length, the equation needs the value that
    leaves the window, and takes it from the reconstruction; so these memories are projections only approximately.

    Args:
        measure: one of the names above.
        order: number of coefficients N.
        window: length of the window, or time constant, in the unit of ``dt``; None for ``legs``.
        dt: time between samples.

    Attributes:
        coefficients: ``(*channels, N)``, float64.
        samples: number of samples so far; the present is the time ``samples * dt``.

    Raises:
        ArgumentError: for an unknown measure, listing those that exist; a size that does not fit; a window or a step
            that is missing, not asked for, or not positive.

    References:
        Gu, Dao, Ermon, Rudra and Re (2020), "HiPPO: recurrent memory with optimal polynomial projections",
        arXiv:2008.07669, Theorems 1 and 2, equations (1) to (4), where equation (4) is the update by Euler's rule.

    Example:
        >>> memory = Memory("legs", 16)
        >>> _ = memory.extend(torch.linspace(0, 6, 500).sin())
        >>> round(memory.reconstruct([249.5]).item(), 3)  # the middle of sample 249
        0.147
    """

    def __init__(self, measure: str, order: int, *, window: float | None = None, dt: float = 1.0):
        if measure not in _BASES:
            raise ArgumentError(f"Memory: measure {measure!r} is unknown", hint=f"one of {', '.join(_BASES)}")
        A, B = transition(measure, order)
        if (window is None) != (measure == "legs"):
            what = "takes no window" if window is not None else "needs a window"
            raise ArgumentError(
                f"Memory: measure {measure!r} {what}", hint="legs remembers everything, others the last window"
            )
        for name, value in (("window", 1.0 if window is None else window), ("dt", dt)):
            if not 0 < value < math.inf:
                raise ArgumentError(f"Memory: {name} is {value:g}, expected a positive time")
        self.measure, self.order, self.window, self.dt = measure, order, window, float(dt)
        self.samples = 0
        self.coefficients = torch.zeros(order, dtype=torch.float64)
        self._basis = _BASES[measure]
        self._A, self._B = A, B[:, None]
        if window is not None:
            rate = self._basis.scale / window
            self._A, self._B = discretize_dense(rate * self._A, rate * self._B, dt)

    def update(self, u_t: Any) -> Tensor:
        """One more sample, ``(*channels,)`` or a number -> the coefficients.

        Raises:
            ArgumentError: for channels other than those of the samples before, or a value that is not finite, since
                it would stay in the coefficients for ever.
        """
        u = self._signal("Memory.update", "u_t", u_t, one=True)
        if self.window is not None or not self.samples:
            return self._take(u)
        # A constant is its own projection: subtract the sample, age the rest, and add the sample again.
        constant = torch.nn.functional.pad(u[0][..., None], (0, self.order - 1))
        self.coefficients = constant + self._age(self.coefficients - constant)
        self.samples += 1
        return self.coefficients

    def extend(self, u: Any) -> Tensor:
        """Many more samples at once, ``(T, *channels)`` -> the coefficients after the last.

        The same as T updates, in time ``O(T N)``.

        Raises:
            ArgumentError: as :meth:`update`.
        """
        return self._take(self._signal("Memory.extend", "u", u))

    def _take(self, u: Tensor) -> Tensor:
        if len(u) == 0:
            return self.coefficients
        if not self.samples:
            self.coefficients = u.new_zeros(*u.shape[1:], self.order)
        self.coefficients = self._project(u) if self.window is None else self._slide(u)
        self.samples += len(u)
        return self.coefficients

    def reconstruct(self, times: Any) -> Tensor:
        """The signal as it is remembered, at some times, ``(len(times), *channels)``.

        Args:
            times: ``(n,)``, from the first sample or the beginning of the window, :attr:`start`, to the present,
                ``samples * dt``. The middle of sample k is ``(k + 1/2) dt``.

        Raises:
            ArgumentError: for times outside of what is remembered, or as long as there are fewer samples than
                coefficients.
        """
        times = as_tensors("Memory.reconstruct", c=self.coefficients, times=times)["times"]
        check_tensors("Memory.reconstruct", times=(times, "n"))
        if self.samples < self.order:
            raise ArgumentError(
                f"Memory.reconstruct: the signal so far has {self.samples} samples, fewer than the {self.order} "
                f"coefficients",
                hint="give more of the signal first, or take a smaller order",
            )
        now, slack = self.samples * self.dt, 1e-9 * self.dt
        if len(times) and not (self.start - slack <= float(times.min()) and float(times.max()) <= now + slack):
            raise ArgumentError(
                f"Memory.reconstruct: times from {float(times.min()):g} to {float(times.max()):g}, but the memory "
                f"reaches from {self.start:g} to {now:g}"
            )
        place = times / now if self.window is None else (now - times).clamp_min(0) / self.window
        return torch.movedim(self.coefficients @ self._basis.functions(place, self.order).mT, -1, 0)

    @property
    def start(self) -> float:
        """The earliest time that is remembered."""
        if self.window is None or not self._basis.finite:
            return 0.0
        return max(0.0, self.samples * self.dt - self.window)

    def error(self, u: Any) -> float:
        """The relative error of the reconstruction, in the norm of the measure.

            sqrt(sum_k w_k |u_k - reconstruction at the middle of sample k|^2 / sum_k w_k |u_k|^2)

        over the samples that are remembered and all channels; the weight w is 1, but for ``tlagt`` and ``glagt``,
        whose weight fades with age.

        Args:
            u: ``(T, *channels)``, the last T samples of the signal; those of them outside of the window do not count.

        Raises:
            ArgumentError: for more samples than were seen, other channels, values that are not finite, or fewer samples
                than coefficients.
        """
        u = as_tensors("Memory.error", c=self.coefficients, u=u)["u"]
        check_finite("Memory.error", {"u": u})
        if u.dim() == 0 or len(u) > self.samples or u.shape[1:] != self.coefficients.shape[:-1]:
            want = f"at most {self.samples} samples of shape {tuple(self.coefficients.shape[:-1])}"
            raise ArgumentError(f"Memory.error: u has shape {tuple(u.shape)}, expected {want}")
        times = self._middles(self.samples - len(u))
        inside = times >= self.start
        u, times = u[inside], times[inside]
        ages = (self.samples * self.dt - times) / (self.window or math.inf)
        weight = torch.exp(-self._basis.fade * ages)
        lost, whole = (v.reshape(len(v), -1).square().sum(1) @ weight for v in (u - self.reconstruct(times), u))
        return math.sqrt(float(lost) / max(float(whole), 1e-300))

    def _signal(self, where: str, name: str, given: Any, *, one: bool = False) -> Tensor:
        """Samples as a float64 tensor with time first, checked; ``one`` sample comes without the axis of time."""
        u = as_tensors(where, **{name: given})[name].to(torch.float64)
        check_finite(where, {name: u}, hint="interpolate what is missing, or leave it out")
        u = u[None] if one else u
        channels = tuple(self.coefficients.shape[:-1])
        if u.dim() == 0:
            raise ArgumentError("Memory: the signal is a number, expected an array with time first")
        if self.samples and u.shape[1:] != channels:
            raise ArgumentError(f"Memory: the samples have shape {tuple(u.shape[1:])}, those before had {channels}")
        return u

    def _age(self, c: Tensor) -> Tensor:
        """LegS, one step without input: ``exp(A log((k + 1) / k)) c``."""
        k = self.samples
        if k < self.order**2:
            return c @ _squeeze(k / (k + 1), self.order).mT.to(c.device)
        # |A| < N^2, so that 16 terms of the exponential series reach the last digit.
        A = self._A.mT.to(c.device) * math.log1p(1 / k)
        term = c
        for power in range(1, 17):
            term = term @ A / power
            c = c + term
        return c

    def _middles(self, first: int) -> Tensor:
        count = torch.arange(first, self.samples, dtype=torch.float64, device=self.coefficients.device)
        return (count + 0.5) * self.dt

    def _project(self, u: Tensor) -> Tensor:
        """LegS: what was known, squeezed into the first part of the longer interval, plus the new samples."""
        total = self.samples + len(u)
        result = self.coefficients @ _squeeze(self.samples / total, self.order).mT.to(u.device)
        for first in range(0, len(u), _SPAN):
            span = u[first : first + _SPAN]
            edges = torch.arange(len(span) + 1, dtype=torch.float64, device=u.device) + (self.samples + first)
            integrals = _legendre_integrals(edges / total, self.order).diff(dim=0)
            result = result + torch.einsum("t...,tn->...n", span, integrals)
        return result

    def _slide(self, u: Tensor) -> Tensor:
        A, B = self._A.to(u.device), self._B.to(u.device)
        size = min(_SPAN, len(u))
        responses = orbit(A, B, size)[..., 0]
        result = self.coefficients
        for span in u.split(size):
            power = torch.linalg.matrix_power(A, len(span))
            driven = torch.einsum("t...,tn->...n", span, responses[: len(span)].flip(0))
            result = result @ power.mT + driven
        return result


class Snapshot(NamedTuple):
    """What a memory holds at one moment, for a picture."""

    time: float  # the moment
    times: Tensor  # (points,), middles of samples within the memory
    signal: Tensor  # (points, *channels), what was there
    reconstruction: Tensor  # (points, *channels), what is remembered
    error: float  # relative, over all samples within the memory


def snapshots(memory: Memory, u: Any, at: Sequence[int], *, points: int = 1000) -> list[Snapshot]:
    """What a fresh memory holds as a signal passes: the reconstruction after each of some numbers of samples.

    Args:
        memory: a memory without samples, which the signal is given to.
        u: the signal, ``(T, *channels)``.
        at: numbers of samples, ascending, from the order of the memory to T.
        points: at most so many points per snapshot.

    Raises:
        ArgumentError: for a memory that holds samples already, or moments that do not fit.
    """
    u = as_tensors("snapshots", u=u)["u"].to(torch.float64)
    if memory.samples:
        raise ArgumentError(f"snapshots: the memory has seen {memory.samples} samples, expected a fresh one")
    if not at or list(at) != sorted(set(at)) or at[0] < memory.order or at[-1] > len(u):
        raise ArgumentError(
            f"snapshots: at is {list(at)}, expected ascending numbers of samples from {memory.order}, the order, to "
            f"{len(u)}, the length of the signal"
        )
    shots = []
    for moment in at:
        memory.extend(u[memory.samples : moment])
        first = math.ceil(memory.start / memory.dt - 0.5)
        index = torch.linspace(first, moment - 1, min(points, moment - first), dtype=torch.float64).round().long()
        times = (index + 0.5) * memory.dt
        error = memory.error(u[:moment])
        shots.append(Snapshot(moment * memory.dt, times, u[index], memory.reconstruct(times), error))
    return shots


class _Basis(NamedTuple):
    """How the past is read back: ``u(t - s) = sum_n c_n phi_n(s / window)``; for ``legs``, ``phi_n(t / now)``."""

    functions: Callable[[Tensor, int], Tensor]  # (n,), N -> (n, N)
    scale: float = 1.0  # the window of the matrices of dualform.core.hippo
    finite: bool = True  # whether the window has an end
    fade: float = 0.0  # the weight of age s is exp(-fade s / window)


def _legendre(x: Tensor, count: int) -> Tensor:
    """``P_0 .. P_{count-1}`` of ``2 x - 1``, ``(n, count)``."""
    s = 2 * x - 1
    rows = [torch.ones_like(s), s]
    for n in range(1, count - 1):
        rows.append(((2 * n + 1) * s * rows[n] - n * rows[n - 1]) / (n + 1))
    return torch.stack(rows[:count], -1)


def _norms(count: int, x: Tensor) -> Tensor:
    return (2 * torch.arange(count, dtype=x.dtype, device=x.device) + 1).sqrt()


def _legendre_orthonormal(x: Tensor, count: int) -> Tensor:
    return _legendre(x, count) * _norms(count, x)


def _legendre_integrals(x: Tensor, count: int) -> Tensor:
    """The integrals from 0 to x of the orthonormal Legendre polynomials, ``(P_{n+1} - P_{n-1}) / (2 sqrt(2n+1))``."""
    P = _legendre(x, count + 1)
    before = torch.cat([-torch.ones_like(P[:, :1]), P[:, : count - 1]], 1)
    return (P[:, 1:] - before) / (2 * _norms(count, x))


def _squeeze(ratio: float, count: int) -> Tensor:
    """Coefficients on [0, 1] of a polynomial that is squeezed into [0, ratio], zero beyond: exact by Gauss' rule."""
    nodes, weighted = _gauss(count)
    return ratio * _legendre_orthonormal(ratio * nodes, count).mT @ weighted


@lru_cache(maxsize=32)
def _gauss(count: int) -> tuple[Tensor, Tensor]:
    """The nodes ``(count,)`` of Gauss' rule on [0, 1], and its weights times the basis at the nodes."""
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(count))
    nodes = (nodes + 1) / 2
    return nodes, weights[:, None] / 2 * _legendre_orthonormal(nodes, count)


def _fourier(x: Tensor, count: int) -> Tensor:
    angle = 2 * math.pi * x[:, None] * torch.arange(count // 2, dtype=x.dtype, device=x.device)
    waves = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1).flatten(1)
    return torch.cat([torch.ones_like(waves[:, :1]), waves[:, 1:]], 1)


def _laguerre(decay: float, height: float = 1.0) -> Callable[[Tensor, int], Tensor]:
    """``height L_n(s) exp(-decay s)``; the recurrence runs on the decaying functions, which do not overflow."""

    def functions(s: Tensor, count: int) -> Tensor:
        first = height * torch.exp(-decay * s)
        rows = [first, (1 - s) * first]
        for n in range(1, count - 1):
            rows.append(((2 * n + 1 - s) * rows[n] - n * rows[n - 1]) / (n + 1))
        return torch.stack(rows[:count], -1)

    return functions


_GLAGT_BETA = 0.01  # the default of dualform.core.hippo.glagt

_BASES: dict[str, _Basis] = {
    "legs": _Basis(_legendre_orthonormal),
    "legt": _Basis(lambda s, count: _legendre_orthonormal(1 - s, count), scale=2.0),
    "lmu": _Basis(_legendre),
    "fout": _Basis(_fourier, scale=2.0),
    "fourier2": _Basis(_fourier),
    "lagt": _Basis(_laguerre(0.5), finite=False),
    "tlagt": _Basis(_laguerre(0.0), finite=False, fade=1.0),
    "glagt": _Basis(_laguerre((1 - _GLAGT_BETA) / 2, _GLAGT_BETA**-0.5), finite=False, fade=_GLAGT_BETA),
}
