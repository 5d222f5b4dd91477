"""A thousand seasonal series fitted at once: SARIMA(1,1,1)(0,1,1)12 of 200 steps, by maximum likelihood, in float64.

    .venv/bin/python benchmarks/fitting.py [--series 1000] [--peer 1000] [--threads 2] [--out FILE]

Beside the ARIMA of statsforecast at the same orders, where it is installed, series after series, in one process or in
several (``--jobs``). The log-likelihoods that both reach are compared. Times are of the wall, and of the processors,
which is what counts on a machine that does other things.
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

from dualform.gaussian import sarimax

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


def theirs(y: np.ndarray) -> list[float]:
    """The log-likelihoods that statsforecast reaches."""
    from statsforecast.models import ARIMA

    made = (ARIMA(order=ORDER, season_length=12, seasonal_order=SEASONAL[:3]).fit(x) for x in y)
    return [fitted.model_["loglik"] for fitted in made]


def in_processes(y: np.ndarray, jobs: int) -> list[float]:
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
        wall, cpu, reached = timed(lambda: theirs(y) if options.jobs == 1 else in_processes(y, options.jobs))
        name = f"statsforecast, {options.jobs} process{'es' * (options.jobs > 1)}"
        rows.append({"case": name, "series": len(y), "wall s": wall, "CPU ms a series": 1e3 * cpu / len(y)})
        gain = np.array([fit.log_likelihood for fit in fits[: len(y)]]) - np.array(reached)
        near, above = np.mean(np.abs(gain) < 0.01), np.mean(gain > 0.01)
        print(f"log-likelihoods: within 0.01 nats {near:.1%}, ours higher {above:.1%}", end=", ")
        print(f"theirs higher {np.mean(gain < -0.01):.1%}; ours less theirs from {gain.min():.3f} to {gain.max():.3f}")
    report("SARIMA(1,1,1)(0,1,1)12, 200 steps", rows, options.out)


if __name__ == "__main__":
    main()
