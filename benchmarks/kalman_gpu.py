"""The Kalman filter on a GPU: a million steps in parallel over time, and ten thousand series fitted in one batch.

    .venv/bin/python benchmarks/kalman_gpu.py [--device cuda] [--length 1000000] [--series 10000] [--out FILE]

The parallel form is the scan over time; "chosen" is what the filter and the smoother take by themselves, for the filter
a kernel that takes spans of time side by side. The sequential form is one kernel that walks along all of time. It is
timed over fewer steps, and its time over all of them is that times the ratio of the lengths: it takes every step alike.
``--whole`` times it in full.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import report
from torch import Tensor

import dualform as df
from dualform.gaussian import Irregular, Level, Seasonal
from dualform.ops.triton import kalman_filter as kernel

STEPS = 200  # of each series that is fitted
SAMPLE = 20  # rows that are fitted on the CPU, too


def model_of(dtype: torch.dtype) -> df.LinearGaussian:
    """Four states, two damped oscillations, seen by one number at a time."""
    angle = torch.tensor([0.1, 0.7], dtype=torch.float64)
    turns = 0.98 * torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(2, 2, 2)
    A, C = torch.block_diag(*turns), torch.tensor([[1.0, 0, 1, 0]], dtype=torch.float64)
    Q = torch.diag(torch.tensor([0.1, 0.1, 0.3, 0.3], dtype=torch.float64))
    R = torch.ones(1, 1, dtype=torch.float64)
    return df.LinearGaussian(A, C, Q, R, torch.zeros(4).double(), torch.eye(4).double()).to(dtype)


def seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, Any]:
    """The least time of some calls, and the last result; the first call, which compiles and allocates, is not timed."""
    found, out = [], run() if repeats > 1 else None
    for _ in range(max(1, repeats - 1)):
        out = None
        _wait(device)
        begin = time.perf_counter()
        out = run()
        _wait(device)
        found.append(time.perf_counter() - begin)
    return min(found), out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def over_time(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Filter and smoother in both forms, and by how much they differ over the steps that both have made."""
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.float64):
        at = torch.arange(options.length, dtype=torch.float64)
        noise = torch.randn(options.length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = (2 * (0.1 * at).sin() + (0.7 * at).cos() + noise).to(device, dtype)[None, :, None]
        model, part = model_of(dtype).to(device), min(options.part, options.length)
        parallel, sequential, chosen = (df.KalmanFilter(model, parallel=form) for form in (True, False, None))
        for what in ("filter", "smooth"):
            quick, found = seconds(lambda p=parallel, w=what, x=y: getattr(p, w)(x), device, 3)
            best, _ = seconds(lambda p=chosen, w=what, x=y: getattr(p, w)(x), device, 3)
            length, worth = options.length if options.whole else part, kernel._WORTH
            kernel._WORTH = math.inf  # no spans
            slow, want = seconds(lambda s=sequential, w=what, x=y[:, :length]: getattr(s, w)(x), device, 2)
            kernel._WORTH = worth
            again = found if length == options.length else getattr(parallel, what)(y[:, :length])
            error = (again.mean - want.mean).abs().max() / want.mean.abs().max()
            whole = slow * options.length / length
            name = f"{what}, {options.length:,} steps, {str(dtype).removeprefix('torch.')}, {found.form}"
            rows.append({"case": name, "parallel s": quick, "chosen s": best, "sequential s": whole})
            rows[-1] |= {"timed steps": length, "times": whole / min(quick, best), "off by": f"{error.item():.1e}"}
            print(rows[-1], flush=True)
            del found, want, again
    return rows


def fits(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Many series fitted at once, and a sample of them fitted on the CPU."""
    rows: list[dict[str, Any]] = []
    g = torch.Generator().manual_seed(1)
    for name, made in (("level", Level() + Irregular()), ("level, season of 4", Level() + Seasonal(4) + Irregular())):
        y = _series(options.series, name != "level", g)
        many = made.expand(options.series)
        here, there = y.to(device), many.to(device)
        taken, found = seconds(lambda m=there, x=here: m.fit(x), device, 1)
        few = made.expand(SAMPLE).fit(y[:SAMPLE])
        away = max(abs(a.log_likelihood - b.log_likelihood) for a, b in zip(found, few, strict=False))
        ended = sum(fit.converged for fit in found)
        rows.append({"case": f"{options.series:,} x {STEPS}, {name}", "fit s": taken, "converged": ended})
        for form in (True, False):
            kind = "parallel" if form else "sequential"
            spent, _ = seconds(lambda m=there, f=form, x=here: gradient(m, x, f), device, 3)
            rows[-1][f"gradient, {kind}, ms"] = 1e3 * spent
        rows[-1] |= {"evaluations": found[0].evaluations, f"nats from the CPU, {SAMPLE} rows": f"{away:.1e}"}
        print(rows[-1], flush=True)
    return rows


def gradient(model: Any, y: Tensor, parallel: bool) -> tuple[Tensor, ...]:
    """That of the log-likelihoods, by all parameters of a model."""
    value = df.KalmanFilter(model.build(), parallel=parallel).log_likelihood(y).sum()
    return torch.autograd.grad(value, [*model.parameters()])


def _series(count: int, seasonal: bool, g: torch.Generator) -> Tensor:
    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    y = (0.3 * noise(count, STEPS, 1)).cumsum(1) + noise(count, STEPS, 1)
    return y + (2 * noise(count, 1, 4, 1)).expand(-1, STEPS // 4, -1, -1).flatten(1, 2) if seasonal else y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=1_000_000)
    parser.add_argument("--part", type=int, default=100_000, help="steps over which the sequential form is timed")
    parser.add_argument("--whole", action="store_true", help="time the sequential form in full")
    parser.add_argument("--series", type=int, default=10_000)
    parser.add_argument("--only", choices=["time", "fits"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    beside = (lambda name: None) if options.out is None else lambda name: options.out.with_suffix(f".{name}.json")
    if options.only != "fits":
        report("parallel over time", over_time(options, device), beside("time"))
    if options.only != "time":
        report("fitted in one batch", fits(options, device), beside("fits"))


if __name__ == "__main__":
    main()
