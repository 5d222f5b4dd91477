"""All pictures of a memory, a layer or a model, as files."""

import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.hippo import transition
from dualform.core.memory import Memory
from dualform.core.system import StateSpace
from dualform.inspect.memory import draw_memory
from dualform.inspect.response import draw_frequency, draw_impulse
from dualform.inspect.spectrum import draw_poles
from dualform.inspect.systems import linear_parts, state_spaces
from dualform.layers.mixer import Mixer

_SHOWN = 4  # channels whose responses are drawn
_SIGNAL, _WAVES = 100_000, 20  # samples and greatest frequency of the signal that a memory remembers
_WINDOW = _SIGNAL / 4


def save(pictures: Iterator[tuple[str, Figure]], folder: Path) -> list[Path]:
    """Write pictures as ``folder/NAME.png``, or ``NAME-2.png`` and so on where one is there already; the paths.

    Raises:
        OSError: when the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in pictures:
        names = (f"{name}-{i}.png" if i > 1 else f"{name}.png" for i in count(1))
        paths.append(next(folder / free for free in names if not (folder / free).exists()))
        picture.savefig(paths[-1], metadata={"Software": None})
    return paths


def pictures_of_measure(measure: str, order: int = 64) -> Iterator[tuple[str, Figure]]:
    """``reconstruction`` of a band-limited signal, and the ``poles`` of the measure's matrix, by name.

    Raises:
        ArgumentError: for an unknown measure, listing those that exist, or an order that does not fit.
    """
    memory = Memory(measure, order, window=None if measure == "legs" else _WINDOW)
    yield "reconstruction", draw_memory(memory, _band_limited())
    A, B = transition(measure, order)
    yield "poles", draw_poles(StateSpace(A, B, torch.ones_like(B)), f"{measure}, N = {order}")


def pictures_of_layer(mixer: Mixer, title: str = "") -> Iterator[tuple[str, Figure]]:
    """``poles`` of all systems of a layer, and ``impulse`` and ``frequency`` responses of some channels, by name.

    Raises:
        ArgumentError: for a layer without a linear time-invariant system.
    """
    every = state_spaces(mixer)
    yield "poles", draw_poles(every, title)
    width = sum(system.B.shape[1] for system in every)
    drawn = min(_SHOWN, width)
    channels = [round(i * (width - 1) / max(1, drawn - 1)) for i in range(drawn)]
    shown = {f"channel {c}": state_spaces(mixer, [c])[0] for c in channels}
    yield "impulse", draw_impulse(shown, _horizon(every), title)
    yield "frequency", draw_frequency(shown, title)


def pictures_of_model(model: nn.Module) -> Iterator[tuple[str, Figure]]:
    """:func:`pictures_of_layer` of every layer that has a linear system, named ``BLOCK-PART-KIND-...``.

    Raises:
        ArgumentError: for a model without such a layer.
    """
    parts = linear_parts(model)
    if not parts:
        raise ArgumentError(
            "inspect: no layer of this model is a linear time-invariant system",
            hint="layers that are one: S4, S4D, DSS, S5, LRU; the others answer differently to different inputs",
        )
    for path, part in parts.items():
        numbers = [word for word in path.split(".") if word.isdigit()]
        label = "-".join([*numbers, type(part).__name__.lower()])
        for name, picture in pictures_of_layer(part, f"{path} ({type(part).__name__})"):
            yield f"{label}-{name}", picture


def _horizon(systems: list[StateSpace]) -> int:
    """Steps in which a typical mode fades to a thousandth."""
    sizes = torch.cat([system.poles().abs() for system in systems]).clamp(1e-3, 1 - 1e-6)
    return int(min(4096, max(32, math.log(1e-3) / float(sizes.log().median()))))


def _band_limited() -> Tensor:
    """A sum of waves of random phase and amplitude, always the same."""
    source = torch.Generator().manual_seed(0)
    waves = torch.arange(1, _WAVES + 1, dtype=torch.float64)
    height, phase = torch.randn(2, _WAVES, generator=source, dtype=torch.float64)
    angle = 2 * math.pi * torch.outer(torch.arange(_SIGNAL, dtype=torch.float64) / _SIGNAL, waves)
    return torch.sin(angle + 3 * phase) @ height / math.sqrt(_WAVES)
