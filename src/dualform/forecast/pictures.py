"""Pictures of forecasts with their bands, and of the components of a series."""

from typing import Any

from matplotlib.figure import Figure

from dualform.inspect.canvas import DARK, GREY, LIGHT, WARM, figure

_SHADES = {95: 0.25, 80: 0.45, 50: 0.75}
_SHOWN = 5  # horizons of the past that are drawn, and 100 steps or more


def draw_forecast(past: Any, future: Any, title: str) -> Figure:
    """The end of a series, and its forecast with the bands of 50, 80 and 95 %.

    Args:
        past: a Series.
        future: a DataFrame with the columns of :func:`~dualform.forecast.report.bands_table`.
        title: above it.
    """
    made, axes = figure(size=(9, 4.2))
    axis = axes[0, 0]
    shown = past.iloc[-max(100, _SHOWN * len(future)) :]
    axis.plot(shown.index, shown.to_numpy(), color="black", linewidth=0.9, label="observed")
    place = future.index
    for band, alpha in _SHADES.items():
        low, high = future[f"lower_{band}"], future[f"upper_{band}"]
        axis.fill_between(place, low, high, color=LIGHT, alpha=alpha, linewidth=0, label=f"{band} %")
    marker = "o" if len(future) == 1 else None
    axis.plot(place, future["mean"], color=DARK, linewidth=1.4, marker=marker, label="mean")
    axis.margins(y=0.12)
    axis.set(title=title, xlabel=str(past.index.name or "time"))
    axis.legend(frameon=False, ncols=5, fontsize="small", loc="upper left")
    return made


def draw_components(parts: dict[str, Any], start: Any, title: str) -> Figure:
    """Each component with its band of 95 %; what is forecast begins at a line.

    Args:
        parts: by name, a DataFrame with the columns mean, lower_95 and upper_95.
        start: the first time that is forecast.
        title: above them.
    """
    made, axes = figure(len(parts), size=(9, 1.6 + 1.7 * len(parts)), sharex=True)
    for axis, (name, part) in zip(axes[:, 0], parts.items(), strict=True):
        axis.fill_between(part.index, part["lower_95"], part["upper_95"], color=LIGHT, alpha=0.6, linewidth=0)
        axis.plot(part.index, part["mean"], color=DARK, linewidth=1)
        axis.axvline(start, color=WARM, linewidth=0.8, linestyle=":")
        if name != "trend" and name != "level":
            axis.axhline(0, color=GREY, linewidth=0.5)
        axis.set_ylabel(name)
    axes[0, 0].set_title(title)
    axes[-1, 0].set_xlabel(str(next(iter(parts.values())).index.name or "time"))
    return made
