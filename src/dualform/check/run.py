"""The contract on the user's own machine: every law for every case, and every backend against its reference."""

import difflib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from dualform.check import long
from dualform.check.cases import CASES, Case, default_cases
from dualform.check.defaults import DEVICE, DTYPE, LENGTH
from dualform.check.exact import builds, exactness
from dualform.check.op_cases import OpCase, op_cases
from dualform.core.deviation import Worst, deviation
from dualform.core.errors import ArgumentError, BackendError
from dualform.core.laws import LAWS, Law, Trial, functional
from dualform.core.shapes import dtype_of
from dualform.ops.device import usable_device
from dualform.ops.op import OPS, backend

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative. In 16 bits outputs are rounded to 2^-11 and 2^-8; the states that accumulate are float32 all the same."""
GRADIENT_TOLERANCE = {**TOLERANCE, torch.float16: 5e-2, torch.bfloat16: 3e-1}
"""Of the laws on gradients: autograd adds up a 16-bit parameter's gradient in 16 bits, step after step."""
_GRADIENT_LAWS = ("gradient", "final state")
LONGEST_REFERENCE = 512  # operators are compared over at most so many steps: their references are loops
_HALF = {case.op for case in long.CASES if case.half}  # what has kernels of 16 bits alone is checked in these
_AS_REFERENCE = 4  # a backend in low precision may err this many times as much as its reference in that precision


@dataclass(frozen=True)
class Result:
    """What one check found.

    Args:
        table: ``laws``, ``backends``, ``exact`` or ``long``.
        case: the row: a recurrence, an operator with the name of its backend, or a mixer for a model of it.
        law: the column.
        error: worst relative error; infinite for a wrong shape, a NaN or an exception; None where it does not apply.
        tolerance: what is allowed.
        ok: whether the error is within it.
        seconds: how long it took.
        message: where the worst error is, the exception, or why a backend does not take the call.
    """

    table: str
    case: str
    law: str
    error: float | None
    tolerance: float
    ok: bool
    seconds: float
    message: str = ""


@dataclass(frozen=True)
class Check:
    """One entry of a table. ``measure()`` gives what it found, None where it does not apply, and the tolerance."""

    table: str
    case: str
    law: str
    measure: Callable[[], tuple[Worst | None, float]]

    def run(self) -> Result:
        """Measure; an exception is a failed result, not a crash."""
        start = time.perf_counter()
        try:
            with _without_tf32():
                found, tolerance = self.measure()
        except BackendError as error:  # this backend does not take this call, and says why
            return Result(self.table, self.case, self.law, None, math.nan, True, _since(start), str(error))
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            return Result(self.table, self.case, self.law, math.inf, math.nan, False, _since(start), message)
        if found is None:
            return Result(self.table, self.case, self.law, None, tolerance, True, _since(start))
        ok = found.error <= tolerance
        return Result(self.table, self.case, self.law, found.error, tolerance, ok, _since(start), found.where)


def run_checks(
    names: Iterable[str] | None = None,
    *,
    device: str | torch.device = DEVICE,
    dtype: str | torch.dtype = DTYPE,
    length: int = LENGTH,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Verify the contract: every law for every mixer, filter and model; every backend against its float64 reference.

    And for a model of every mixer that ``exact=True`` keeps every bit of a request, whoever decodes beside it. On a GPU
    also: sequences of more than 2^31 elements against their pieces, in bfloat16 where the GPU is too small for the
    dtype.

    TF32, to which cuDNN rounds by default, is off meanwhile: what is checked in float32 is float32.

    Args:
        names: of cases, kinds (``mamba2``, ``kalman``, ``hmm``, ``lm``) or operators; None is all.
        device: where to run.
        dtype: of parameters and inputs: float64, float32, bfloat16 or float16.
        length: T of the sequences.
        on_result: called after each check.

    Returns:
        One result per check; :func:`holds` says whether the contract holds.

    Raises:
        ArgumentError: for a name, device, dtype or length that cannot be checked.
    """
    results = []
    for check in plan(names, device=device, dtype=dtype, length=length):
        results.append(check.run())
        if on_result is not None:
            on_result(results[-1])
    return results


def holds(results: Iterable[Result]) -> bool:
    """Whether the contract holds: every result is ``ok``, and at least one check ran."""
    results = list(results)
    return all(result.ok for result in results) and any(result.error is not None for result in results)


def plan(
    names: Iterable[str] | None = None,
    *,
    device: str | torch.device = DEVICE,
    dtype: str | torch.dtype = DTYPE,
    length: int = LENGTH,
) -> list[Check]:
    """What :func:`run_checks` would run, in order; arguments and errors are the same."""
    device, dtype = usable_device(device, f"check: device {str(device)!r}"), dtype_of("check", dtype, tuple(TOLERANCE))
    if length < 1:
        raise ArgumentError(f"check: length is {length}, expected at least 1")
    operators = op_cases(min(length, LONGEST_REFERENCE))
    recurrences = [*CASES.values(), *default_cases(CASES.values())]
    if names is not None:
        names = _known(names, recurrences, operators)

    @lru_cache(maxsize=1)
    def trial(case: Case) -> Trial:
        return case.trial(length, device=device, dtype=dtype)

    checks = [
        Check("laws", case.name, name, partial(_measure_law, name, law, partial(trial, case), dtype))
        for case in recurrences
        if names is None or {case.name, case.kind} & names
        for name, law in LAWS.items()
    ]
    for case in operators:
        if names is None or {case.name, case.op} & names:
            for name in _backends(case.op, device):
                half = device.type == "cuda" and name == "triton" and dtype.itemsize > 2 and case.op in _HALF
                title, of = (f"{name}, bfloat16", torch.bfloat16) if half else (name, dtype)
                checks += [
                    Check(
                        "backends", f"{case.name} [{title}]", law, partial(compare, case, name, device, of, backward=b)
                    )
                    for law, b in (("forward", False), ("backward", True))
                ]
    for (case, kind), build in builds(recurrences, device, dtype).items():
        if names is None or {case, kind} & names:
            checks.append(Check("exact", case, "exact", lambda build=build: (exactness(build, length), 0.0)))
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        for case in long.CASES:
            if names is None or case.op in names:
                small = dtype.itemsize > 2 and (case.half or case.bytes(dtype) > memory)
                name, of = (f"{case.op} (bfloat16)", torch.bfloat16) if small else (case.op, dtype)
                checks += [
                    Check("long", name, law, partial(_measure_long, case, device, of, backward=b))
                    for law, b in (("forward", False), ("backward", True))
                ]
    return checks


def _measure_long(
    case: long.LongCase, device: torch.device, dtype: torch.dtype, *, backward: bool
) -> tuple[Worst | None, float]:
    """More elements than 32 bits count, where the memory for them is there."""
    torch.cuda.empty_cache()
    needed, free = case.bytes(dtype), torch.cuda.mem_get_info(device)[0]
    if free < needed:
        gib = f"needs {needed / 2**30:.0f} GiB of free memory, {free / 2**30:.0f} are there"
        raise BackendError(f"{case.op} on more than 2^31 elements {gib}", hint="try --dtype bfloat16")
    try:
        found = long.split_error(case, device, dtype, backward=backward, elements=long.ELEMENTS)
    except torch.OutOfMemoryError:
        raise BackendError(f"{case.op} on more than 2^31 elements ran out of memory", hint="a larger GPU") from None
    finally:
        torch.cuda.empty_cache()
    return found, (GRADIENT_TOLERANCE if backward else TOLERANCE)[dtype]


def _measure_law(name: str, law: Law, trial: Callable[[], Trial], dtype: torch.dtype) -> tuple[Worst | None, float]:
    return law(trial()), (GRADIENT_TOLERANCE if name in _GRADIENT_LAWS else TOLERANCE)[dtype]


def compare(
    case: OpCase, name: str, device: torch.device, dtype: torch.dtype, *, backward: bool
) -> tuple[Worst, float]:
    """A backend against the reference in float64 on the same rounded values: the error, and what is allowed.

    Args:
        case: the call.
        name: of the backend.
        device: it runs on; the float64 reference runs on the CPU.
        dtype: of the arguments.
        backward: compare the gradients of a random functional of all outputs, not the outputs.

    Raises:
        BackendError: when the backend does not take the call.
    """
    given = case.cast("cpu", dtype)
    want = _evaluate(case, {k: v.to(_double(v)) for k, v in given.items()}, "reference", backward)

    def error(name: str) -> Worst:
        got = _evaluate(case, {k: v.to(device) for k, v in given.items()}, name, backward)
        return deviation(got, want, "gradient of" if backward else "output")

    found, tolerance = error(name), (GRADIENT_TOLERANCE if backward else TOLERANCE)[dtype]
    if found.error > tolerance and name != "reference":
        tolerance = max(tolerance, _AS_REFERENCE * error("reference").error)
    return found, tolerance


def _evaluate(case: OpCase, tensors: dict[str, Tensor], name: str, backward: bool) -> dict[str, Tensor]:
    """Outputs, or gradients by every tensor, on the CPU in double precision."""
    with backend(name), torch.set_grad_enabled(backward):
        if backward:
            tensors = {k: v.detach().requires_grad_() for k, v in tensors.items()}
            loss = functional(case.call(tensors), torch.Generator().manual_seed(0))
            found = dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))
        else:
            found = {str(i): out for i, out in enumerate(case.call(tensors))}
    return {k: v.cpu().to(_double(v)) for k, v in found.items()}


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Float32 that is float32: cuDNN's LSTM and convolutions otherwise round their factors to 10 bits."""
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


def _double(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _backends(op: str, device: torch.device) -> list[str]:
    """Those meant for a device, the preferred first, and the reference."""
    return [*(b.name for b in OPS[op].backends if b.runs_on(device.type)), "reference"]


def _known(names: Iterable[str], recurrences: list[Case], operators: list[OpCase]) -> set[str]:
    kinds = dict.fromkeys([*(c.kind for c in recurrences), *(c.op for c in operators)])
    known = [*kinds, *(c.name for c in recurrences), *(c.name for c in operators)]
    names = set(names)
    for name in sorted(names - set(known)):
        own = [other for other in known if other.split()[0] == name.split(maxsplit=1)[0]] if name.strip() else []
        near = difflib.get_close_matches(name, own or known, n=1, cutoff=0.0 if own else 0.6)
        hint = (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(kinds)}"
        raise ArgumentError(f"check: nothing is called {name!r}", hint=hint)
    return names


def _since(start: float) -> float:
    return time.perf_counter() - start
