"""Accuracy of the estimators on small public sets, beside MiniRocket, 1-NN-DTW and an LSTM: nothing is tuned to a set.

    python benchmarks/series.py [--sets GunPoint,ArrowHead] [--methods series,minirocket] [--seeds 3] [--out FOLDER]

The sets are those whose files lie in aeon's package (``pip install aeon``), read here without importing it, and the
digits of scikit-learn, half of them to learn. ``minirocket`` and ``dtw`` are aeon's, and are left out where it cannot
be imported. Every figure is of the set's own test part; Covid3Month is a regression, its figure the root of the mean
squared error.
"""

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import report

import dualform as df
from dualform.layers.bidirectional import BidirectionalConfig
from dualform.layers.lstm import LSTMConfig
from dualform.series import DeepClassifier, DeepRegressor

CLASSES = (
    *("ItalyPowerDemand", "JapaneseVowels", "BasicMotions", "GunPoint", "ArrowHead"),
    *("OSULeaf", "ACSF1", "PickupGestureWiimoteZ", "digits"),
)
NUMBERS = ("Covid3Month",)
LSTM = df.ModelConfig(0, 64, {"L": (BidirectionalConfig(LSTMConfig()),)}, "LL", dropout=0.1)
Set = tuple[list[np.ndarray], np.ndarray]


def read(name: str, part: str) -> Set:
    """Sequences ``(T, C)`` and labels or numbers of a part, TRAIN or TEST."""
    if name == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        found: Any = load_digits()
        options = {"test_size": 0.5, "random_state": 0, "stratify": found.target}
        learned, unseen, y, z = train_test_split(found.images, found.target, **options)
        return (list(learned), y) if part == "TRAIN" else (list(unseen), z)
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
    return X, np.array(y, dtype=float) if name in NUMBERS else np.array(y)


def estimator(name: str, **options: Any) -> Callable[[Set, Set, int], float]:
    """A method of this library: accuracy, or the error of numbers."""

    def run(learned: Set, unseen: Set, seed: int) -> float:
        kind: Any = DeepRegressor if name in NUMBERS else DeepClassifier
        found = kind(random_state=seed, **options).fit(*learned).predict(unseen[0])
        return error_or_accuracy(found, unseen[1], name)

    return run


def aeons(name: str, method: str) -> Callable[[Set, Set, int], float] | None:
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

    def run(learned: Set, unseen: Set, seed: int) -> float:
        length = max(len(x) for x in (*learned[0], *unseen[0]))
        least = max(length, 9)  # MiniRocket's kernels have nine weights

        def padded(X: list[np.ndarray]) -> np.ndarray:
            return np.stack([np.pad(x, ((0, least - len(x)), (0, 0)), mode="edge").T for x in X])

        kind = Regressor if name in NUMBERS else Kind
        model = kind(n_neighbors=1, distance="dtw") if method == "dtw" else kind(random_state=seed)
        found = model.fit(padded(learned[0]), learned[1]).predict(padded(unseen[0]))
        return error_or_accuracy(found, unseen[1], name)

    return run


def error_or_accuracy(found: np.ndarray, truth: np.ndarray, name: str) -> float:
    """The root of the mean squared error of numbers; of classes the share that is right."""
    if name in NUMBERS:
        return float(np.sqrt(np.square(np.asarray(found, dtype=float) - truth).mean()))
    return float((np.asarray(found) == truth).mean())


def method(kind: str, name: str) -> Callable[[Set, Set, int], float] | None:
    """The method of that name, for a set."""
    own = {"series": {}, "series x5": {"members": 5}, "causal": {"causal": True}, "lstm": {"model": LSTM}}
    return estimator(name, **own[kind]) if kind in own else aeons(name, kind)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join((*CLASSES, *NUMBERS)))
    parser.add_argument("--methods", default="series,lstm,minirocket,dtw")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file, in this folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name in options.sets.split(","):
        learned, unseen = read(name, "TRAIN"), read(name, "TEST")
        row: dict[str, Any] = {"set": name, "learned": len(learned[1]), "unseen": len(unseen[1])}
        for kind in options.methods.split(","):
            run, begin = method(kind, name), time.perf_counter()
            figures = [] if run is None else [run(learned, unseen, seed) for seed in range(options.seeds)]
            minutes = (time.perf_counter() - begin) / 60 / options.seeds
            row |= {kind: f"{np.mean(figures):.3f}" if figures else "-", f"{kind}, min": f"{minutes:.1f}"}
        rows.append(row)
        print(row, flush=True)
    report(f"accuracy, mean of {options.seeds} seeds", rows, options.out / "series.json" if options.out else None)


if __name__ == "__main__":
    main()
