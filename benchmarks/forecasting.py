"""MASE of `auto` on public series, beside the seasonal naive and the exponential smoothing of statsmodels.

    .venv/bin/python benchmarks/forecasting.py [--only co2,nile] [--origins 3] [--every 9]

The series are those inside of statsmodels, and those of aeon or sktime where one of these is installed; nothing is
downloaded. Monthly series are forecast 12 steps ahead, yearly ones 6. All three forecast from the same origins, half a
horizon apart, of which short series have fewer, with what they estimated at the first. The 181 yearly series of the M1
competition (aeon), or every so-many-th of them, are forecast once each, 6 steps before their ends, as in the
competition; they count as one, with their mean. Exponential smoothing is
ETSModel with additive errors, a damped additive trend, and an additive season where there is one.
"""

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dualform.forecast import Forecaster, SeasonalNaive, evaluate

Series = np.ndarray | dict[str, np.ndarray]


class ETS:
    """The exponential smoothing of statsmodels, as `evaluate` asks for it."""

    def __init__(self, season: int):
        self.season = season

    def get_params(self) -> dict[str, Any]:
        return {"season": self.season}

    def fit(self, y: np.ndarray) -> None:
        self.found = self._model(y).fit(disp=False)

    def update(self, y: np.ndarray) -> None:
        self.found = self._model(y).smooth(self.found.params)

    def predict_quantiles(self, horizon: int, levels: Sequence[float]) -> np.ndarray:
        found = self.found.get_prediction(start=self.n, end=self.n + horizon - 1)
        deviation = np.sqrt(np.asarray(found.forecast_variance))[:, None]
        z = torch.special.ndtri(torch.tensor(list(levels), dtype=torch.float64)).numpy()
        return np.asarray(found.predicted_mean)[:, None] + deviation * z

    def _model(self, y: np.ndarray) -> Any:
        from statsmodels.tsa.exponential_smoothing.ets import ETSModel

        self.n = len(y)
        seasonal: dict[str, Any] = {"seasonal": "add", "seasonal_periods": self.season} if self.season > 1 else {}
        return ETSModel(pd.Series(y), error="add", trend="add", damped_trend=True, **seasonal)


class Each:
    """A forecaster of one series, for a dictionary of them, too."""

    def __init__(self, one: ETS):
        self.one, self.season = one, one.season

    def get_params(self) -> dict[str, Any]:
        return {"one": self.one}

    def fit(self, y: Series) -> None:
        self.made = {name: ETS(self.season) for name in (y if isinstance(y, dict) else [""])}
        self._all(y, "fit")

    def update(self, y: Series) -> None:
        self._all(y, "update")

    def predict_quantiles(self, horizon: int, levels: Sequence[float]) -> Series:
        found = {name: one.predict_quantiles(horizon, levels) for name, one in self.made.items()}
        return found.get("", found)

    def _all(self, y: Series, method: str) -> None:
        for name, one in self.made.items():
            getattr(one, method)(y[name] if isinstance(y, dict) else y)


class Noted(Forecaster):
    """A forecaster that notes what it has chosen."""

    chosen = ""

    def fit(self, *args: Any, **options: Any) -> Forecaster:
        super().fit(*args, **options)
        counted = Counter(choice.found.candidate.label for choice in self.choices_)
        Noted.chosen = ", ".join(
            f"{label} ({count})" if len(counted) > 1 else label for label, count in counted.items()
        )
        return self


def series() -> dict[str, tuple[Callable[[], Series], int]]:
    """Of each name what reads the series, and its season."""
    from statsmodels import datasets

    def months_of_co2() -> np.ndarray:
        return datasets.co2.load_pandas().data["co2"].resample("MS").mean().interpolate().to_numpy()

    found: dict[str, tuple[Callable[[], Series], int]] = {
        "co2": (months_of_co2, 12),
        "elnino": (lambda: datasets.elnino.load_pandas().data.to_numpy()[:, 1:].reshape(-1), 12),
        "nile": (lambda: datasets.nile.load_pandas().data["volume"].to_numpy(), 1),
        "sunspots": (lambda: datasets.sunspots.load_pandas().data["SUNACTIVITY"].to_numpy(), 1),
    }
    if folder := folder_of("aeon") or folder_of("sktime"):
        for name, file, season in (("airline", "Airline", 12), ("lynx", "Lynx", 1), ("shampoo", "ShampooSales", 12)):
            path = folder / file / f"{file}.csv"
            found[name] = (lambda path=path: pd.read_csv(path).iloc[:, -1].to_numpy(np.float64)), season
    if folder := folder_of("aeon"):
        found["m1_yearly"] = (lambda: of_tsf(folder / "m1_yearly_dataset" / "m1_yearly_dataset.tsf")), 1
    return found


def folder_of(package: str) -> Path | None:
    """Where an installed package has its series; it is not imported."""
    spec = find_spec(package)
    return Path(spec.origin).parent / "datasets" / "data" if spec and spec.origin else None


def of_tsf(path: Path) -> dict[str, np.ndarray]:
    """The series of a file of the Monash archive by their names: lines of name, start and values, with colons."""
    _, _, lines = path.read_text("utf-8", "replace").partition("@data")
    rows = (line.split(":") for line in lines.split("\n") if ":" in line)
    return {row[0]: np.array(row[-1].split(","), dtype=np.float64) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, with commas")
    parser.add_argument("--origins", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="of the series of M1, each so-many-th")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = series()
    names = asked.only.split(",") if asked.only else list(known)
    print("| series | steps | auto chose | auto | seasonal naive | ETS of statsmodels | 95 % of auto | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for name in names:
        load, season = known[name]
        y, horizon = load(), 12 if season > 1 else 6
        if isinstance(y, dict):
            y = {label: values for number, (label, values) in enumerate(y.items(), 1) if number % asked.every == 0}
            steps, origins = f"{len(y)} series", 1  # one, at the end of the series, as in the competition
        else:
            room = (len(y) - horizon - 2 * season) // (horizon // 2) + 1  # two seasons stay before the first
            steps, origins = str(len(y)), max(1, min(asked.origins, room))
        start = time.perf_counter()
        ours = evaluate(Noted(season=season, horizon=horizon), y, horizon, origins=origins)
        seconds = time.perf_counter() - start
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            others = [evaluate(one, y, horizon, origins=origins) for one in (SeasonalNaive(season), Each(ETS(season)))]
        scores = [found.mase.mean().item() for found in (ours, *others)]
        rows.append(scores)
        shown = " | ".join(f"{score:.3f}" for score in scores)
        print(
            f"| {name} | {steps} | {Noted.chosen} | {shown} | {ours.coverage[:, 2].mean():.0%} | {seconds:.1f} |",
            flush=True,
        )
    means = " | ".join(f"{score:.3f}" for score in np.mean(rows, 0))
    print(f"| mean of {len(rows)} | | | {means} | | |")


if __name__ == "__main__":
    main()
