"""The poles and steps of S4, S4D, DSS, S5 and H3, and the checks that their configs share."""

import math
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.shapes import wide
from dualform.layers.mixer import Hint


@runtime_checkable
class Steps(Protocol):
    """What the config of a layer with trained steps has."""

    @property
    def dt_min(self) -> float: ...
    @property
    def dt_max(self) -> float: ...


def check_steps(kind: str, config: Steps) -> None:
    """The range of the steps at the start is one of positive numbers.

    Raises:
        ConfigError: for one that is not.
    """
    low, high = config.dt_min, config.dt_max
    if not 0 < low <= high < math.inf:
        raise ConfigError(f"{kind}: dt_min {low} and dt_max {high}, expected 0 < dt_min <= dt_max, both finite")


class Poles:
    """Poles ``A = -exp(log_A_re) + i A_im`` and steps ``dt = exp(log_dt)``, as parameters of the layer.

    Whatever training does, A stays in the left half plane and dt positive.
    """

    hints: ClassVar[dict[str, Hint]] = {
        "log_dt": Hint(decay=False, max_lr=1e-3),
        "log_A_re": Hint(decay=False, max_lr=1e-3),
        "A_im": Hint(decay=False, max_lr=1e-3),
        "D": Hint(decay=False),
    }
    log_dt: nn.Parameter
    log_A_re: nn.Parameter
    A_im: nn.Parameter

    def _set_poles(self, A: Tensor, steps: int, config: Steps) -> None:
        """Make the parameters.

        Args:
            A: ``(..., N)``, complex, the poles at the start; real parts above -1e-4 are moved there.
            steps: how many there are: one for each row of A, or for each pole if A is ``(N,)``.
            config: the range of the steps at the start, over which they are spread evenly in their logarithm.

        Raises:
            ConfigError: for steps that are not positive, or an empty range.
        """
        check_steps(type(self).__name__.lower(), config)
        low, high = config.dt_min, config.dt_max
        dtype = torch.get_default_dtype()
        self.log_dt = nn.Parameter(math.log(low) + torch.rand(steps) * math.log(high / low))
        self.log_A_re = nn.Parameter((-A.real).clamp_min(1e-4).log().to(dtype))
        self.A_im = nn.Parameter(A.imag.to(dtype, copy=True, memory_format=torch.contiguous_format))

    def _poles(self) -> Tensor:
        dtype = wide(self.log_dt)
        return torch.complex(-self.log_A_re.to(dtype).exp(), self.A_im.to(dtype))

    def _dt(self, rate: float = 1.0) -> Tensor:
        """``rate`` times the steps, in a shape that broadcasts against the poles."""
        dt = self.log_dt.to(wide(self.log_dt)).exp() * rate
        return dt if self.A_im.dim() == 1 else dt[:, None]


def check_rate(where: str, rate: float) -> None:
    """That a factor of the steps is one.

    Raises:
        ArgumentError: for a rate that is not positive and finite.
    """
    if not 0 < rate < math.inf:
        raise ArgumentError(
            f"{where}: rate is {rate}, expected a positive number",
            hint="2 for inputs sampled half as often as in training, 0.5 for twice as often",
        )


def check_choice(where: str, name: str, value: str, known: tuple[str, ...]) -> None:
    """That a word of a config is one of those that exist.

    Raises:
        ConfigError: lists them.
    """
    if value not in known:
        raise ConfigError(f"{where}: {name} {value!r} is unknown", hint=f"one of {', '.join(known)}")


def check_pairs(where: str, d_state: int) -> None:
    """That a state is made of conjugate pairs.

    Raises:
        ConfigError: for a size that is odd or below 2.
    """
    if d_state < 2 or d_state % 2:
        raise ConfigError(f"{where}: d_state is {d_state}, expected an even number: poles come in conjugate pairs")
