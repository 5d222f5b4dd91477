"""How often the bands of `auto` hold what comes, on 500 simulated series of ten processes.

    .venv/bin/python benchmarks/bands.py [--series 50] [--steps 80] [--model auto] [--out bands.json]

Of each process there are as many series. A forecaster is fitted to all but their last 8 steps, and chooses for each
series by itself; the table has the share of what was left out that lies in each band. The processes are simulated here,
by their equations.
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
HORIZON = 8


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


def quarters(g: Noise, steps: int) -> np.ndarray:
    """(0,1,1)(0,1,1)4 with the coefficients of the airline passengers."""
    e = g.standard_normal(steps + 5)
    w = e[5:] - 0.4 * e[4:-1] - 0.6 * e[1:-4] + 0.24 * e[:-5]
    y = [*walk(g, 5)]
    for value in w:
        y.append(y[-1] + y[-4] - y[-5] + value)
    return np.array(y[5:])


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
    "SARIMA(0,1,1)(0,1,1)[4]": (quarters, 4),
    "growth in per cent": (lambda g, n: np.exp(4 + 0.01 * np.arange(n) + walk(g, n, 0.05)), 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=50, help="of each process")
    parser.add_argument("--steps", type=int, default=80, help="that are seen")
    parser.add_argument("--model", default="auto")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for period in (1, 4):  # of one period, all series are fitted together
        made = {
            name: simulated(number, simulate, asked.steps + HORIZON, asked.series)
            for number, (name, (simulate, of)) in enumerate(PROCESSES.items())
            if of == period
        }
        y = np.concatenate(list(made.values()), 1)
        start = time.perf_counter()
        found = Forecaster(asked.model, season=period, horizon=HORIZON).fit(y[: asked.steps])
        ends = np.stack([found.predict_interval(HORIZON, band) for band in BANDS])
        print(f"period {period}: {y.shape[1]} series in {time.perf_counter() - start:.0f} s", flush=True)
        for number, (name, values) in enumerate(made.items()):
            mine = ends[:, :, number * asked.series : (number + 1) * asked.series]
            future = values[asked.steps :]
            shares = {
                f"{100 * band:.0f} %": 100 * coverage(future, end[..., 0], end[..., 1]).item()
                for band, end in zip(BANDS, mine, strict=True)
            }
            rows.append({"process": name, "series": asked.series, "horizon": HORIZON, **shares})
            print(rows[-1], flush=True)
    shares = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key.endswith("%")}
    total = {"process": "all", "series": asked.series * len(rows), "horizon": HORIZON, **shares}
    report(f"per cent of observations in the bands of {asked.model}", [*rows, total], asked.out)


def simulated(seed: int, simulate: Callable[[Noise, int], np.ndarray], steps: int, count: int) -> np.ndarray:
    g = np.random.default_rng(seed)
    return np.stack([simulate(g, steps) for _ in range(count)], 1)


if __name__ == "__main__":
    main()
