"""Accuracy of the estimators on small public sets, beside MiniRocket, 1-NN-DTW, an LSTM and a GRU, nothing tuned.

    python benchmarks/series.py [--sets GunPoint,ArrowHead] [--methods series,minirocket] [--seeds 3] [--out FILE]

The sets are those whose files lie in aeon's package (``pip install aeon``), read here without importing it, and the
digits of scikit-learn, half of them to learn. ``minirocket`` and ``dtw`` are aeon's, and are left out where it cannot
be imported. ``lstm`` and ``gru`` are two bidirectional layers of width 64 in the estimator: what differs from
``series`` is the blocks. Every figure is of the set's own test part; Covid3Month is a regression, its figure the root
of the mean squared error. What is fitted by ``series`` is also asked about the test part in other forms, none of which
it has learned: at half the rate, with ``rate=2``, as the means of two samples (``halved``) and as every second one
(``every 2nd``); and with 30 % of the values missing at random (``missing``).

Each run is written to FILE as soon as it is done, and one that is there is not made again.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gru import GRUConfig
from harness import machine, report

import dualform as df
from dualform.layers.bidirectional import BidirectionalConfig
from dualform.layers.lstm import LSTMConfig
from dualform.series import DeepClassifier, DeepRegressor

CLASSES = (
    *("ItalyPowerDemand", "JapaneseVowels", "BasicMotions", "GunPoint", "ArrowHead"),
    *("OSULeaf", "ACSF1", "PickupGestureWiimoteZ", "digits"),
)
NUMBERS = ("Covid3Month",)
MISSING, FORMS = 0.3, ("halved", "every 2nd", "missing")


def recurrent(layer: Any) -> df.ModelConfig:
    """Blocks of a recurrent network, in both directions, for the estimators."""
    return df.ModelConfig(0, 64, {"R": (BidirectionalConfig(layer),)}, "RR", dropout=0.1)


OWN: dict[str, dict[str, Any]] = {
    "series": {},
    "series x5": {"members": 5},
    "causal": {"causal": True},
    "lstm": {"model": recurrent(LSTMConfig())},
    "gru": {"model": recurrent(GRUConfig())},
}


class Set(NamedTuple):
    """Sequences ``(T, C)``, and their labels or numbers."""

    X: list[np.ndarray]
    y: np.ndarray


Run = Callable[[Set, Set, int], dict[str, float]]


def read(name: str, part: str) -> Set:
    """A part, TRAIN or TEST."""
    if name == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        found: Any = load_digits()
        options = {"test_size": 0.5, "random_state": 0, "stratify": found.target}
        learned, unseen, y, z = train_test_split(found.images, found.target, **options)
        return Set(list(learned), y) if part == "TRAIN" else Set(list(unseen), z)
    place = find_spec("aeon")
    if place is None or place.origin is None:
        raise SystemExit("the sets come inside aeon: pip install aeon")
    path = Path(place.origin).parent / "datasets" / "data" / name / f"{name}_{part}.ts"
    X, y, data = [], [], False
    for line in path.read_text(errors="replace").splitlines():
        if data and line.strip():
            *channels, target = line.strip().split(":")
            X.append(np.array([[float(v.replace("?", "nan")) for v in one.split(",")] for one in channels]).T)
            y.append(target)
        data = data or line.lower().startswith("@data")
    return Set(X, np.array(y, dtype=float) if name in NUMBERS else np.array(y))


def estimator(name: str, method: str) -> Run:
    """A method of this library."""

    def run(learned: Set, unseen: Set, seed: int) -> dict[str, float]:
        kind: Any = DeepRegressor if name in NUMBERS else DeepClassifier
        busy = time.process_time()
        model = kind(random_state=seed, **OWN[method]).fit(*learned)
        found = {"figure": error_or_accuracy(model.predict(unseen.X), unseen.y, name)}
        found["minutes"] = (time.process_time() - busy) / 60
        if method != "series":
            return found
        halved = [np.stack([x[: len(x) // 2 * 2 : 2], x[1::2]]).mean(0) if len(x) > 1 else x for x in unseen.X]
        second = [x[1::2] if len(x) > 1 else x for x in unseen.X]
        others = {
            "halved": model.predict(halved, rate=2.0),
            "every 2nd": model.predict(second, rate=2.0),
            "missing": model.predict(with_holes(unseen.X, seed)),
        }
        return found | {form: error_or_accuracy(said, unseen.y, name) for form, said in others.items()}

    return run


def with_holes(X: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """The same, with a share of the values missing; the first and the last sample stay."""
    source, found = np.random.default_rng(seed), []
    for x in X:
        gone = source.random(x.shape) < MISSING
        gone[[0, -1]] = False
        found.append(np.where(gone, np.nan, x))
    return found


def aeons(name: str, method: str) -> Run | None:
    """A method of aeon; None where it is not installed. It pads with the last value, as it takes equal lengths."""
    try:
        if method == "dtw":
            from aeon.classification.distance_based import KNeighborsTimeSeriesClassifier as Kind
            from aeon.regression.distance_based import KNeighborsTimeSeriesRegressor as Regressor
        else:
            from aeon.classification.convolution_based import MiniRocketClassifier as Kind
            from aeon.regression.convolution_based import MiniRocketRegressor as Regressor
    except ImportError:
        return None

    def run(learned: Set, unseen: Set, seed: int) -> dict[str, float]:
        length = max(len(x) for x in (*learned.X, *unseen.X))
        least = max(length, 9)  # MiniRocket's kernels have nine weights

        def padded(X: list[np.ndarray]) -> np.ndarray:
            return np.stack([np.pad(x, ((0, least - len(x)), (0, 0)), mode="edge").T for x in X])

        kind = Regressor if name in NUMBERS else Kind
        model = kind(n_neighbors=1, distance="dtw") if method == "dtw" else kind(random_state=seed)
        found = model.fit(padded(learned.X), learned.y).predict(padded(unseen.X))
        return {"figure": error_or_accuracy(found, unseen.y, name)}

    return run


def error_or_accuracy(found: np.ndarray, truth: np.ndarray, name: str) -> float:
    """The root of the mean squared error of numbers; of classes the share that is right."""
    if name in NUMBERS:
        return float(np.sqrt(np.square(np.asarray(found, dtype=float) - truth).mean()))
    return float((np.asarray(found) == truth).mean())


def made(path: Path | None) -> list[dict[str, Any]]:
    """The runs that a file holds."""
    return [] if path is None or not path.exists() else json.loads(path.read_text())["runs"]


def keep(path: Path | None, runs: list[dict[str, Any]]) -> None:
    """Write all runs to a file, whole."""
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
        os.replace(part, path)


def table(runs: list[dict[str, Any]], sets: list[str], methods: list[str]) -> list[dict[str, Any]]:
    """A row for each set: the mean of the figures of each method over its seeds, how many, and minutes for each."""
    rows = []
    for name in sets:
        row: dict[str, Any] = {"set": name}
        for kind in methods:
            own = [run for run in runs if (run["set"], run["method"]) == (name, kind)]
            for figure in ("figure", *FORMS) if kind == "series" else ("figure",):
                known = [run[figure] for run in own if figure in run]
                row[kind if figure == "figure" else figure] = f"{np.mean(known):.3f} ({len(known)})" if known else "-"
            row[f"{kind}, min"] = f"{np.mean([run['minutes'] for run in own]):.1f}" if own else "-"
        rows.append(row)
    return rows


def main() -> None:
    """Make the runs, each seed for all sets and methods before the next one, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join((*CLASSES, *NUMBERS)))
    parser.add_argument("--methods", default="series,gru,lstm,minirocket,dtw")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    df.layers.MIXERS["gru"] = GRUConfig
    sets, methods, runs = options.sets.split(","), options.methods.split(","), made(options.out)
    for seed in range(options.seeds):
        for kind in methods:
            for name in sets:
                known = {(run["set"], run["method"], run["seed"]) for run in runs}
                run = estimator(name, kind) if kind in OWN else aeons(name, kind)
                if run is None or (name, kind, seed) in known:
                    continue
                learned, unseen = read(name, "TRAIN"), read(name, "TEST")
                busy = time.process_time()
                found = run(learned, unseen, seed)
                found = {"minutes": (time.process_time() - busy) / 60, **found}
                one = {"set": name, "method": kind, "seed": seed, **found, "load": os.getloadavg()[0]}
                print(one, flush=True)
                runs = [*made(options.out), one] if options.out else [*runs, one]  # of another process, too
                keep(options.out, runs)
    report("mean over seeds (their number), and minutes of one core", table(runs, sets, methods), None)


if __name__ == "__main__":
    main()
