"""What a call costs apart from its arithmetic: tiny tensors, one step of a layer, and values read on the host.

Three tables in one: microseconds of every public op on tiny tensors; microseconds of one step of every mixer at d_model
64, as called and, where the mixer has ``prepare()``, prepared; and how often a packed model waits for its device. On a
GPU those are the synchronisations that PyTorch reports. On a CPU they are the reads of a tensor's values from Python,
of which a GPU waits for those that read the device. The least of several runs is what a call costs; other processes
can only add to it.

    python benchmarks/overhead.py --out now.json
    git worktree add ../before v0.1.0
    PYTHONPATH=../before/src python benchmarks/overhead.py --out before.json   # this file, the library of before
    python benchmarks/overhead.py --before before.json
"""

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import interleaved, report, row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dualform.check.op_cases import OpCase, op_cases
from dualform.core.tree import clone
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.registry import MIXERS
from dualform.layers.s4d import S4DConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel

LENGTH = 8  # steps of a tiny call
WIDTH = 64  # d_model
DEPTHS = (1, 4)  # blocks of a packed model: what a block adds is a quarter of the difference, times three
BORDERS = (0, 11, 11, 40, 64)
PARTS = {
    "mamba": MambaConfig(),
    "mamba2": Mamba2Config(d_head=16),
    "s4d": S4DConfig(),
    "attention": AttentionConfig(heads=4),
}
# Operators whose result has to be waited for: a size or a value of theirs is needed on the host.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "is_nonzero")


def first_cases(names: list[str]) -> dict[str, OpCase]:
    """The first case of every op."""
    found: dict[str, OpCase] = {}
    for case in op_cases(LENGTH):
        if not names or case.op in names:
            found.setdefault(case.op, case)
    return found


def op_calls(device: str, names: list[str]) -> dict[str, Callable[[], Any]]:
    """Forward, and forward + backward through every argument, of every op."""
    calls: dict[str, Callable[[], Any]] = {}
    for op, case in first_cases(names).items():
        given = case.cast(device, torch.float32)
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        with torch.enable_grad():  # a path, or a bound, has no gradient
            found = {i: torch.ones_like(y) for i, y in enumerate(case.call(leaves)) if y.requires_grad}

        def forward(case: OpCase = case, given: dict[str, Tensor] = given) -> Any:
            return case.call(given)

        def both(case: OpCase = case, leaves: dict[str, Tensor] = leaves, found: dict[int, Tensor] = found) -> Any:
            with torch.enable_grad():
                y = case.call(leaves)
                return torch.autograd.grad([y[i] for i in found], list(leaves.values()), list(found.values()))

        calls[f"{op}, forward"] = forward
        if found:
            calls[f"{op}, forward + backward"] = both
    return calls


@dataclass
class Steps:
    """Steps of one mixer, one after another, from the state after a short sequence."""

    step: Callable[..., Any]
    x: Tensor
    start: Any
    state: Any = None

    def __call__(self) -> None:
        """One step more."""
        _, self.state = self.step(self.x, self.state)

    def rewind(self) -> None:
        """Back to the start, so that a state that grows does not."""
        self.state = clone(self.start)


def step_calls(device: str, names: list[str], calls: int) -> dict[str, Steps]:
    """One step of every mixer, as called and prepared."""
    found = {}
    for kind in names or MIXERS:
        if kind not in MIXERS:
            continue
        torch.manual_seed(0)
        mixer = MIXERS[kind]().build(WIDTH).to(device).eval()
        x = torch.randn(1, LENGTH, WIDTH, device=device)
        _, state = mixer(x, mixer.init_state(1, max_len=LENGTH + calls))
        found[f"{kind}, step"] = Steps(mixer.step, x[:, 0], state)
        if prepare := getattr(mixer, "prepare", None):
            found[f"{kind}, step, prepared"] = Steps(prepare().step, x[:, 0], state)
    return found


@dataclass
class Reads(TorchDispatchMode):
    """Counts what reads a tensor's values or waits for a size, by the name of what asked."""

    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operator that PyTorch runs."""
        name, tensors = function.overloadpacket.__name__, [a for a in args if isinstance(a, Tensor)]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        counted = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        moved = name in ("_to_copy", "copy_") and tensors and tensors[-1].device.type != "cpu"
        if name in WAITING or by_mask or counted or (moved and _target(args, kwargs) == "cpu"):
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def _target(args: Any, kwargs: Any) -> str:
    device = (kwargs or {}).get("device")
    return torch.device(device).type if device is not None else args[0].device.type


@contextmanager
def reads() -> Iterator[Counter[str]]:
    """Count on a CPU: operators below Python, and the methods that hand out values without one."""
    mode, real = Reads(), {name: getattr(Tensor, name) for name in ("tolist", "numpy")}

    def counting(name: str) -> Callable[..., Any]:
        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            mode.seen[name] += 1
            return real[name](self, *args, **kwargs)

        return method

    for name in real:
        setattr(Tensor, name, counting(name))
    try:
        with mode:
            yield mode.seen
    finally:
        for name, method in real.items():
            setattr(Tensor, name, method)


@contextmanager
def synchronisations() -> Iterator[Counter[str]]:
    """Count on a GPU: PyTorch warns of every operation that makes the host wait."""
    seen: Counter[str] = Counter()
    always, before = torch.is_warn_always_enabled(), torch.cuda.get_sync_debug_mode()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield seen
            finally:
                torch.cuda.set_sync_debug_mode(before)
    finally:
        torch.set_warn_always(always)
    seen["synchronisation"] = sum("called a synchronizing" in str(warning.message) for warning in caught)


def waits(device: str) -> list[dict[str, Any]]:
    """How often packed models of several depths wait, forward and then backward."""
    rows = []
    for kind, part in PARTS.items():
        for depth in DEPTHS:
            torch.manual_seed(0)
            model = LanguageModel(ModelConfig(256, WIDTH, {"P": (part,)}, "P" * depth)).to(device)
            tokens = torch.randint(256, (1, BORDERS[-1]), device=device)
            borders = torch.tensor(BORDERS, dtype=torch.int32, device=device)

            def run(model: LanguageModel = model, tokens: Tensor = tokens, borders: Tensor = borders) -> Tensor:
                return model.loss(tokens, cu_seqlens=borders)

            run().backward()  # compiles what is compiled once
            count = synchronisations if device == "cuda" else reads
            with count() as forward:
                loss = run()
            with count() as backward:
                loss.backward()
            blocks = f"{depth} block" + ("s" if depth > 1 else "")
            for name, seen in (("forward", forward), ("backward", backward)):
                rows.append(counted(f"packed {kind}, {blocks}, {name}", sum(seen.values())))
    return rows


def counted(name: str, count: int) -> dict[str, Any]:
    """A row of a count, in the columns of a timing."""
    return {"case": name, "unit": "times", "least": count, "median": count}


def timed(name: str, milliseconds: list[float], calls: int) -> dict[str, Any]:
    """A row of a timing, in microseconds of one call."""
    found = row(name, [1e3 * t / calls for t in milliseconds])
    return {"case": name, "unit": "us", "least": found["min"], "median": found["median ms"]}


def timings(device: str, names: list[str], calls: int, repeats: int) -> list[dict[str, Any]]:
    """Microseconds of every op and every step."""

    def often(run: Callable[[], Any]) -> Callable[[], None]:
        def block() -> None:
            if isinstance(run, Steps):
                run.rewind()
            for _ in range(calls):
                run()
            if device == "cuda":
                torch.cuda.synchronize()

        return block

    cases = {**op_calls(device, names), **step_calls(device, names, calls)}
    found = interleaved({name: often(run) for name, run in cases.items()}, repeats=repeats)
    return [timed(name, times, calls) for name, times in found.items()]


def beside(rows: list[dict[str, Any]], before: Path) -> list[dict[str, Any]]:
    """The rows with those of another run: its least, and how many times as large that is."""
    old = {one["case"]: one["least"] for one in json.loads(before.read_text())["rows"]}
    nan = float("nan")
    for one in rows:
        one["before"] = was = old.get(one["case"], nan)
        one["before / now"] = was / one["least"] if one["least"] else nan
    return rows


@torch.no_grad()
def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="ops and mixers to time; all of them by default")
    parser.add_argument("--devices", nargs="*", help="cpu, cuda; by default those there are")
    parser.add_argument("--calls", type=int, default=50, help="in one timing")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--before", type=Path, help="what --out wrote for another version: print both")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for device in options.devices or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        found = timings(device, options.names, options.calls, options.repeats)
        with torch.enable_grad():
            found += waits(device)
        rows += [{**one, "case": f"{device}: {one['case']}"} for one in found]
    if options.before:
        rows = beside(rows, options.before)
    report(f"overhead, float32, batch 1 to 3, {LENGTH} steps, d_model {WIDTH}", rows, options.out)


if __name__ == "__main__":
    main()
