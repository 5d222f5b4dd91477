"""Hidden Markov models that the laws are tried on."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dualform.discrete.autoregressive import AutoregressiveEmission
from dualform.discrete.categorical import CategoricalEmission
from dualform.discrete.emission import Emission
from dualform.discrete.model import HiddenMarkov
from dualform.discrete.normal import GaussianEmission

Build = Callable[[torch.device, torch.dtype], tuple[HiddenMarkov, None]]
Sample = Callable[[int, int, torch.Generator], Tensor]
EMISSIONS: dict[str, Callable[[], Emission]] = {
    "gaussian": lambda: GaussianEmission(3, 2),
    "categorical": lambda: CategoricalEmission(3, 5, 2),
    "autoregressive": lambda: AutoregressiveEmission(2, 2, 2, covariance="diagonal"),
}


def random_chain(emission: str, *, parallel: bool | None, scaled: bool | None) -> HiddenMarkov:
    """A hidden Markov model with random parameters, float64, which forgets where it started slowly."""
    made = EMISSIONS[emission]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(0.3)
    moves, start = torch.rand(made.states, made.states, dtype=torch.float64), torch.rand(made.states).double()
    moves, start = 0.1 + moves + 40 * torch.eye(made.states), 0.1 + start
    moves, start = moves / moves.sum(-1, keepdim=True), start / start.sum()
    return HiddenMarkov(made, initial=start, transition=moves, parallel=parallel, scaled=scaled)


def observations(emission: str, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """What such a model may observe ``(B, T, M)``: symbols, or numbers; every fifth is missing from a Gaussian one."""
    if emission == "categorical":
        return torch.randint(5, (batch, length, 2), generator=generator)
    y = torch.randn(batch, length, 2, generator=generator, dtype=torch.float64)
    return y.masked_fill(torch.rand(y.shape, generator=generator) < 0.2, math.nan) if emission == "gaussian" else y


def hidden_markov_cases() -> list[tuple[str, str, Build, Sample]]:
    """Name, kind, build and sample of each :class:`~dualform.check.cases.Case`: emissions, and forms of the passes."""
    return [
        _case("gaussian", ""),
        _case("categorical", " parallel", parallel=True),
        _case("autoregressive", " log", scaled=False),
        _case("categorical", " parallel log", parallel=True, scaled=False),
    ]


def _case(
    emission: str, name: str, parallel: bool | None = None, scaled: bool | None = None
) -> tuple[str, str, Build, Sample]:
    def build(device: torch.device, dtype: torch.dtype) -> tuple[HiddenMarkov, None]:
        return random_chain(emission, parallel=parallel, scaled=scaled).to(device, dtype), None

    return f"hmm {emission}{name}", "hmm", build, lambda *size: observations(emission, *size)
