"""The responses of systems to an impulse, and to waves of every frequency."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure

from dualform.core.errors import ArgumentError
from dualform.core.system import StateSpace
from dualform.inspect.canvas import GREY, figure, shade


def draw_impulse(systems: Mapping[str, StateSpace], length: int = 256, title: str = "") -> Figure:
    """The impulse responses of discrete systems, from their first input to their first output, D left out.

    A system from :meth:`~dualform.core.system.StateSpace.discretize` has a D that belongs to its response; draw that of
    :meth:`~dualform.core.system.StateSpace.discretize_recurrence`.

    Args:
        systems: by name.
        length: number of steps.
        title: above the picture.

    Raises:
        ArgumentError: for no system, a continuous one, or a length below 1.
    """
    _check("draw_impulse", systems)
    if length < 1:
        raise ArgumentError(f"draw_impulse: the length is {length}, expected at least 1")
    made, axes = figure(len(systems), 1, size=(8.0, 1.2 + 1.3 * len(systems)), sharex=True)
    made.suptitle(title)
    for number, (name, system) in enumerate(systems.items()):
        kernel = system.kernel(length)[:, 0, 0].detach().cpu().numpy()
        one = axes[number, 0]
        one.axhline(0, color=GREY, linewidth=0.8)
        colour = shade(number / max(1, len(systems) - 1))
        one.plot(np.arange(length) * _step(system), kernel, color=colour, linewidth=1.4)
        one.set_ylabel(name)
    axes[-1, 0].set_xlabel("time" if any(_step(system) != 1 for system in systems.values()) else "steps")
    return made


def draw_frequency(systems: Mapping[str, StateSpace], title: str = "") -> Figure:
    """Gain and phase of discrete systems from their first input to their first output, up to half a turn per step.

    Args:
        systems: by name.
        title: above the picture.

    Raises:
        ArgumentError: for no system, a continuous one, or one with a pole on the unit circle.
    """
    _check("draw_frequency", systems)
    made, axes = figure(2, 1, size=(8.0, 5.5), sharex=True)
    made.suptitle(title)
    gain, phase = axes[:, 0]
    turns = torch.logspace(-4, math.log10(0.5), 600, dtype=torch.float64)  # per step
    for number, (name, system) in enumerate(systems.items()):
        response = system.frequency_response(2 * math.pi * turns / _step(system))[:, 0, 0].detach().cpu().numpy()
        frequencies, colour = turns / _step(system), shade(number / max(1, len(systems) - 1))
        decibels = 20 * np.log10(np.maximum(np.abs(response), 1e-12))
        gain.plot(frequencies, decibels, color=colour, linewidth=1.4, label=name)
        phase.plot(frequencies, np.unwrap(np.angle(response)) / (2 * math.pi), color=colour, linewidth=1.4)
    gain.set(ylabel="gain in dB", xscale="log")
    phase.set(ylabel="phase in turns", xlabel="turns per unit of time")
    gain.legend(frameon=False, fontsize=8)
    return made


def _check(where: str, systems: Mapping[str, StateSpace]) -> None:
    if not systems:
        raise ArgumentError(f"{where}: no systems, expected at least one")
    for name, system in systems.items():
        if system.dt is None:
            hint = "discretize_recurrence(dt) with a step that is small for its poles"
            raise ArgumentError(f"{where}: {name} is continuous, expected a discrete system", hint=hint)


def _step(system: StateSpace) -> float:
    return 1.0 if system.dt is None else float(system.dt)
