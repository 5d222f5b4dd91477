"""The style that all pictures share."""

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DARK, LIGHT, WARM, GREY = "#08519c", "#9ecae1", "#d94801", "#888888"


def figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure that needs no display, and its axes in an array ``(rows, columns)``."""
    made = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False, **options)
    for one in axes.flat:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return made, axes


def shade(place: float) -> Any:
    """A colour for a position from 0 to 1, such as that of one channel among all."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.05 + 0.85 * place)
