"""The likelihood of a model as a function of its unconstrained parameters, with exact derivatives of two orders."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.gaussian.constraints import Place, Positive, places


class Objective:
    """The negative log-likelihood over scaled unconstrained parameters ``(R, K)``: 1 where the optimiser begins.

    R is 1, or the number of series of a model in which each has parameters of its own.
    """

    def __init__(self, model: Any, y: Any, free: list[Place], options: dict[str, Any]):
        self.model, self.y, self.options, self.free = model, y, options, free
        self.rows = rows_of(model)
        self.tensors: list[Tensor] = [place.free for place in free]
        begin = self.point()
        known = model.typical(y if self.rows else y[None]) if hasattr(model, "typical") else {}
        sizes = []
        for place, part in zip(free, self.parts(), strict=True):
            size = known.get(place.name, part.abs().clamp_min(getattr(place.constraint, "floor", 0.0)))
            sizes.append(size.to(part).expand_as(part))
        sizes = torch.cat(sizes, 1)
        self.scale = torch.where(sizes > 0, sizes, 1.0)
        self.offset = begin - self.scale
        if self.rows and not {*options} - {"lengths"} and hasattr(model, "some"):
            self.some = self._some

    def _some(self, rows: Tensor) -> "Objective":
        """That of the rows of a mask ``(R,)``, over their parameters."""
        part, names = copy.copy(self), {place.name for place in self.free}
        part.model, part.y, part.rows = self.model.some(rows), self.y[rows], int(rows.sum())
        part.free = [place for place in places(part.model) if place.name in names]
        part.tensors = [place.free for place in part.free]
        part.scale, part.offset = self.scale[rows], self.offset[rows]
        part.options = {name: torch.as_tensor(v)[rows.cpu()] for name, v in self.options.items()}
        return part

    def parts(self) -> list[Tensor]:
        """The unconstrained parameters, ``(R, k)`` each."""
        return [tensor.detach().reshape(self.rows or 1, -1).double() for tensor in self.tensors]

    def point(self) -> Tensor:
        """The unconstrained parameters ``(R, K)``."""
        return torch.cat(self.parts(), 1)

    @torch.no_grad()
    def move(self, z: Tensor) -> None:
        """Set the parameters to a point."""
        x = (self.offset + self.scale * z).split([part.shape[1] for part in self.parts()], 1)
        for tensor, part in zip(self.tensors, x, strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def value(self) -> Tensor:
        """The negative log-likelihood of each row ``(R,)``."""
        with torch.enable_grad():
            value = -self.model.log_likelihood(self.y, **self.options)
            return value.reshape(-1) if self.rows else value.sum().reshape(1)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.move(z)
        try:
            value = self.value()
            gradient = self._gradient(value.sum())
        except ArgumentError:  # a covariance that is not positive definite, a model that is not stationary
            return z.new_full((len(z),), torch.inf), torch.zeros_like(z)
        return value.detach().double(), gradient * self.scale

    def hessian(self) -> tuple[Tensor, Tensor, Tensor]:
        """The log-likelihoods ``(R,)``, their gradients and their Hessians, in the unconstrained parameters."""
        value = -self.value()
        gradient = self._gradient(value.sum(), again=True)
        H = self._each(gradient)
        return value.detach().double(), gradient.detach(), (H + H.mT) / 2

    def jacobian(self) -> tuple[Tensor, Tensor]:
        """The constrained values ``(R, K)``, and their derivatives ``(R, K, K)`` by the unconstrained ones."""
        with torch.enable_grad():
            values = self.constrained()
            return values.detach(), self._each(values)

    def bending(self, weights: Tensor) -> Tensor:
        """The Hessian of a weighted sum of the constrained values, by the unconstrained ones ``(R, K, K)``."""
        with torch.enable_grad():
            return self._each(self._gradient((weights * self.constrained()).sum(), again=True))

    def constrained(self) -> Tensor:
        """The constrained values ``(R, K)``."""
        return torch.cat([place.value.reshape(self.rows or 1, -1).double() for place in self.free], 1)

    def names(self) -> list[str]:
        """Of each of the K numbers."""
        parts = []
        for place in self.free:
            shape = place.value.shape[1:] if self.rows else place.value.shape
            index = [tuple(i + 1 for i in at) for at in torch.ones(shape).nonzero().tolist()]
            parts += [f"{place.name}[{', '.join(map(str, at))}]" if at else place.name for at in index]
        return parts

    def at_bound(self, scale: Tensor) -> Tensor:
        """Which of them rest on a bound ``(R, K)``, for series of the variances ``(R,)``."""
        flags = []
        for place, part in zip(self.free, self.parts(), strict=True):
            check: Callable[..., Tensor] | None = getattr(place.constraint, "at_bound", None)
            none = torch.zeros_like(part, dtype=torch.bool)
            flags.append(none if check is None else check(part, scale[:, None].to(part)))
        return torch.cat(flags, 1)

    def reach(self) -> Tensor:
        """How far each parameter is from its bound, as seen by the likelihood ``(R, K)``.

        Times the slope, it is what the likelihood may still gain on the way. A square is as far as its root; what goes
        to its bound exponentially is 1 away.
        """
        pairs = zip(self.free, self.parts(), strict=True)
        return torch.cat([z if isinstance(place.constraint, Positive) else torch.ones_like(z) for place, z in pairs], 1)

    def _gradient(self, total: Tensor, again: bool = False) -> Tensor:
        if not total.requires_grad:
            return torch.zeros_like(self.point())
        found = torch.autograd.grad(total, self.tensors, create_graph=again, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(t) if g is None else g for g, t in zip(found, self.tensors, strict=True)]
        return torch.cat([part.reshape(self.rows or 1, -1).double() for part in parts], 1)

    def _each(self, values: Tensor) -> Tensor:
        """The derivatives of values ``(R, K)``, each of which depends on the parameters of its row."""
        return torch.stack([self._gradient(values[:, k].sum()) for k in range(values.shape[1])], 1)


def rows_of(model: nn.Module) -> int | None:
    """How many series have parameters of their own, in a model that was expanded to a batch; None for one model."""
    return getattr(model, "rows", None)
