"""A comparison of models as a picture: quality, time and memory against length."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_CURVES = (
    ("seconds", 1e3, "a training step, one sequence", "ms"),
    ("kept", 2.0**-20, "kept for the backward pass", "MiB"),
    ("step", 1e3, "one more token in generation", "ms"),
    ("state", 2.0**-20, "state in generation", "MiB"),
)


def plot_comparison(path: Path, table: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Draw bits per byte of each model where it was trained, and its costs over the length, in logarithms.

    Args:
        path: of the PNG.
        table: as :func:`dualform.train.compare.results` gives it.
        title: above all.
    """
    trained = {name: row["bits_per_byte"] for name, row in table.items() if "bits_per_byte" in row}
    panels = len(_CURVES) + bool(trained)
    figure = Figure(figsize=(3.6 * panels, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    colours = {name: f"C{i % 10}" for i, name in enumerate(table)}
    if trained:
        bars = axes.pop(0)
        bars.bar(list(trained), list(trained.values()), color=[colours[name] for name in trained])
        bars.set(title="held-out text", ylabel="bits per byte", ylim=(0.9 * min(trained.values()), None))
        bars.tick_params(axis="x", rotation=45)
    for panel, (key, scale, what, unit) in zip(axes, _CURVES, strict=True):
        for name, row in table.items():
            points = [(cost["length"], scale * cost[key]) for cost in row["costs"]]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colours[name], label=name)
        panel.set(xscale="log", yscale="log", xlabel="length", ylabel=unit, title=what)
        panel.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, metadata={"Software": None})
