"""Structural time series models: sums of components, which are blocks of a state space model."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.shapes import broadcast
from dualform.gaussian.arrays import Door
from dualform.gaussian.built import Built
from dualform.gaussian.constraints import kind
from dualform.gaussian.model import LinearGaussian


class Effect(NamedTuple):
    """A component of a series given all observations: its mean and variance at every step."""

    mean: Any  # (..., T)
    var: Any  # (..., T)


class Block(NamedTuple):
    """A component's part of a model."""

    A: Tensor  # (*batch, n, n)
    C: Tensor  # (n,), or (T, n) where it varies in time
    Q: Tensor  # (*batch, n, n)
    diffuse: list[bool]  # (n,), which of the states have no stationary distribution
    R: Tensor | None = None  # (*batch,), of a component without states
    d: Tensor | None = None  # (*batch, T), of one that is an effect without states


class Component(nn.Module):
    """A summand of a series; ``+`` makes a model of several, a :class:`~dualform.gaussian.structural.Structural`."""

    name = "component"

    def block(self) -> Block:
        """Its part of the model, of the values that its parameters have now.

        Raises:
            NotImplementedError: for the base class.
        """
        raise NotImplementedError

    def begin(self, y: Tensor, scale: Tensor) -> None:
        """Set estimated parameters to where an optimiser may begin.

        Args:
            y: the series ``(T, 1)``, or ``(R, T, 1)`` for parameters of so many rows.
            scale: the variance of its changes, of each.
        """
        for name, share in self.shares.items():
            if name in getattr(self, "parametrizations", {}):
                old: Tensor = getattr(self, name)
                size = scale.reshape((*scale.shape, *[1] * (old.dim() - scale.dim())))
                setattr(self, name, (share * size).expand_as(old))

    @property
    def shares(self) -> dict[str, float]:
        """Where its variances begin, relative to that of the changes of the series."""
        return {"variance": 0.1}

    @property
    def length(self) -> int | None:
        """How many steps it has, of one whose covariates are given; None for any number."""
        return None

    def __add__(self, other: Any) -> "Structural":
        return Structural(self) + other

    def __radd__(self, other: Any) -> "Structural":
        return Structural(self) if isinstance(other, int) and other == 0 else NotImplemented  # sum([...]) begins with 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Structural, name):
                raise
            me = kind(self)
            error = ArgumentError(
                f"{me} is a component of a model, which has no {name!r} by itself",
                hint=f"{me}(...) + Irregular() is a model; Structural({me}(...)) is one of this component alone",
            )
        raise AttributeError(str(error))


@explained
class Structural(Built):
    """A series as a sum of components, a linear-Gaussian model.

        y_t = component_1 + component_2 + ...

    ``Level() + Seasonal(12) + Irregular()`` makes one. Non-stationary components start exactly diffuse at the first
    observation, stationary ones from their own distribution. The likelihood's convention is that of Durbin and Koopman
    and of statsmodels with an exact diffuse start.

    Args:
        parts: the components; two of the same kind are numbered: ``cycle``, ``cycle_2``.

    Raises:
        ArgumentError: for no component, something else than components, and covariates of different lengths.

    Example:
        >>> from dualform.gaussian import Irregular, Level
        >>> model = Level(variance=1469.1) + Irregular(variance=15099.0)
        >>> model.log_likelihood([1120.0, 1160.0, 963.0]).shape
        torch.Size([])

    References:
        Harvey (1989), "Forecasting, structural time series models and the Kalman filter".
    """

    begins_at_once = True

    def __init__(self, *parts: Component):
        super().__init__()
        if not parts:
            raise ArgumentError("Structural: no components, expected one or more", hint="such as Level() + Irregular()")
        self.parts = nn.ModuleDict()
        for part in parts:
            if not isinstance(part, Component):
                raise ArgumentError(f"Structural: {type(part).__name__} is not a component")
            name, count = part.name, 1
            while name in self.parts:
                count += 1
                name = f"{part.name}_{count}"
            self.parts[name] = part
        lengths = {part.length for part in parts} - {None}
        if len(lengths) > 1:
            raise ArgumentError(
                f"Structural: covariates of {sorted(map(int, filter(None, lengths)))} steps, expected as many for all"
            )

    def __add__(self, other: Any) -> "Structural":
        if not isinstance(other, Component | Structural):
            return NotImplemented
        more = list(other.parts.values()) if isinstance(other, Structural) else [other]
        return Structural(*(part for part in (*self.parts.values(), *more) if isinstance(part, Component)))

    def _blocks(self) -> dict[str, Any]:
        return {name: part.block() for name, part in self.parts.items() if isinstance(part, Component)}

    def build(self) -> LinearGaussian:
        """The linear-Gaussian model of the values that the parameters have now."""
        blocks = list(self._blocks().values())
        A = diagonal([block.A for block in blocks])
        if not A.shape[-1]:  # noise alone: a state that does nothing
            A = A.new_zeros(1, 1)
        n, moving = A.shape[-1], max((len(b.C) if b.C.dim() == 2 else 0 for b in blocks), default=0)
        see = [b.C if b.C.dim() == 2 or not moving else b.C.expand(moving, -1) for b in blocks]
        C = torch.cat(see, -1).unsqueeze(-2)
        C = C if C.shape[-1] else C.new_zeros(*C.shape[:-1], n)
        Q = diagonal([block.Q for block in blocks])
        Q = Q if Q.shape[-1] else A.new_zeros(1, 1)
        noises = [A.new_zeros(()), *(b.R for b in blocks if b.R is not None)]
        R = torch.stack(torch.broadcast_tensors(*noises)).sum(0)
        effects = [b.d for b in blocks if b.d is not None]
        diffuse = [flag for block in blocks for flag in block.diffuse] or [False]
        start: Any = "diffuse" if all(diffuse) else "stationary"
        terms: dict[str, Any] = {"time_varying": (*("C" if moving else ""), *("d" if effects else ""))}
        if effects:
            terms["d"] = torch.stack(effects).sum(0).unsqueeze(-1)
        if any(diffuse) and not all(diffuse):
            terms["diffuse"] = diffuse
        return LinearGaussian(A, C, Q, R[..., None, None], P0=start, prior="first", **terms)

    def _begin(self, y: Any) -> None:
        """Set the estimated variances to shares of the variance of the changes of y, those of each row by itself."""
        values = Door("begin", y, next(iter((*self.parameters(), *self.buffers()))), 1).y
        if values.isnan().any():
            rows = values.flatten(0, -3) if values.dim() > 2 else values[None]
            scale = torch.stack([_variance(row[~row.isnan()]) for row in rows]).reshape(values.shape[:-2])
        else:
            scale = _variance(values[..., 0])
        for part in self.parts.values():
            if isinstance(part, Component):
                part.begin(values, torch.where(scale > 0, scale, 1))

    @torch.no_grad()
    def components(self, y: Any, **options: Any) -> dict[str, Effect]:
        """Each component given all observations, by its name; of the kind of y; no gradients.

        They sum to the observations, where those are not missing. The irregular one is what the others leave.

        Args:
            y: as in :meth:`~dualform.gaussian.series.Series.smooth`.
            options: as there.

        Raises:
            ArgumentError: as there, and where no component has a state.
        """
        model, blocks = self.build(), self._blocks()
        door = Door(f"{kind(self)}.components", y, model.A, 1)
        smooth = model.smooth(door.y, **options)
        length, at, found = door.y.shape[-2], 0, {}
        signal = torch.zeros_like(smooth.mean[..., 0])
        for name, block in blocks.items():
            n = block.C.shape[-1]
            C = block.C[:length] if block.C.dim() == 2 else block.C
            if n:
                mean = (smooth.mean[..., at : at + n] * C).sum(-1)
                var = (smooth.cov[..., at : at + n, at : at + n] * C.unsqueeze(-2)).sum(-1).mul(C).sum(-1)
                found[name] = mean, var
            elif block.d is not None:
                found[name] = block.d[..., :length].expand_as(signal), torch.zeros_like(signal)
            else:
                continue
            signal = signal + found[name][0]
            at += n
        total = model.C[..., 0, :] if "C" not in model.time_varying else model.C[:length, 0]
        spread = (smooth.cov * total.unsqueeze(-2)).sum(-1).mul(total).sum(-1)
        noises = [name for name, block in blocks.items() if block.R is not None]
        if len(noises) == 1:
            seen = ~door.y[..., 0].isnan()
            R = torch.as_tensor(blocks[noises[0]].R).unsqueeze(-1)
            found[noises[0]] = torch.where(seen, door.y[..., 0] - signal, 0), torch.where(seen, spread, R)
        return {name: Effect(*door.out(*found[name])) for name in blocks if name in found}


def diagonal(blocks: list[Tensor]) -> Tensor:
    """A block-diagonal matrix of blocks ``(*batch, n, n)``."""
    batch = broadcast(*(block.shape[:-2] for block in blocks))
    n, at, rows = sum(block.shape[-1] for block in blocks), 0, []
    for block in blocks:
        size = block.shape[-1]
        rows.append(nn.functional.pad(block.expand(*batch, size, size), (at, n - at - size)))
        at += size
    return torch.cat(rows, -2)


def companion(coefficients: Tensor) -> Tensor:
    """The transition ``(*batch, p M, p M)`` of an autoregression ``(*batch, p, M, M)``, the newest values first."""
    p, M = coefficients.shape[-3:-1]
    top = coefficients.movedim(-3, -2).flatten(-2)
    below = torch.eye(p * M, dtype=top.dtype, device=top.device)[: (p - 1) * M]
    return torch.cat([top, below.expand(*top.shape[:-2], *below.shape)], -2)


def _variance(y: Tensor) -> Tensor:
    """That of the changes of series ``(..., T)``; 1 where there are too few."""
    return y.diff(dim=-1).var(-1) if y.shape[-1] > 2 else torch.ones_like(y[..., :1].sum(-1))
