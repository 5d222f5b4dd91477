"""What is not finite stays where the definition lets it go: in its own sequence or row, and after its own step.

One number of one sequence becomes NaN or infinite; wherever the reference is finite all the same, a kernel is finite
and equal. A product with a mask, a padded lane, or a sum over a whole tile would spread it.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dualform.ops import backend as forced
from dualform.ops import causal_conv1d_update, selective_state_update
from dualform.ops.native import library
from test_native import (
    INSTRUCTIONS,
    conv,
    diagonal,
    differentiable,
    double,
    dual,
    evaluate,
    linear,
    normal,
    scan,
    weights_for,
)

pytestmark = pytest.mark.skipif(bool(library.missing), reason=library.missing)

BORDERS = [0, 5, 5, 42, 70]
SEQUENCE, STEP = 2, 20  # what is planted, and where: inside a tile of every kernel, with a sequence before and behind
COMPLEX = (torch.complex64, torch.complex64)

# An odd number of channels and of states, so that the last vector and the last block have lanes to spare.
CASES: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "scan": ("selective_scan", lambda: scan(3, 40, 17, 3, around="Dzbs")),
    "scan packed": ("selective_scan", lambda: scan(1, 70, 17, 3, borders=BORDERS)),
    "scan packed gate": ("selective_scan", lambda: scan(1, 70, 5, 17, borders=BORDERS, around="Dzbs")),
    "linear": ("linear_scan", lambda: linear(3, 40, (17,))),
    "linear packed": ("linear_scan", lambda: linear(1, 70, (5, 7), borders=BORDERS)),
    "linear packed back": ("linear_scan", lambda: linear(1, 70, (3,), COMPLEX, borders=BORDERS, reverse=True)),
    "dual": ("ssd", lambda: dual(3, 40, 4, 3, 5, 2)),
    "dual packed": ("ssd", lambda: dual(1, 70, 4, 5, 3, 2, borders=BORDERS)),
    "diagonal": ("diagonal_ssm", lambda: diagonal(3, 40, 17, 3)),
    "diagonal packed": ("diagonal_ssm", lambda: diagonal(1, 70, 17, 3, borders=BORDERS)),
    "conv": ("causal_conv1d", lambda: conv(3, 40, 17, 4, silu=True)),
    "conv packed": ("causal_conv1d", lambda: conv(1, 70, 17, 4, borders=BORDERS)),
    "conv packed width 3": ("causal_conv1d", lambda: conv(1, 70, 5, 3, borders=BORDERS, silu=True)),
}


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    library.choose(request.param)
    yield request.param
    library.choose()


def planted(x: Tensor, batch: int, length: int, value: float) -> Tensor | None:
    """A copy of ``x`` with the value in one place of the sequence; None for a tensor that all sequences share."""
    x = x.clone()
    if x.dim() > 1 and x.shape[:2] == (batch, length):
        place = x[0, STEP] if batch == 1 else x[1, STEP]
    elif x.dim() > 1 and len(x) == (len(BORDERS) - 1 if batch == 1 else batch):
        place = x[SEQUENCE if batch == 1 else 1]
    else:
        return None
    place.flatten()[-1] = value
    return x


@cache
def truths(case: str, value: float) -> list[tuple[str, tuple[Any, ...], list[Tensor], list[Tensor]]]:
    """For every tensor that has sequences: its place, arguments and weights with the value in it, and the truth."""
    torch.manual_seed(1)
    op, make = CASES[case]
    args = make()
    weights, found = weights_for(op, args), []
    batch, length = next(a.shape[:2] for a in args if isinstance(a, Tensor))
    for i, x in enumerate([*args, *weights]):
        changed = planted(x, batch, length, value) if differentiable(x) else None
        if changed is not None:
            every = [*args, *weights]
            every[i] = changed
            given, shares = tuple(every[: len(args)]), every[len(args) :]
            truth = evaluate(op, tuple(map(double, given)), "reference", [double(w) for w in shares])
            found.append((f"argument {i}", given, shares, truth))
    return found


def others(x: Tensor, batch: int, length: int) -> Tensor:
    """What belongs to no single sequence, or to another one than that with the value."""
    if x.dim() > 1 and x.shape[:2] == (batch, length):
        begin, end = BORDERS[SEQUENCE : SEQUENCE + 2]
        return torch.cat([x[:, :begin], x[:, end:]], 1) if batch == 1 else x[[0, 2]]
    if x.dim() > 1 and len(x) == (len(BORDERS) - 1 if batch == 1 else batch):
        return torch.cat([x[:SEQUENCE], x[SEQUENCE + 1 :]]) if batch == 1 else x[[0, 2]]
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", CASES)
def test_it_stays_in_its_sequence(case, value, instructions):
    op, _ = CASES[case]
    for where, args, weights, truth in truths(case, value):
        got = evaluate(op, args, "native", weights)
        batch, length = got[0].shape[:2]
        for i, (a, b) in enumerate(zip(got, truth, strict=True)):
            if op == "ssd" and i >= 2:  # a gradient may spread over its chunk
                a, b = (others(x, batch, length) for x in (a, b))
            finite = b.isfinite()
            assert a[finite].isfinite().all(), f"{where}: result {i} at {(finite & ~a.isfinite()).nonzero()[:4]}"
            if finite.any():
                error = (double(a[finite]) - b[finite]).abs().max() / b[finite].abs().max().clamp(min=1e-30)
                assert error <= 1e-4, f"{where}: result {i}"
        assert others(got[0], batch, length).isfinite().all(), where


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("by_head", [False, True])
def test_one_step_stays_in_its_row(by_head, value, instructions):
    heads = (3, 5) if by_head else (17,)
    one = (3, 1) if by_head else heads
    state, x, z = normal(3, *heads, 3), normal(3, *heads), normal(3, *heads)
    dt, A, maps = torch.rand(3, *one), -torch.rand(*one, 1 if by_head else 3), normal(2, 3, 1, 3)
    conv_state, weight = normal(3, 17, 3), normal(17, 4)
    steps: list[tuple[Callable[..., Any], list[Tensor], dict[str, Tensor]]] = [
        (selective_state_update, [state, x, dt, A, *maps], {"z": z}),
        (causal_conv1d_update, [normal(3, 17), conv_state, weight], {}),
    ]
    for update, args, more in steps:
        with torch.no_grad(), forced("native"):
            want = update(*args, **more)
            for i in [i for i, x in enumerate(args) if len(x) == 3 and x is not A]:
                given = [x.clone() for x in args]
                given[i][1].flatten()[-1] = value
                got = update(*given, **more)
                assert not (got[0][1].isfinite().all() and got[1][1].isfinite().all())
                for a, b in zip(got, want, strict=True):
                    assert torch.equal(a[[0, 2]], b[[0, 2]])
