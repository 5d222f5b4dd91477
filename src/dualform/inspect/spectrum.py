"""Where the poles of systems lie."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from dualform.core.errors import ArgumentError
from dualform.core.system import StateSpace
from dualform.inspect.canvas import DARK, GREY, WARM, figure, shade


def draw_poles(systems: StateSpace | Sequence[StateSpace], title: str = "") -> Figure:
    """The poles in the complex plane, and how fast each of their modes turns and fades.

    A mode ``exp(s t)`` turns ``|Im s| / 2 pi`` times per unit of time and fades by a factor e in ``-1 / Re s``; for a
    pole z of a discrete system s is ``log(z) / dt``. A pole is stable inside the unit circle, or left of the
    imaginary axis in continuous time. Systems are told apart by colour, the first darkest; unstable poles are
    crosses.

    Args:
        systems: all continuous or all discrete.
        title: above the picture.

    Raises:
        ArgumentError: for no system, or continuous and discrete ones together.
    """
    systems = [systems] if isinstance(systems, StateSpace) else list(systems)
    if len({system.dt is None for system in systems}) != 1:
        raise ArgumentError("draw_poles: expected systems that are all continuous or all discrete, at least one")
    discrete = systems[0].dt is not None
    made, ((plane, modes),) = figure(1, 2, size=(10.0, 4.8))
    made.suptitle(title)
    for number, system in enumerate(systems):
        poles = system.poles().detach().cpu().to(torch.complex128)
        colour = shade(number / max(1, len(systems) - 1)) if len(systems) > 1 else DARK
        stable = poles.abs() < 1 if discrete else poles.real < 0
        plane.scatter(poles[stable].real, poles[stable].imag, s=9, color=colour, linewidths=0, alpha=0.7)
        plane.scatter(poles[~stable].real, poles[~stable].imag, s=30, color=WARM, marker="x")
        alive = poles[stable & (poles.abs() > 1e-12)]
        exponents = alive if system.dt is None else alive.log() / float(system.dt)
        modes.scatter(exponents.imag.abs() / (2 * math.pi), -1 / exponents.real, s=9, color=colour, linewidths=0)
    if discrete:
        angle = np.linspace(0, 2 * math.pi, 400)
        plane.plot(np.cos(angle), np.sin(angle), color=GREY, linewidth=1)
        plane.set(aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    else:
        plane.axvline(0, color=GREY, linewidth=1)
    plane.set(xlabel="real part", ylabel="imaginary part", title="poles")
    modes.set(xlabel="turns per unit of time", ylabel="time to fade by a factor e", title="modes", yscale="log")
    if discrete:
        modes.set_xscale("symlog", linthresh=1e-3)
        modes.set_xlim(-2e-4, 0.55 / float(systems[0].dt or 1.0))
    return made
