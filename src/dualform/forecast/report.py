"""The folder of a forecast: tables, pictures, and a report that people can read."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from dualform.core.options import joined
from dualform.forecast.choose import Choice
from dualform.forecast.evaluation import Evaluation
from dualform.forecast.forecaster import Forecaster
from dualform.forecast.pictures import draw_components, draw_forecast
from dualform.forecast.table import Table

DRAWN = 12
"""Of how many series there are pictures and a chapter in the report."""
_BANDS = {95: (0, 6), 80: (1, 5), 50: (2, 4)}  # of the levels of a prediction
_Z95 = 1.959964


class Job(NamedTuple):
    """What was asked for, as the report says it."""

    source: str
    time: str
    id: str | None
    horizon: int
    model: str


class Checked(NamedTuple):
    """How the forecaster, and the seasonal naive, did on origins that are held back."""

    ours: Evaluation
    naive: Evaluation


def bands_table(mean: Any, q: Any) -> Any:
    """Mean, median and the ends of the bands of one series as a DataFrame, with the times to come as its index.

    Args:
        mean: a Series.
        q: its quantiles, as :meth:`~dualform.forecast.base.BaseForecaster.predict` has them.
    """
    columns = {"mean": mean, "median": q.iloc[:, 3]}
    columns |= {f"lower_{band}": q.iloc[:, low] for band, (low, _) in _BANDS.items()}
    columns |= {f"upper_{band}": q.iloc[:, high] for band, (_, high) in reversed(_BANDS.items())}
    return pd.DataFrame(columns)


def write(folder: Path, job: Job, table: Table, forecaster: Forecaster, checked: Checked | str) -> None:
    """Write ``forecast.csv``, ``components.csv`` where there are some, pictures and ``report.md`` into a folder.

    Args:
        folder: exists.
        job: what was asked for.
        table: the series.
        forecaster: that was fitted to them.
        checked: how it did, or why that is not known.

    Raises:
        OSError: when the disk refuses.
    """
    prediction = forecaster.predict(job.horizon)
    futures = {name: bands_table(mean, prediction.quantiles[name]) for name, mean in prediction.mean.items()}
    _save(folder / "forecast.csv", [_keyed(job, table, name, part) for name, part in futures.items()])
    parts = {}
    for (name, series), found in zip(table.series.items(), forecaster.components(job.horizon), strict=True):
        index = series.index.append(futures[name].index).rename(job.time)
        parts[name] = {label: _part(*moments, index) for label, moments in found.items()}
    every = [(name, label, part) for name, of in parts.items() for label, part in of.items()]
    rows = [_keyed(job, table, name, part).assign(component=label) for name, label, part in every]
    if rows:
        _save(folder / "components.csv", rows)
    pictures = {}
    for number, (name, series) in enumerate(list(table.series.items())[:DRAWN]):
        label = "" if len(table.series) == 1 else f"-{number + 1}-{re.sub(r'[^A-Za-z0-9]+', '-', name)[:40].strip('-')}"
        pictures[name] = [f"forecast{label}.png"]
        past, future = series.rename_axis(job.time), futures[name]
        drawn = draw_forecast(_drawable(past), _drawable(future), name)
        drawn.savefig(folder / pictures[name][0], metadata={"Software": None})
        if of := parts[name]:
            pictures[name].append(f"components{label}.png")
            log = ", of the logarithm" if _choice(forecaster, table, name).found.shape.log else ""
            drawn = draw_components(
                {part: _drawable(value) for part, value in of.items()},
                _drawable(future).index[0],
                f"{name}: components and their 95 % bands{log}",
            )
            drawn.savefig(folder / pictures[name][1], metadata={"Software": None})
    text = _report(job, table, forecaster, checked, futures, pictures)
    (folder / "report.md").write_text(text, encoding="utf-8")


def _report(
    job: Job,
    table: Table,
    forecaster: Forecaster,
    checked: Checked | str,
    futures: dict[str, Any],
    pictures: dict[str, list[str]],
) -> str:
    count = len(table.series)
    what = next(iter(table.series)) if count == 1 else f"{count} series"
    season = f"a season of {forecaster.season_} steps" if forecaster.season_ > 1 else "no season"
    lines = [
        f"# Forecast of {what}",
        "",
        f"{job.horizon} steps after the end of {job.source}, by `--model {job.model}`, with {season}. `forecast.csv` "
        "has the mean, the median and the bands of 50, 80 and 95 %.",
        "",
    ]
    pairs = zip(table.series, forecaster.choices_, strict=True)
    if stopped := [name for name, choice in pairs if not choice.found.converged]:
        lines += [
            f"**The optimiser did not converge** for {joined(stopped, 10)}: see below what it says. The forecasts are "
            "those of the parameters where it stopped.",
            "",
        ]
    lines += ["## How it did on origins that were held back", "", *_scores(checked), ""]
    for name in list(table.series)[:DRAWN]:
        lines += _chapter(name, table, _choice(forecaster, table, name), futures[name], pictures[name])
    if count > DRAWN:
        lines += [f"Chapters and pictures are of the first {DRAWN} series; `forecast.csv` has all {count}.", ""]
        lines += _overview(table, forecaster)
    return "\n".join(lines).rstrip() + "\n"


def _scores(checked: Checked | str) -> list[str]:
    if isinstance(checked, str):
        return [f"How good the forecasts are is not known: {checked}."]
    ours, naive = checked
    heads = [f"{100 * band:.0f} %" for band in ours.bands]
    origins = ", ".join(map(str, ours.origins))
    lines = [
        f"{ours.horizon} steps were forecast from {len(ours.origins)} origins, {origins} steps before the end. Choice "
        "and estimation knew only what precedes the first of them. MASE is the mean absolute error of the median, in "
        "units of what the value of one season ago misses by on the observations before. CRPS scores the whole "
        "distribution, in the unit of the series. Of both, smaller is better. The last columns are how many "
        "observations lay in the bands.",
        "",
        "| series | forecaster | MASE | CRPS | " + " | ".join(heads) + " |",
        "|---|---|---|---|" + "---|" * len(heads),
    ]
    for row, name in enumerate(ours.names[:DRAWN]):
        lines += [_row(name, "this", ours, row), _row("", "seasonal naive", naive, row)]
    if len(ours.names) > 1:
        of = ("mase", "crps", "coverage")
        means = [one._replace(**{name: getattr(one, name).nanmean(0, True) for name in of}) for one in checked]
        label = f"mean of {len(ours.names)}"
        lines += [_row(label, "this", means[0], 0), _row("", "seasonal naive", means[1], 0)]
    return lines


def _row(name: str, who: str, found: Evaluation, row: int) -> str:
    shares = " | ".join(f"{100 * share:.0f} %" for share in found.coverage[row].tolist())
    return f"| {_cell(name)} | {who} | {found.mase[row]:.3f} | {found.crps[row]:.4g} | {shares} |"


def _chapter(name: str, table: Table, choice: Choice, future: Any, pictures: list[str]) -> list[str]:
    found, series = choice.found, table.series[name]
    gaps = f", {table.gaps[name]} of them missing" if table.gaps[name] else ""
    log = " The model is of the logarithm, because changes grow with the level." if found.shape.log else ""
    waves = 0 if found.shape.beta is None else len(found.shape.beta) // 2
    if waves:
        log += f" Before, {waves} waves with a season of {found.shape.season} steps were subtracted, by least squares."
    lines = [
        f"## {name}",
        "",
        f"{len(series)} steps from {_moment(series.index[0])} to {_moment(series.index[-1])}{gaps}. "
        f"**{found.candidate.label}** was chosen. {choice.why}{log}",
        "",
        *(f"![{picture.removesuffix('.png')}]({picture})" for picture in pictures),
        "",
    ]
    if choice.trials:
        order = sorted(choice.trials.items(), key=lambda pair: (math.isnan(pair[1].score), pair[1].score))
        lines += ["| candidate | CRPS | parameters |", "|---|---|---|"]
        for label, trial in order:
            failed = math.isnan(trial.score)
            lines.append(f"| {label} | {'not fitted' if failed else f'{trial.score:.4g}'} | {trial.parameters or ''} |")
        lines.append("")
    if found.names:
        lines += ["| parameter | estimate | standard error |", "|---|---|---|"]
    for parameter, value, error in zip(found.names, found.values.tolist(), found.errors.tolist(), strict=True):
        lines.append(f"| {parameter} | {value:.6g} | {'at its bound' if math.isnan(error) else f'{error:.3g}'} |")
    verdict = "The optimiser converged" if found.converged else "**The optimiser did not converge**"
    likelihood = f"The log-likelihood is {found.log_likelihood:.4f}."
    lines += ["", f"{found.message}." if found.shared else f"{verdict}: {found.message}. {likelihood}", ""]
    lines += ["| " + " | ".join(["", "mean", "50 %", "80 %", "95 %"]) + " |", "|---|---|---|---|---|"]
    some = list(future.index) if len(future) <= 6 else [*future.index[:3], *future.index[-2:]]
    for at in some:
        row = future.loc[at]
        bands = [f"{row[f'lower_{band}']:.5g} to {row[f'upper_{band}']:.5g}" for band in (50, 80, 95)]
        lines.append("| " + " | ".join([_moment(at), f"{row['mean']:.5g}", *bands]) + " |")
    return [*lines, ""]


def _overview(table: Table, forecaster: Forecaster) -> list[str]:
    lines = ["| series | model | logarithm | converged |", "|---|---|---|---|"]
    for name, choice in zip(table.series, forecaster.choices_, strict=True):
        found = choice.found
        log, done = "yes" if found.shape.log else "no", "yes" if found.converged else f"NO: {found.message}"
        lines.append(f"| {_cell(name)} | {found.candidate.label} | {log} | {done} |")
    return lines


def _choice(forecaster: Forecaster, table: Table, name: str) -> Choice:
    return forecaster.choices_[list(table.series).index(name)]


def _part(mean: Any, deviation: Any, index: Any) -> Any:
    values = {"mean": mean, "lower_95": mean - _Z95 * deviation, "upper_95": mean + _Z95 * deviation}
    return pd.DataFrame({name: value.numpy() for name, value in values.items()}, index=index)


def _keyed(job: Job, table: Table, name: str, part: Any) -> Any:
    """A table with columns for what series it is of, and for the time."""
    (key, column), taken = table.keys[name], {*part.columns, "component", "value"}
    time, id = (f"{label} (given)" if label in taken else label for label in (job.time, job.id or ""))
    made = part.rename_axis(time).reset_index()
    several = len({value for _, value in table.keys.values()}) > 1
    if several:
        made.insert(0, "value", column)
    if key:
        made.insert(0, id, key)
    return made


def _save(path: Path, parts: list[Any]) -> None:
    whole = pd.concat(parts, ignore_index=True)
    if "component" in whole:
        whole.insert(list(whole.columns).index("mean"), "component", whole.pop("component"))
    whole.to_csv(path, index=False)


def _drawable(table: Any) -> Any:
    """With times that matplotlib can draw."""
    index = table.index
    return table.set_axis(index.to_timestamp()) if isinstance(index, pd.PeriodIndex) else table


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _moment(at: Any) -> str:
    return str(at).removesuffix(" 00:00:00")
