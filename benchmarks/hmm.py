"""A hidden Markov model of 16 normal states over a long series: posterior, path, score, gradient and a step of a fit.

    .venv/bin/python benchmarks/hmm.py [--length 100000] [--states 16] [--threads 1]

Beside hmmlearn where it is installed, on the same parameters and data, emissions included. Its results are compared
with ours before anything is timed.
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import interleaved, report, row
from torch import Tensor

import dualform as df
from dualform.discrete import GaussianEmission


def model_of(states: int) -> df.HiddenMarkov:
    """States that overlap, in a chain that stays for a few steps."""
    g = torch.Generator().manual_seed(0)
    A = torch.rand(states, states, generator=g, dtype=torch.float64) + 4 * torch.eye(states, dtype=torch.float64)
    means = 3 * torch.randn(states, 1, generator=g, dtype=torch.float64)
    emission = GaussianEmission.of(means, torch.ones_like(means))
    return df.HiddenMarkov(emission, transition=A / A.sum(-1, keepdim=True))


def ours(model: df.HiddenMarkov, y: Tensor) -> dict[str, Callable[[], Any]]:
    def without(run: Callable[[Tensor], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return run(y)

        return call

    def gradient() -> None:
        model.zero_grad()
        model.log_likelihood(y).backward()

    fresh = model_of(model.states)
    return {
        "posterior": without(model.predict_proba),
        "path": without(model.predict),
        "score": without(model.score),
        "gradient of the score": gradient,
        "one step of a fit": lambda: fresh.fit(y, from_data=False, max_iterations=1, tolerance=0),
    }


def hmmlearn(model: df.HiddenMarkov, y: Tensor) -> dict[str, Callable[[], Any]]:
    """The same by hmmlearn; empty where it is not installed."""
    try:
        from hmmlearn.hmm import GaussianHMM
    except ImportError:
        return {}
    found: dict[str, Callable[[], Any]] = {}
    for implementation in ("scaling", "log"):

        def made(implementation: str = implementation) -> Any:
            kind = {"covariance_type": "diag", "implementation": implementation, "n_iter": 1, "init_params": ""}
            peer = GaussianHMM(model.states, **kind)
            peer.startprob_, peer.transmat_ = (m.detach().numpy() for m in (model.initial, model.transition))
            peer.means_ = model.emission.means.detach().numpy()
            peer.covars_ = np.ones((model.states, 1))
            return peer

        peer, X = made(), y.numpy()
        found[f"posterior, hmmlearn {implementation}"] = lambda peer=peer, X=X: peer.predict_proba(X)
        found[f"score, hmmlearn {implementation}"] = lambda peer=peer, X=X: peer.score(X)
        found[f"one step of a fit, hmmlearn {implementation}"] = lambda made=made, X=X: made().fit(X)
    found["path, hmmlearn"] = lambda peer=peer, X=X: peer.predict(X)
    error = abs(model.score(y).item() / peer.score(X) - 1)
    probs = np.abs(model.predict_proba(y).numpy() - peer.predict_proba(X)).max()
    paths = int((model.predict(y).numpy() != peer.predict(X)).sum())
    print(f"hmmlearn: score within {error:.1e}, posterior within {probs:.1e}, {paths} states of the path differ")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--length", type=int, default=100_000)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    model = model_of(options.states)
    y = model.sample(options.length, generator=torch.Generator().manual_seed(1))[0][0]
    cases = {**ours(model, y), **hmmlearn(model, y)}
    times = interleaved(cases, repeats=options.repeats)
    rows = [row(name, times[name]) for name in sorted(cases)]
    report(f"hidden Markov model, {options.states} states, {options.length:,} steps, float64", rows, options.out)


if __name__ == "__main__":
    main()
