"""The Kalman filter on a CPU: many short series, one long one, and a structural model of 12 states, in float64.

    .venv/bin/python benchmarks/kalman.py [--threads 2] [--repeats 9]

Beside statsmodels and dynamax where these are installed, on the same models and data. Likelihoods are compared before
anything is timed. dynamax is compiled before, and maps over the series of a batch.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import interleaved, report, row
from torch import Tensor

import dualform as df

SERIES, SHORT, LONG, STRUCTURAL = 1000, 200, 100_000, 10_000


def level() -> df.LinearGaussian:
    """The Nile's local level."""
    return _model(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([[1469.1]]), 15099.0, 1e7)


def structural() -> df.LinearGaussian:
    """A level, and eleven states of a seasonal effect of twelve periods."""
    A, Q, C = torch.zeros(12, 12), torch.zeros(12, 12), torch.zeros(1, 12)
    A[0, 0], A[1, 1:] = 1, -1
    A[torch.arange(2, 12), torch.arange(1, 11)] = 1
    Q[0, 0], Q[1, 1], C[0, :2] = 1, 0.1, 1
    return _model(A, C, Q, 2.0, 1e4)


def _model(A: Tensor, C: Tensor, Q: Tensor, noise: float, prior: float) -> df.LinearGaussian:
    n, R = len(A), torch.full((1, 1), noise)
    return df.LinearGaussian(*(x.double() for x in (A, C, Q, R, torch.zeros(n), prior * torch.eye(n))))


def gradient(model: df.LinearGaussian, y: Tensor) -> tuple[Tensor, ...]:
    """That of the log-likelihood, by the variances of both noises."""
    R, Q = (x.detach().clone().requires_grad_() for x in (model.R, model.Q))
    same = df.LinearGaussian(model.A, model.C, Q, R, model.m0, model.P0)
    return torch.autograd.grad(same.log_likelihood(y).sum(), (R, Q))


def without_gradient(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same where none is recorded."""

    def quick() -> Any:
        with torch.no_grad():
            return run()

    return quick


def peer_of(model: df.LinearGaussian, y: np.ndarray, kind: Any) -> Any:
    """The same model and series in statsmodels, whose prior is that of the first state."""
    A, C, Q, R, P0 = (x.detach().numpy() for x in (model.A, model.C, model.Q, model.R, model.P0))
    peer = kind(y, k_states=len(A), k_posdef=len(A))
    peer["transition"], peer["design"], peer["state_cov"], peer["obs_cov"] = A, C, Q, R
    peer["selection"] = np.eye(len(A))
    peer.ssm.initialize_known(np.zeros(len(A)), A @ P0 @ A.T + Q)
    return peer.ssm


def statsmodels(cases: dict[str, tuple[df.LinearGaussian, Tensor]]) -> dict[str, Callable[[], Any]]:
    """By statsmodels; empty where it is not installed."""
    try:
        from statsmodels.tsa.statespace.mlemodel import MLEModel
    except ImportError:
        return {}
    found: dict[str, Callable[[], Any]] = {}
    for name, (model, y) in cases.items():
        peers = [peer_of(model, x.numpy(), MLEModel) for x in (y if y.dim() == 3 else y[None])]
        want, got = [peer.loglike() for peer in peers], model.log_likelihood(y).detach().reshape(-1).numpy()
        print(f"{name}: likelihoods within {np.abs(got / want - 1).max():.1e} of statsmodels'")

        def likelihood(peers: list[Any] = peers) -> None:
            for peer in peers:
                peer.loglike()

        def smoothed(peers: list[Any] = peers) -> None:
            for peer in peers:
                peer.smooth()

        found[f"{name}: likelihood, statsmodels"] = likelihood
        if len(peers) == 1:
            found[f"{name}: smoother, statsmodels"] = smoothed
    return found


def dynamax(cases: dict[str, tuple[df.LinearGaussian, Tensor]]) -> dict[str, Callable[[], Any]]:
    """By dynamax, in float64; empty where it is not installed."""
    try:
        import jax
        from dynamax.linear_gaussian_ssm.inference import lgssm_filter, lgssm_smoother, make_lgssm_params
    except ImportError:
        return {}
    jax.config.update("jax_enable_x64", True)
    found: dict[str, Callable[[], Any]] = {}
    for name, (model, y) in cases.items():
        A, C, Q, R, P0 = (jax.numpy.asarray(x.detach().numpy()) for x in (model.A, model.C, model.Q, model.R, model.P0))
        params = make_lgssm_params(jax.numpy.zeros(len(A)), A @ P0 @ A.T + Q, A, Q, C, R)
        series = jax.numpy.asarray((y if y.dim() == 3 else y[None]).numpy())

        def both(of: Any, params: Any = params) -> Any:
            return jax.jit(jax.vmap(partial(of, params)))

        filtered, smoothed = both(lambda p, x: lgssm_filter(p, x).marginal_loglik), both(lgssm_smoother)
        want, got = np.asarray(filtered(series)), model.log_likelihood(y).detach().reshape(-1).numpy()
        print(f"{name}: likelihoods within {np.abs(got / want - 1).max():.1e} of dynamax's")
        found[f"{name}: likelihood, dynamax"] = lambda run=filtered, x=series: run(x).block_until_ready()
        if len(series) == 1:
            found[f"{name}: smoother, dynamax"] = lambda run=smoothed, x=series: jax.block_until_ready(run(x))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    generator = torch.Generator().manual_seed(0)
    sizes = {
        f"{SERIES} levels x {SHORT}": (level(), SERIES, SHORT),
        f"a level x {LONG:,}": (level(), 1, LONG),
        f"12 states x {STRUCTURAL:,}": (structural(), 1, STRUCTURAL),
    }
    cases: dict[str, tuple[df.LinearGaussian, Tensor]] = {}
    for name, (model, rows, length) in sizes.items():
        steps = torch.randn(rows, length, 1, generator=generator, dtype=torch.float64)
        y = 40 * steps.cumsum(1) + 120 * torch.randn(rows, length, 1, generator=generator, dtype=torch.float64)
        cases[name] = model, y if rows > 1 else y[0]
    runs: dict[str, Callable[[], Any]] = {}
    for name, (model, y) in cases.items():
        runs[f"{name}: likelihood and gradient"] = lambda model=model, y=y: gradient(model, y)
    with torch.no_grad():
        for name, (model, y) in cases.items():
            runs[f"{name}: likelihood"] = without_gradient(lambda model=model, y=y: model.log_likelihood(y))
            runs[f"{name}: filter"] = without_gradient(lambda model=model, y=y: model.filter(y))
            runs[f"{name}: smoother"] = without_gradient(lambda model=model, y=y: model.smooth(y))
        runs |= statsmodels(cases) | dynamax(cases)
    times = interleaved(runs, repeats=options.repeats)
    report("the Kalman filter, float64", [row(name, times[name]) for name in sorted(times)], options.out)


if __name__ == "__main__":
    main()
