"""Filters that hold many states of a nonlinear model in place of a mean and a covariance: what they share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import symmetric_part
from dualform.core.shapes import check_tensors
from dualform.core.tree import state_class, tree_map
from dualform.gaussian.arrays import Door, lengths_of, refuse_infinite
from dualform.gaussian.initial import initial
from dualform.gaussian.linearization import At, Rowwise, root_of
from dualform.gaussian.nonlinear import NonlinearGaussian
from dualform.gaussian.recurrent import Estimate
from dualform.gaussian.steps import ended, noise_of_seen


@state_class
class Particles(NamedTuple):
    """The state of a filter of many states: K of them with their weights, and how many steps led to them."""

    x: Tensor  # (B, K, N)
    log_weights: Tensor  # (B, K), whose exponentials have the sum 1; equal ones in an ensemble
    steps: Tensor  # (B,), int64


class Sampled(NamedTuple):
    """Estimated moments of ``p(h_t | y_1 .. y_t)``, and of the likelihood.

    ``effective`` is how many states of equal weight would be as good, ``1 / sum of w^2``: K where all weigh the same.
    """

    mean: Any  # (..., T, N)
    cov: Any  # (..., T, N, N)
    log_likelihood: Any  # (...)
    loglik: Any  # (..., T), the terms of it
    effective: Any  # (..., T)
    state: Particles  # after the last observation, one row per series


class Known(NamedTuple):
    """What a step is given: observations, which of them there are, and the noise of the model."""

    y: Tensor  # (B, M), zero where missing
    seen: Tensor  # (B, M), bool
    Q: Tensor  # (N, N)
    R: Tensor  # (B, M, M), rows and columns of the identity where missing
    generator: torch.Generator | None


@explained
class SampledFilter(nn.Module):
    """The filters of :class:`~dualform.gaussian.ensemble.EnsembleFilter` and its sibling, over series and in steps."""

    def __init__(self, model: NonlinearGaussian, size: int):
        super().__init__()
        where = type(self).__name__
        if not isinstance(model, NonlinearGaussian):
            hint = "the Kalman filter of a linear model is exact" if hasattr(model, "A") else ""
            raise ArgumentError(f"{where}: model is {type(model).__name__}, expected a NonlinearGaussian", hint=hint)
        if isinstance(size, bool) or size < 2:
            raise ArgumentError(f"{where}: size is {size}, expected 2 states or more")
        self.model, self.size = model, size

    def init_state(self, batch: int, *, generator: torch.Generator | None = None) -> Particles:
        """States drawn from the prior, for each row.

        Args:
            batch: B.
            generator: source of randomness, on the model's device.
        """
        prior = initial(f"{type(self).__name__}.init_state", self.model, (batch,))
        x = prior.mean[:, None] + drawn(prior.cov, (batch, self.size), generator)
        return Particles(x, torch.full_like(x[..., 0], 1 / self.size).log(), prior.steps)

    def step(
        self, y: Tensor, state: Particles, *, u: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Estimate, Particles]:
        """One observation ``(B, M)``: a transition, then the update. With one generator, a series in steps is the same.

        Args:
            y: NaN is missing.
            state: B rows.
            u: inputs ``(B, U)``.
            generator: source of randomness, on the model's device.

        Raises:
            ArgumentError: as :meth:`filter`.
        """
        where = f"{type(self).__name__}.step"
        check_tensors(where, y=(y, f"B {self.model.d_obs}"), model=(self.model.Q, "..."))
        refuse_infinite(where, "y", y)
        state = self._checked(where, state, len(y), torch.promote_types(y.dtype, self.model.Q.dtype))
        prior = initial(where, self.model, (len(y),))
        u = self.model._check_inputs(where, u, y.shape[:1], prior)
        loglik, state = self._observe(where, None, state, u, self._known(y, state, generator))
        return Estimate(*moments_of(state, self._correction), loglik), state

    def filter(
        self,
        y: Any,
        state: Particles | None = None,
        *,
        u: Any = None,
        lengths: Any = None,
        generator: torch.Generator | None = None,
    ) -> Sampled:
        """Filter one series or a batch.

        Args:
            y: as in :meth:`~dualform.gaussian.series.Series.filter`.
            state: before the first observation, one row per series; None draws from the prior.
            u: inputs ``(*batch, T, U)``, of a model with a function of u.
            lengths: how many steps each series of a batch has ``(*batch,)``; results after them are NaN.
            generator: source of randomness, on the model's device; the same seed gives the same result.

        Returns:
            With the axes of ``y``, and of its kind, but for the state.

        Raises:
            ArgumentError: for shapes that do not fit, and an observation that is infinite or that no state explains.
        """
        where, model = f"{type(self).__name__}.filter", self.model
        door = Door(where, y, model.Q, model.d_obs)
        full = tuple(door.y.shape[:-2])
        x = door.rows
        rows, length = x.shape[:2]
        prior = initial(where, model, full)
        u = model._inputs(where, u, full, length, prior)
        now = self.init_state(rows, generator=generator) if state is None else state
        now = self._checked(where, now, rows, x.dtype)
        if lengths is not None:
            lengths = lengths_of(where, lengths, full, length, x.device)
            gone = torch.arange(length, device=x.device) >= lengths[:, None]
            x = x.masked_fill(gone[..., None], torch.nan)
        found = []
        for t in range(length):
            known = self._known(x[:, t], now, generator)
            loglik, after = self._observe(where, t, now, None if u is None else u[:, t], known)
            found.append((*moments_of(after, self._correction), loglik, 1 / (2 * after.log_weights).exp().sum(-1)))
            now = after if lengths is None else _where(t < lengths, after, now)
        if found:
            parts = [torch.stack(part, 1) for part in zip(*found, strict=True)]
        else:
            x, none = now.x[:, :0], now.log_weights[:, :0]
            parts = [x, x.unsqueeze(-1) * x.unsqueeze(-2), none, none]
        if lengths is not None:
            parts = ended(parts, lengths)
        mean, cov, loglik, effective = parts
        total = loglik.nan_to_num().sum(-1) if lengths is not None else loglik.sum(-1)
        made = (z.reshape((*full, *z.shape[1:])) for z in (mean, cov, total, loglik, effective))
        return Sampled(*door.out(*made, timed=True), state=now)

    def log_likelihood(
        self,
        y: Any,
        state: Particles | None = None,
        *,
        u: Any = None,
        lengths: Any = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """An estimate of ``log p(y_1 .. y_T)`` ``(*batch,)``; arguments and errors are those of :meth:`filter`."""
        found = self.filter(y, state, u=u, lengths=lengths, generator=generator).log_likelihood
        return torch.as_tensor(found, device=self.model.Q.device)

    # What a filter says.

    @property
    def _correction(self) -> float:
        """What its covariance is multiplied by."""
        return 1.0

    def _observe(
        self, where: str, time: int | None, state: Particles, u: Tensor | None, known: Known
    ) -> tuple[Tensor, Particles]:
        """A transition and an observation: its log-likelihood ``(B,)``, and the states after it."""
        raise NotImplementedError

    # What the filters share.

    def _checked(self, where: str, state: Particles, rows: int, dtype: torch.dtype) -> Particles:
        sizes = f"{rows} {self.size}"
        wanted = {
            "state.x": (state.x, f"{sizes} {self.model.d_state}"),
            "state.log_weights": (state.log_weights, sizes),
        }
        check_tensors(where, model=(self.model.Q, "..."), **wanted, **{"state.steps": (state.steps, f"{rows}")})
        return Particles(state.x.to(dtype), state.log_weights.to(dtype), state.steps)

    def _known(self, y: Tensor, state: Particles, generator: torch.Generator | None) -> Known:
        dtype, seen = state.x.dtype, ~y.isnan()
        Q, R = (symmetric_part(cov.to(dtype)) for cov in (self.model.Q, self.model.R))
        return Known(torch.where(seen, y, 0).to(dtype), seen, Q, noise_of_seen(R, seen), generator)

    def _led(self, state: Particles, u: Tensor | None, Q: Tensor) -> tuple[Tensor, Tensor]:
        """``f`` of every state ``(B, K, N)``, and the roots of the noise that comes on top, for each row."""
        unit, scale = root_of(Q)
        noise = (unit * scale).expand(len(state.x), *Q.shape)
        moved = self._of(self.model._f, state.x, At(u, state.steps))
        still = (state.steps == 0)[:, None, None]
        if self.model.prior == "before" or not still.any():
            return moved, noise
        return torch.where(still, state.x, moved), torch.where(still, 0, noise)

    def _seen(self, x: Tensor, u: Tensor | None, steps: Tensor) -> Tensor:
        """``h`` of states ``(B, K, N)`` that have made so many transitions."""
        return self._of(self.model._h, x, At(u, (steps - 1).clamp_min(0)))

    def _of(self, g: Rowwise, x: Tensor, at: At) -> Tensor:
        return g(x.flatten(0, 1), at.repeat(x.shape[1])).unflatten(0, x.shape[:2])


def moments_of(state: Particles, correction: float) -> tuple[Tensor, Tensor]:
    """The weighted mean ``(B, N)``, and ``correction`` times the weighted covariance ``(B, N, N)``."""
    w = state.log_weights.exp().unsqueeze(-1)
    mean = (w * state.x).sum(1)
    away = state.x - mean.unsqueeze(1)
    return mean, (w * away).mT @ away * correction


def drawn(cov: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Draws of the given shape from ``N(0, cov)`` ``(*shape, N)``, with gradients to the covariance."""
    unit, scale = root_of(cov)
    values = torch.randn(*shape, cov.shape[-1], generator=generator, dtype=cov.dtype, device=cov.device)
    return values @ (unit * scale.unsqueeze(-2)).mT


def _where(rows: Tensor, new: Particles, old: Particles) -> Particles:
    return tree_map(lambda a, b: torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b), new, old)
