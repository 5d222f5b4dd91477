"""MASE of `auto` on public series, beside the seasonal naive and the exponential smoothing of statsmodels.

    .venv/bin/python benchmarks/forecasting.py [--only co2,nile] [--origins 3]

The series are those inside of statsmodels, and those of aeon and sktime where these are installed; nothing is
downloaded. Monthly series are forecast 12 steps ahead, yearly ones 6. All three forecast from the same origins, half a
horizon apart, of which short series have fewer, with what they estimated at the first. Exponential smoothing is
ETSModel with additive errors, a damped additive trend, and an additive season where there is one.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd
import torch

from dualform.forecast import Forecaster, SeasonalNaive, evaluate


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


class Noted(Forecaster):
    """A forecaster that notes what it has chosen."""

    chosen = ""

    def fit(self, *args: Any, **options: Any) -> Forecaster:
        super().fit(*args, **options)
        Noted.chosen = self.choices_[0].found.candidate.label
        return self


def series() -> dict[str, tuple[Callable[[], np.ndarray], int]]:
    """Of each name what reads the series, and its season."""
    from statsmodels import datasets

    def months_of_co2() -> np.ndarray:
        return datasets.co2.load_pandas().data["co2"].resample("MS").mean().interpolate().to_numpy()

    found: dict[str, tuple[Callable[[], np.ndarray], int]] = {
        "co2": (months_of_co2, 12),
        "elnino": (lambda: datasets.elnino.load_pandas().data.to_numpy()[:, 1:].reshape(-1), 12),
        "nile": (lambda: datasets.nile.load_pandas().data["volume"].to_numpy(), 1),
        "sunspots": (lambda: datasets.sunspots.load_pandas().data["SUNACTIVITY"].to_numpy(), 1),
    }
    others: dict[str, tuple[Any, int]] = {}
    if find_spec("aeon"):
        warnings.simplefilter("ignore", FutureWarning)  # of aeon, which will leave two of them out
        from aeon.datasets import load_airline, load_lynx, load_shampoo_sales

        others = {"airline": (load_airline, 12), "lynx": (load_lynx, 1), "shampoo": (load_shampoo_sales, 12)}
    elif find_spec("sktime"):
        from sktime.datasets import load_airline, load_lynx, load_shampoo_sales

        others = {"airline": (load_airline, 12), "lynx": (load_lynx, 1), "shampoo": (load_shampoo_sales, 12)}
    for name, (load, season) in others.items():
        found[name] = (lambda load=load: np.asarray(load(), dtype=np.float64).reshape(-1), season)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, with commas")
    parser.add_argument("--origins", type=int, default=3)
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
        start = time.perf_counter()
        room = (len(y) - horizon - 2 * season) // (horizon // 2) + 1  # two seasons stay before the first
        origins = max(1, min(asked.origins, room))
        ours = evaluate(Noted(season=season, horizon=horizon), y, horizon, origins=origins)
        seconds = time.perf_counter() - start
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            others = [evaluate(one, y, horizon, origins=origins) for one in (SeasonalNaive(season), ETS(season))]
        scores = [found.mase.item() for found in (ours, *others)]
        rows.append(scores)
        shown = " | ".join(f"{score:.3f}" for score in scores)
        print(
            f"| {name} | {len(y)} | {Noted.chosen} | {shown} | {ours.coverage[0, 2]:.0%} | {seconds:.1f} |", flush=True
        )
    means = " | ".join(f"{score:.3f}" for score in np.mean(rows, 0))
    print(f"| mean of {len(rows)} | | | {means} | | |")


if __name__ == "__main__":
    main()
