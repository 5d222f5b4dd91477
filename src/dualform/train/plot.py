"""The loss curve of a run as a picture."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Rows = Iterable[Mapping[str, Any]]


def plot_losses(path: Path, rows: Rows, baselines: Mapping[str, float | None], title: str) -> None:
    """Draw training and held-out loss in bits per byte over the steps, with compressors as dashed lines.

    Args:
        path: of the PNG.
        rows: of ``metrics.jsonl``.
        baselines: name -> bits per byte; None is left out.
        title: above the curves.
    """
    rows = list(rows)
    train, held_out = (
        [
            (row["step"], row["bits_per_byte"])
            for row in rows
            if row["kind"] == kind and row.get("bits_per_byte") is not None
        ]
        for kind in ("train", "held_out")
    )
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9ecae1", linewidth=1, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#08519c", marker="o", markersize=4, label="held-out")
    for (name, bits), shade in zip(baselines.items(), ("#999999", "#555555"), strict=False):
        if bits is not None:
            axes.axhline(bits, linestyle="--", linewidth=1, color=shade, label=f"{name} {bits:.2f}")
    lowest = min([bits for _, bits in train + held_out] + [bits for bits in baselines.values() if bits], default=0)
    axes.set_ylim(max(0, lowest - 0.2), max(lowest + 2.5, 3))
    axes.set(xlabel="step", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})
