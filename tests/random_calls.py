"""Random calls of every operator, valid and not, through the public functions and through ``torch.ops.dualform``.

    python tests/random_calls.py --calls 2000 --device cuda

A call is to return, or to raise an error that is meant to be read. What a public function returns is compared with the
reference on the same arguments. A kernel that touches memory of others shows under a sanitizer: on a CPU under that of
``tests/sanitize.py``, on a GPU under NVIDIA's compute-sanitizer. Call number i is the same one on every run.
"""

import argparse
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dualform import ops
from dualform.core.errors import DualformError
from dualform.ops.native import library
from dualform.ops.op import Op, backend
from random_arguments import CALLS, PORTABLE, Arguments, Draw, laid_out, spoiled, spoiled_tensor

# What a caller may be told. A KeyError, a ZeroDivisionError or a failed assertion explains nothing.
EXPLAINED = (DualformError, RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


class Wrong(AssertionError):
    """A call that went as none should."""


class _Captured(Exception):
    def __init__(self, op: Op[Any], record: Any):
        self.op, self.record = op, record


@contextmanager
def capturing() -> Any:
    """Public functions raise the record of arguments that they would give to an op."""

    def capture(op: Op[Any], a: Any) -> Any:
        raise _Captured(op, a)

    before = Op.__call__
    Op.__call__ = capture  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        Op.__call__ = before


def record_of(name: str, arguments: Arguments) -> tuple[Op[Any], Arguments] | None:
    """The op behind a public function, and its arguments as the dispatcher sees them; None where none is called."""
    try:
        with capturing():
            getattr(ops, name)(**arguments)
    except _Captured as captured:
        op = captured.op
        return op, dict(zip(op.fields, op._flat(captured.record), strict=True))
    return None


def floats(values: Any) -> list[Tensor]:
    found = [values] if isinstance(values, Tensor) else list(values)
    return [x for x in found if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]


def through_function(name: str, arguments: Arguments, gradients: bool, draw: Draw) -> list[Tensor]:
    """The outputs, and where asked for the gradients of their weighted sum."""
    if not gradients:
        with torch.no_grad():
            return floats(getattr(ops, name)(**arguments))
    given = {k: leaf(v) for k, v in arguments.items()}
    out = floats(getattr(ops, name)(**given))
    wanted = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    weights = [draw.normal(*y.shape, dtype=y.dtype).to(y.device) for y in out]
    pairs = [(y, w) for y, w in zip(out, weights, strict=True) if y.requires_grad]
    found = _gradients(pairs, wanted) if pairs else [None] * len(wanted)
    return [*out, *(g if g is not None else torch.zeros_like(x) for g, x in zip(found, wanted, strict=True))]


def _gradients(pairs: list[tuple[Tensor, Tensor]], by: list[Tensor]) -> Any:
    return torch.autograd.grad([y for y, _ in pairs], by, [weight for _, weight in pairs], allow_unused=True)


def leaf(x: Any) -> Any:
    return x.detach().requires_grad_() if floats(x if isinstance(x, Tensor) else ()) else x


def through_dispatcher(op: Op[Any], arguments: Arguments, draw: Draw, spoil: bool) -> list[Tensor]:
    """``torch.ops.dualform``: what a compiled program calls, forward and backward."""
    forward, backward = (getattr(torch.ops.dualform, op.name + end) for end in ("", "_backward"))
    save = not op.stepwise and draw.chance(0.5)
    chosen = draw.one("", "", "", "torch")
    out = forward(chosen, save, *arguments.values())
    if not save:
        return out[: op.outputs]
    kept = [out[i] for i in op.keeps] + out[op.outputs :]
    grads = [draw.normal(*y.shape, dtype=y.dtype).to(y.device) for y in out[: op.outputs]]
    if spoil:
        grads, kept = ([m if draw.chance(0.7) else spoiled_tensor(m, draw) for m in ms] for ms in (grads, kept))
    return [*out[: op.outputs], *backward(chosen, grads, kept, *arguments.values())]


def finite(tensors: list[Tensor]) -> bool:
    return all(x.device.type != "meta" and bool(x.isfinite().all()) for x in tensors)


def compare(got: list[Tensor], want: list[Tensor], rounding: list[Tensor], numbers: bool) -> None:
    """Results have the shapes of the reference's and, where all numbers are finite, its numbers up to rounding.

    A GPU rounds what it multiplies by weights of 16 bits to their dtype: those are given for ``rounding``.
    """
    if [x.shape for x in got] != [x.shape for x in want]:
        raise Wrong(f"shapes {[tuple(x.shape) for x in got]}, those of the reference {[tuple(x.shape) for x in want]}")
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if b.numel() == 0 or not numbers:
            continue
        narrow = min((x.dtype.to_real() for x in (*got, *want, *rounding)), key=lambda dtype: dtype.itemsize)
        tolerance = 3e-2 if narrow.itemsize == 2 else 5e-4
        a, b = (x.detach().to(torch.complex128).cpu() for x in (a, b))
        error, size = float((a - b).abs().nan_to_num(nan=torch.inf).max()), float(b.abs().max())
        if error > tolerance * max(1.0, size):
            raise Wrong(f"result {i} is off by {error:.3g} of {size:.3g}")


def call(number: int, device: str) -> str:
    """Make call ``number``; whether it was valid, and how it ended.

    Raises:
        Wrong: for an error that explains nothing, and a result that is not the reference's.
    """
    draw = Draw(number, device)
    library.choose(draw.one("", "avx512", "avx2", "baseline"))  # no change where this processor does not have it
    try:
        return _call(number, draw)
    finally:
        library.choose()


def _call(number: int, draw: Draw) -> str:
    device = str(draw.device)
    common = [name for name in CALLS if name not in PORTABLE]
    name = draw.random.choice(common if draw.chance(0.9) else sorted(PORTABLE))
    arguments = CALLS[name](draw)
    arguments = {k: laid_out(v, draw) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    valid, direct, gradients = draw.chance(0.5), draw.chance(0.4), draw.chance(0.5)
    if name.endswith("_update") and arguments["out_state"] is not None:
        gradients = False
        same = arguments["out_state"].shape == arguments["state"].shape
        if same and draw.chance(0.5):  # written in place
            arguments["out_state"] = arguments["state"]
    text = f"call {number}: {name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if direct:
                found = record_of(name, arguments)
                if found is None:
                    return "valid direct, nothing to do"
                op, arguments = found
                arguments = arguments if valid else spoiled(arguments, draw)
                text += describe(arguments)
                through_dispatcher(op, copied(arguments), draw, not valid and draw.chance(0.3))
                return f"{'valid' if valid else 'spoiled'} direct, returned"
            arguments = arguments if valid else spoiled(arguments, draw)
            text += describe(arguments)
            weights = draw.random.randrange(2**31)
            chosen = draw.one("", "", "", "torch")
            with backend(chosen):
                got = through_function(name, copied(arguments), gradients, Draw(weights, device))
            with backend("reference"):
                want = through_function(name, copied(arguments), gradients, Draw(weights, device))
            rounding = [m for v in arguments.values() if isinstance(v, tuple) for m in v] if device != "cpu" else []
            compare(got, want, floats(rounding), numbers=finite([*floats(arguments.values()), *want]))
            return f"{'valid' if valid else 'spoiled'}, returned"
    except EXPLAINED as error:
        if valid:
            raise Wrong(f"{text}\nis valid and raised {type(error).__name__}: {error}") from error
        if not str(error):
            raise Wrong(f"{text}\nraised {type(error).__name__} without a word") from error
        return f"spoiled{' direct' if direct else ''}, {type(error).__name__}"
    except Exception as error:
        raise Wrong(f"{text}\n{type(error).__name__}: {error}") from error


def copied(arguments: Arguments) -> Arguments:
    """Arguments whose states may be written to, the same tensor where one is given twice."""
    out = arguments.get("out_state")
    if not isinstance(out, Tensor):
        return arguments
    fresh = out.clone()
    return {k: fresh if v is out else v for k, v in arguments.items()}


def describe(arguments: Arguments) -> str:
    def one(x: Any) -> str:
        if not isinstance(x, Tensor):
            return repr(x)
        if x.dim() == 1 and not x.is_floating_point() and x.numel() < 9 and x.device.type != "meta":
            return f"{x.dtype} {x.tolist()}"
        return f"{x.dtype} {tuple(x.shape)} strides {x.stride()} on {x.device}"

    return "".join(f"\n  {name} = {one(x)}" for name, x in arguments.items())


def main() -> int:
    parser = argparse.ArgumentParser(description="Random calls of every operator, valid and not.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--show", action="store_true", help="print the number of every call before it is made")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared with float32
    ended: Counter[str] = Counter()
    wrong = 0
    for number in range(options.first, options.first + options.calls):
        if options.show:
            print(number, flush=True)
        try:
            ended[call(number, options.device)] += 1
        except Wrong as error:
            wrong += 1
            print(error, file=sys.stderr, flush=True)
    for how, count in sorted(ended.items()):
        print(f"{count:6} {how}")
    print(f"{wrong:6} wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
