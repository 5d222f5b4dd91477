"""How often the bands of `auto` hold what comes, on 500 simulated series of ten processes.

    .venv/bin/python benchmarks/coverage.py [--series 50] [--steps 80] [--model auto] [--out coverage.json]

Of each process there are as many series. A forecaster is fitted to all but their last steps, a season or 8 of them,
and chooses for each series by itself; the table has the share of what was left out that lies in each band. The
processes are simulated here, by their equations.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import report

from dualform.forecast import Forecaster, coverage

Noise = np.random.Generator
BANDS = (0.5, 0.8, 0.95)


def walk(g: Noise, steps: int, size: float = 1.0) -> np.ndarray:
    return np.cumsum(size * g.standard_normal(steps))


def arma(g: Noise, steps: int, ar: list[float], ma: list[float]) -> np.ndarray:
    """From zero, after 200 steps that are left out."""
    e, y = g.standard_normal(steps + 200), np.zeros(steps + 200)
    for t in range(max(len(ar), len(ma)), len(y)):
        y[t] = e[t] + sum(a * y[t - 1 - i] for i, a in enumerate(ar)) + sum(b * e[t - 1 - i] for i, b in enumerate(ma))
    return y[200:]


def season(g: Noise, steps: int, period: int, size: float) -> np.ndarray:
    """Effects of which each is what the others of a period leave, and noise."""
    s = list(3 * g.standard_normal(period - 1))
    while len(s) < steps + period:
        s.append(-sum(s[1 - period :]) + size * g.standard_normal())
    return np.array(s[period:])


def airline(g: Noise, steps: int) -> np.ndarray:
    """(0,1,1)(0,1,1)12 with the coefficients of the airline passengers."""
    e = g.standard_normal(steps + 13)
    w = e[13:] - 0.4 * e[12:-1] - 0.6 * e[1:-12] + 0.24 * e[:-13]
    y = [*walk(g, 13)]
    for value in w:
        y.append(y[-1] + y[-12] - y[-13] + value)
    return np.array(y[13:])


def cycle(g: Noise, steps: int) -> np.ndarray:
    turn, z, found = 0.97 * np.exp(2j * np.pi / 11), 0j, []
    for _ in range(steps + 200):
        z = turn * z + complex(*g.standard_normal(2))
        found.append(z.real + 0.5 * g.standard_normal())
    return np.array(found[200:])


PROCESSES: dict[str, tuple[Callable[[Noise, int], np.ndarray], int]] = {
    "noise": (lambda g, n: g.standard_normal(n), 1),
    "random walk": (lambda g, n: walk(g, n), 1),
    "local level": (lambda g, n: walk(g, n, 0.5) + g.standard_normal(n), 1),
    "local linear trend": (lambda g, n: np.cumsum(walk(g, n, 0.05)) + walk(g, n, 0.3) + g.standard_normal(n), 1),
    "AR(2)": (lambda g, n: arma(g, n, [0.6, 0.2], []), 1),
    "ARMA(1,1)": (lambda g, n: arma(g, n, [0.8], [-0.4]), 1),
    "cycle of 11 steps": (cycle, 1),
    "level with a season of 4": (lambda g, n: walk(g, n, 0.4) + season(g, n, 4, 0.1) + g.standard_normal(n), 4),
    "SARIMA(0,1,1)(0,1,1)[12]": (airline, 12),
    "growth in per cent": (lambda g, n: np.exp(4 + 0.01 * np.arange(n) + walk(g, n, 0.05)), 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=50, help="of each process")
    parser.add_argument("--steps", type=int, default=80, help="that are seen; twice as many with a season of 12")
    parser.add_argument("--model", default="auto")
    parser.add_argument("--only", default="", help="names, with commas")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    inside = []
    for number, (name, (simulate, period)) in enumerate(PROCESSES.items()):
        if asked.only and name not in asked.only.split(","):
            continue
        g = np.random.default_rng(number)
        steps, horizon = asked.steps * (2 if period == 12 else 1), period if period > 1 else 8
        y = np.stack([simulate(g, steps + horizon) for _ in range(asked.series)], 1)
        start = time.perf_counter()
        found = Forecaster(asked.model, season=period, horizon=horizon).fit(y[:steps])
        ends = [found.predict_interval(horizon, band) for band in BANDS]
        seconds = time.perf_counter() - start
        shares = [coverage(y[steps:], end[..., 0], end[..., 1]).item() for end in ends]
        inside.append(shares)
        row = {"process": name, "series": asked.series, "steps": steps, "horizon": horizon}
        rows.append(row | {f"{100 * b:.0f} %": 100 * s for b, s in zip(BANDS, shares, strict=True)} | {"s": seconds})
        print(rows[-1], flush=True)
    means = 100 * np.mean(inside, 0)
    total = {"process": "all", "series": asked.series * len(inside), "steps": 0, "horizon": 0}
    total |= {f"{100 * b:.0f} %": m for b, m in zip(BANDS, means.tolist(), strict=True)}
    report(f"per cent of observations in the bands of {asked.model}", [*rows, total | {"s": 0.0}], asked.out)


if __name__ == "__main__":
    main()
