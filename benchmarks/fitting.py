"""A thousand seasonal series fitted at once: SARIMA(1,1,1)(0,1,1)12 of 200 steps, by maximum likelihood, in float64.

    .venv/bin/python benchmarks/fitting.py [--series 1000] [--peer 1000] [--threads 2] [--out FILE]

Beside the ARIMA of statsforecast at the same orders, where it is installed, series after series, in one process or in
several (``--jobs``). Compared is the exact log-likelihood at the coefficients that each finds, with the best variance:
statsforecast's own starts from a large variance in the place of a diffuse one. Times are of the wall, and of the
processors, which is what counts on a machine that does other things.
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import report
from torch import Tensor

from dualform.gaussian import sarimax
from dualform.ops import arma_likelihood

ORDER, SEASONAL, STEPS = (1, 1, 1), (0, 1, 1, 12), 200


def series(count: int) -> np.ndarray:
    """Draws of the model with coefficients of their own, ``(count, T)``."""
    g = np.random.default_rng(0)
    ar, ma, seasonal = g.uniform(-0.8, 0.8, count), g.uniform(-0.8, 0.8, count), g.uniform(-0.8, 0.2, count)
    shocks = g.normal(size=(count, STEPS + 200)) * np.exp(g.normal(size=(count, 1)))
    noise, w = shocks.copy(), np.zeros_like(shocks)
    noise[:, 1:] += ma[:, None] * shocks[:, :-1]
    noise[:, 12:] += seasonal[:, None] * noise[:, :-12].copy()
    for t in range(1, w.shape[1]):
        w[:, t] = ar * w[:, t - 1] + noise[:, t]
    y = np.cumsum(w[:, 200:], 1)
    for t in range(12, STEPS):
        y[:, t] += y[:, t - 12]
    return y


def theirs(y: np.ndarray) -> list[list[float]]:
    """The coefficients that statsforecast finds: ar, ma and seasonal ma."""
    from statsforecast.models import ARIMA

    made = (ARIMA(order=ORDER, season_length=12, seasonal_order=SEASONAL[:3]).fit(x) for x in y)
    return [[fitted.model_["coef"][name] for name in ("ar1", "ma1", "sma1")] for fitted in made]


def reached(y: np.ndarray, coefficients: Tensor) -> Tensor:
    """The exact log-likelihoods at coefficients ``(B, 3)``, with the variance that is best."""
    w = torch.as_tensor(y).diff(dim=-1)
    w = w[:, 12:] - w[:, :-12]
    ar, ma, seasonal = coefficients.split(1, 1)
    taps = torch.cat([ma, torch.zeros(len(w), 10).double(), seasonal, ma * seasonal], 1)
    one, T = torch.ones(len(w), dtype=torch.float64, requires_grad=True), w.shape[1]
    value = arma_likelihood(ar, taps, one, w)
    (slope,) = torch.autograd.grad(value.sum(), one)
    square = 2 * slope + T  # the sum of squares, whose mean is the best variance
    return (value + (square - T - T * (square / T).log()) / 2).detach()


def in_processes(y: np.ndarray, jobs: int) -> list[list[float]]:
    """The same in several processes, whose start counts."""
    with ProcessPoolExecutor(jobs) as pool:
        return [x for part in pool.map(theirs, np.array_split(y, 4 * jobs)) for x in part]


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds of the wall, those of the processors, children included, and the result."""
    wall, before = time.perf_counter(), os.times()
    out = run()
    after = os.times()
    return time.perf_counter() - wall, sum(after[:4]) - sum(before[:4]), out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--peer", type=int, default=1000, help="how many of them statsforecast fits")
    parser.add_argument("--jobs", type=int, default=1, help="processes of statsforecast")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    y, model = series(options.series), sarimax(ORDER, SEASONAL)
    many = torch.as_tensor(y)[..., None]
    model.expand(2).fit(many[:2])
    wall, cpu, fits = timed(lambda: model.expand(options.series).fit(many))
    ended = sum(fit.converged for fit in fits)
    rows = [{"case": "ours, one batch", "series": len(y), "wall s": wall, "CPU ms a series": 1e3 * cpu / len(y)}]
    print(f"{ended} of {len(fits)} converged, {fits[0].evaluations} evaluations; load {os.getloadavg()}")
    y = y[: options.peer]
    try:
        theirs(y[:1])
    except ImportError:
        y = y[:0]
    if len(y):
        wall, cpu, found = timed(lambda: theirs(y) if options.jobs == 1 else in_processes(y, options.jobs))
        name = f"statsforecast, {options.jobs} process{'es' * (options.jobs > 1)}"
        rows.append({"case": name, "series": len(y), "wall s": wall, "CPU ms a series": 1e3 * cpu / len(y)})
        mine = torch.stack([fit.values[:3] for fit in fits[: len(y)]])
        gain = reached(y, mine) - reached(y, torch.tensor(found, dtype=torch.float64))
        parts = ", ".join(
            f"{100 * (gain.abs() < near).double().mean():.0f} % within {near}" for near in (0.01, 0.1, 1.0)
        )
        print(
            f"nats by which ours are higher: {gain.min():.4f} to {gain.max():.4f}, median {gain.median():.4f}; {parts}"
        )
    report("SARIMA(1,1,1)(0,1,1)12, 200 steps", rows, options.out)


if __name__ == "__main__":
    main()
