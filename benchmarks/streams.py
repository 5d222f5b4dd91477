"""What a step of a stream costs: microseconds of one stream and of many, beside PyTorch's recurrent cells.

A step of a whole model of two blocks, with its entrance, its norm and its head, on one thread; the cells are a cell of
the same width alone. The least of many runs: other processes can only add to it.

    python benchmarks/streams.py --out streams.json
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import report
from torch import nn

from dualform.layers.dss import DSSConfig
from dualform.layers.lru import LRUConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.s4d import S4DConfig
from dualform.layers.s5 import S5Config
from dualform.models.config import ModelConfig
from dualform.models.heads import SequenceClassifier, StepRegressor

PARTS = {
    "S4D": S4DConfig(),
    "DSS": DSSConfig(),
    "S5": S5Config(),
    "LRU": LRUConfig(),
    "Mamba": MambaConfig(),
    "Mamba-2": Mamba2Config(d_head=16),
}
CELLS = {"LSTM cell": nn.LSTMCell, "GRU cell": nn.GRUCell}


def stepped(model: Any, rows: int) -> Callable[[], Any]:
    """A step of prepared streams, each from where the last one ended."""
    steps, x, state = model.prepare(), torch.randn(rows, 1), [model.init_state(rows)]

    def run() -> None:
        _, state[0] = steps.step(x, state[0])

    return run


def cell(kind: Any, width: int, rows: int) -> Callable[[], Any]:
    """A step of a recurrent cell."""
    made, x, state = kind(width, width), torch.randn(rows, width), [None]

    def run() -> None:
        state[0] = made(x, state[0])

    return run


def least(run: Callable[[], Any], seconds: float) -> float:
    """Microseconds of a call, the least of many short runs."""
    for _ in range(2):  # the second one goes on from the state of the first
        run()
    best, end, count = float("inf"), time.perf_counter() + seconds, 1
    while time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(count):
            run()
        took = (time.perf_counter() - begin) / count
        best, count = min(best, took), max(1, min(20, int(1e-3 / took)))
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=32)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 1000])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each figure")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with torch.inference_mode():
        for name, part in PARTS.items():
            config = ModelConfig(0, args.d_model, {"S": (part,)}, "SS")
            for kind, outputs in ((StepRegressor, 1), (SequenceClassifier, 3)):
                model = kind(config, outputs, inputs=1).eval()
                times = {f"{n:,} rows, us": least(stepped(model, n), args.seconds) for n in args.rows}
                rows.append({"case": f"{name}, {kind.__name__}", **times})
        for name, kind in CELLS.items():
            times = {f"{n:,} rows, us": least(cell(kind, args.d_model, n), args.seconds) for n in args.rows}
            rows.append({"case": name, **times})
    report(f"a step of two blocks, d_model {args.d_model}", rows, args.out)


if __name__ == "__main__":
    main()
