"""Pictures of how good a classifier or regressor is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dualform.inspect.canvas import DARK, GREY, LIGHT, WARM, figure, shade
from dualform.series.panel import Panel
from dualform.series.training import Look

_NAMED = 30  # classes whose names and counts are written


def draw_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Of each true class, a row, how many sequences were said to be each."""
    counts = np.array(confusion)
    size = min(12.0, 3 + 0.35 * len(classes))
    made, axes = figure(size=(size + 0.6, size))
    one, shares = axes[0, 0], counts / counts.sum(1, keepdims=True).clip(min=1)
    one.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    one.grid(False)
    one.set(xlabel="said", ylabel="true", title="sequences by class")
    if len(classes) <= _NAMED:
        places = range(len(classes))
        one.set_xticks(places, classes, rotation=90 if max(map(len, classes)) > 2 else 0)
        one.set_yticks(places, classes)
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            one.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize="small")
    return made


def draw_calibration(curve: Sequence[Sequence[float]]) -> Figure:
    """How often the class that is said is right, against its probability."""
    made, axes = figure(size=(4.6, 4.2))
    one = axes[0, 0]
    said, right, counts = np.array(curve).T
    one.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    one.plot(said, right, color=DARK, marker="o")
    for x, y, count in zip(said, right, counts, strict=True):
        one.annotate(f"{count:.0f}", (x, y), xytext=(4, -10), textcoords="offset points", fontsize="small", color=GREY)
    one.set(xlabel="probability of the class said", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.05))
    one.set_title("calibration, and numbers of sequences")
    return made


def draw_numbers(said: np.ndarray, truth: np.ndarray) -> Figure:
    """What a regressor says against what is true."""
    made, axes = figure(size=(4.6, 4.2))
    one, both = axes[0, 0], np.concatenate([said, truth])
    ends = [both.min(), both.max()]
    one.plot(ends, ends, color=GREY, linewidth=1, linestyle="--")
    one.scatter(truth, said, s=9, color=DARK)
    one.set(xlabel="true", ylabel="said", title="sequences that were not learned")
    return made


def draw_losses(looks: Sequence[Look]) -> Figure:
    """The losses while a model was trained, and where its weights are from."""
    made, axes = figure(size=(5.6, 3.8))
    one, steps = axes[0, 0], [look.step for look in looks]
    one.plot(steps, [look.loss for look in looks], color=LIGHT, label="learned")
    held = [look.held_out for look in looks if look.held_out is not None]
    if held:
        one.plot(steps, held, color=DARK, label="held out while training")
        one.axvline(steps[int(np.argmin(held))], color=WARM, linewidth=1, label="the weights that are kept")
    one.set(xlabel="step", ylabel="loss", title="training")
    one.legend(frameon=False, fontsize="small")
    return made


def draw_hardest(given: Panel, rows: Sequence[int], titles: Sequence[str], channels: Sequence[str]) -> Figure:
    """Some sequences, each in a panel with its title; many channels are curves without names."""
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    made, axes = figure(lines, columns, size=(3.4 * columns, 2.4 * lines))
    spare: Any = axes.flat[len(rows) :]
    for one in spare:
        one.set_visible(False)
    for one, row, title in zip(axes.flat, rows, titles, strict=False):
        values = given.x[row, : int(given.lengths[row])].numpy()
        for i, channel in enumerate(channels):
            style = "o-" if len(values) < 3 else "-"
            one.plot(values[:, i], style, color=shade(i / max(1, len(channels) - 1)), linewidth=1, label=channel)
        one.set_title(title, fontsize="small")
    if 1 < len(channels) <= 8:
        axes.flat[0].legend(frameon=False, fontsize="x-small")
    return made
