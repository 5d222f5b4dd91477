"""Parameters that keep their constraints: what is trained is unconstrained, what is read is not.

They are parametrisations in the sense of ``torch.nn.utils.parametrize``: ``module.variance`` is the constrained value,
assigning to it sets the unconstrained one, and an optimiser of PyTorch sees the latter among ``module.parameters()``.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, check_finite

_EDGE = 1e-4
"""How close to 1 a partial autocorrelation counts as one at its bound."""


class Positive(nn.Module):
    """A variance as a square, so that 0 can be reached: ``x^2``."""

    def forward(self, x: Tensor) -> Tensor:
        """The constrained value."""
        return x.square()

    def right_inverse(self, value: Tensor) -> Tensor:
        """The unconstrained value of one that is 0 or more.

        Raises:
            ArgumentError: for a negative one.
        """
        if (value.detach() < 0).any():
            raise ArgumentError(f"a variance is {value.min().item():g}, expected 0 or more")
        return value.sqrt()

    def at_bound(self, x: Tensor, scale: Tensor) -> Tensor:
        """Where a variance is next to 0, beside one of the data."""
        return x.detach().square() <= 1e-9 * scale


class Interval(nn.Module):
    """A number between two bounds, by the logistic function."""

    floor = 0.1

    def __init__(self, low: float, high: float):
        super().__init__()
        if not low < high:
            raise ArgumentError(f"bounds are {low:g} and {high:g}, expected the lower one first")
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        """The constrained value."""
        return self.low + (self.high - self.low) * torch.sigmoid(x)

    def right_inverse(self, value: Tensor) -> Tensor:
        """The unconstrained value of one between the bounds.

        Raises:
            ArgumentError: for one outside, or on them.
        """
        inside = value.detach()
        if not ((inside > self.low) & (inside < self.high)).all():
            raise ArgumentError(
                f"a value is {inside.flatten()[0].item():g}, expected one between {self.low:g} and {self.high:g}"
            )
        return torch.logit((value - self.low) / (self.high - self.low))

    def at_bound(self, x: Tensor, scale: Tensor) -> Tensor:
        """Where a value is next to a bound."""
        part = torch.sigmoid(x.detach())
        return (part < _EDGE) | (part > 1 - _EDGE)


class Stationary(nn.Module):
    """Coefficients of an autoregression that is stationary: ``1 - phi_1 L - .. - phi_p L^p``, ``(*batch, p)``.

    The unconstrained values are the inverse hyperbolic tangents of the partial autocorrelations. With ``sign=-1`` they
    are those of a moving average ``1 + theta_1 L + ..`` that is invertible.

    References:
        Monahan (1984), "A note on enforcing stationarity in autoregressive-moving average models".
    """

    floor = 0.1

    def __init__(self, sign: int = 1):
        super().__init__()
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        """The constrained value."""
        return self.sign * from_partial(x.tanh())

    def right_inverse(self, value: Tensor) -> Tensor:
        """The unconstrained value.

        Raises:
            ArgumentError: for coefficients that are not stationary, or not invertible.
        """
        partial = to_partial(self.sign * value)
        if not (partial.detach().abs() < 1).all():
            what = (
                "an autoregression that is not stationary"
                if self.sign > 0
                else "a moving average that is not invertible"
            )
            raise ArgumentError(f"{what}: {[round(v, 6) for v in value.detach().flatten().tolist()]}")
        return partial.atanh()

    def at_bound(self, x: Tensor, scale: Tensor) -> Tensor:
        """All coefficients, where a partial autocorrelation is next to 1 or -1."""
        return (x.detach().tanh().abs() > 1 - _EDGE).any(-1, keepdim=True).expand(x.shape)


def from_partial(r: Tensor) -> Tensor:
    """Coefficients of the autoregression with partial autocorrelations ``r`` ``(*batch, p)``."""
    phi = r[..., :0]
    for k in range(r.shape[-1]):
        last = r[..., k : k + 1]
        phi = torch.cat([phi - last * phi.flip(-1), last], -1)
    return phi


def to_partial(phi: Tensor) -> Tensor:
    """Partial autocorrelations of an autoregression ``(*batch, p)``; not all below 1 where it is not stationary."""
    found = []
    for _ in range(phi.shape[-1]):
        last = phi[..., -1:]
        found.append(last)
        phi = phi[..., :-1]
        phi = (phi + last * phi.flip(-1)) / (1 - last.square())
    return torch.cat(found[::-1], -1) if found else phi


def constrained(module: nn.Module, name: str, value: Any, default: Any, constraint: nn.Module | None) -> None:
    """Give a module a tensor: a parameter that begins at ``default`` where the value is None, else one that is fixed.

    Raises:
        ArgumentError: for a value that is not a finite number, or breaks the constraint.
    """
    where = f"{kind(module)}: {name}"
    if value is None:
        begin = torch.as_tensor(default, dtype=torch.float64)
        module.register_parameter(name, nn.Parameter(begin.clone()))
        if constraint is not None:
            parametrize.register_parametrization(module, name, constraint)
        return
    made = as_tensors(where, value=value)["value"]
    check_finite(where, {"value": made})
    if isinstance(constraint, Positive) and (made.detach() < 0).any():
        raise ArgumentError(f"{where} is {made.min().item():g}, expected 0 or more")
    if isinstance(made, nn.Parameter):
        module.register_parameter(name, made)
    else:
        module.register_buffer(name, made)


class Place(NamedTuple):
    """A parameter of a model: the module that has it, its name there, and the name that people see."""

    module: nn.Module
    key: str
    name: str

    @property
    def constraint(self) -> Any:
        """Its parametrisation; None where it has none."""
        found = getattr(self.module, "parametrizations", {})
        return found[self.key][0] if self.key in found else None

    @property
    def free(self) -> nn.Parameter:
        """The unconstrained parameter."""
        found = getattr(self.module, "parametrizations", {})
        return found[self.key].original if self.key in found else getattr(self.module, self.key)

    @property
    def value(self) -> Tensor:
        """The constrained value."""
        return getattr(self.module, self.key)

    @torch.no_grad()
    def assign(self, value: Any) -> None:
        """Set the constrained value.

        Raises:
            ArgumentError: for another shape, or a value out of bounds.
        """
        old = self.value
        made = torch.as_tensor(value, dtype=old.dtype, device=old.device)
        if made.dim() and made.shape != old.shape:
            raise ArgumentError(f"{self.name} has shape {tuple(made.shape)}, expected {tuple(old.shape)}")
        made = made.expand(old.shape).clone()
        try:
            self.free.copy_(made if self.constraint is None else self.constraint.right_inverse(made))
        except ArgumentError as error:
            raise ArgumentError(f"{self.name}: {error}") from None


def places(model: nn.Module) -> list[Place]:
    """The parameters of a model that are trained, in its order."""
    return [*_places(model)]


def _places(model: nn.Module) -> Iterator[Place]:
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) or path.split(".")[-1] == "parametrizations":
            continue
        prefix = path.removeprefix("parts.").removeprefix("parts")
        prefix = f"{prefix}." if prefix else ""
        keys = [name for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
        made = getattr(module, "parametrizations", {})
        keys += [name for name in made if made[name].original.requires_grad]
        order = {name: index for index, name in enumerate(getattr(module, "order_of_parameters", keys))}
        for key in sorted(keys, key=lambda key: order.get(key, len(order))):
            yield Place(module, key, f"{prefix}{key}")


def kind(model: nn.Module) -> str:
    """The name of a model's class, without what parametrisation puts before it."""
    return type(model).__name__.removeprefix("Parametrized")
