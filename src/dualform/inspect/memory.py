"""How much of a signal a memory retains as time passes."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from dualform.core.linalg import as_tensors
from dualform.core.memory import Memory, snapshots
from dualform.inspect.canvas import DARK, LIGHT, WARM, figure


def draw_memory(memory: Memory, signal: Any, at: Sequence[int] | None = None, title: str = "") -> Figure:
    """The reconstruction of a signal from a memory's coefficients, after some numbers of samples.

    One row per moment: the signal so far in light, the part that is remembered shaded, the reconstruction dark.

    Args:
        memory: a memory without samples; this function fills it.
        signal: ``(T,)``.
        at: numbers of samples, ascending, at least the order of the memory; None takes four, evenly spaced.
        title: above the picture; empty names the measure and the order.

    Raises:
        ArgumentError: for a memory that holds samples already, or moments that do not fit.
    """
    u = as_tensors("draw_memory", signal=signal)["signal"]
    moments = [max(memory.order, len(u) * part // 4) for part in (1, 2, 3, 4)] if at is None else list(at)
    shots = snapshots(memory, u, sorted(set(moments)))
    made, axes = figure(len(shots), 1, size=(9.0, 1 + 1.5 * len(shots)), sharex=True, sharey=True)
    made.suptitle(title or f"{memory.measure}, {memory.order} coefficients")
    stride = max(1, len(u) // 4000)
    seen = u[::stride].cpu()
    middles = (torch.arange(0, len(u), stride, dtype=torch.float64) + 0.5) * memory.dt
    for one, shot in zip(axes[:, 0], shots, strict=True):
        past = middles <= shot.time
        one.plot(middles[past], seen[past], color=LIGHT, linewidth=2.4, label="signal")
        one.plot(shot.times.cpu(), shot.reconstruction.cpu(), color=DARK, linewidth=1.1, label="reconstruction")
        one.axvspan(float(shot.times[0]), shot.time, color=DARK, alpha=0.05, linewidth=0)
        one.axvline(shot.time, color=WARM, linewidth=1)
        one.set_title(f"relative error {100 * shot.error:.2g} %", loc="right", fontsize=8)
    axes[-1, 0].set_xlabel("time")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    axes[0, 0].set_xlim(0, len(u) * memory.dt)
    low, high = float(u.min()), float(u.max())
    axes[0, 0].set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
    return made
