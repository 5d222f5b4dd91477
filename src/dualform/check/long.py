"""Operators on more elements than 32 bits can count: one call over the whole sequence against two over its pieces."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dualform.core.deviation import Worst, worst
from dualform.ops.add_norm import add_norm
from dualform.ops.causal_conv1d import causal_conv1d
from dualform.ops.diagonal_ssm import diagonal_ssm
from dualform.ops.gated_delta_rule import gated_delta_rule
from dualform.ops.gated_norm import gated_norm
from dualform.ops.linear_scan import linear_scan
from dualform.ops.selective_scan import selective_scan
from dualform.ops.ssd import ssd
from dualform.ops.wkv7 import wkv7

ELEMENTS = 2**31  # a case has more, batch x length x width
WIDTH = 2048
_HEADS = 32
_AT_ONCE = 2**26  # elements that are compared at once


@dataclass(frozen=True)
class LongCase:
    """One operator on one sequence of 2048 numbers per step.

    Args:
        op: its name.
        function: the public function; it returns y and the final state, zeros where it has none.
        varying: names of arguments with a time axis, and their axes after it; y has those of the first.
        constant: makes the other tensors, float32.
        options: the other arguments.
        positive: those among the varying that lie between 0 and 1.
        stateless: whether steps do not depend on each other, so that the initial state has no gradient.
        half: whether its kernels take 16 bits alone: what they are given whatever was asked for.
    """

    op: str
    function: Callable[..., Any]
    varying: dict[str, tuple[int, ...]]
    constant: Callable[[], dict[str, Tensor]] = dict
    options: dict[str, Any] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    stateless: bool = False
    half: bool = False

    def bytes(self, dtype: torch.dtype, elements: int = ELEMENTS) -> int:
        """Memory that it takes: inputs, outputs, gradients and the pieces beside the whole, with some to spare."""
        wide = sum(math.prod(axes) == WIDTH for axes in self.varying.values())
        return int(elements * dtype.itemsize * (3.5 * wide + 5))


def _rates() -> dict[str, Tensor]:
    return {
        "A": -torch.rand(WIDTH, 16) - 0.1,
        "D": torch.randn(WIDTH),
        "delta_bias": torch.randn(WIDTH) - 4,
    }


def _heads() -> dict[str, Tensor]:
    return {"A": -torch.rand(_HEADS) - 0.1, "D": torch.randn(_HEADS), "dt_bias": torch.randn(_HEADS) - 4}


def _generalised(rate: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """With decays and rates between 0 and 1, and one key for the receptance, what is stored and what is replaced."""
    unit = torch.nn.functional.normalize(k, dim=-1)
    return wkv7(unit, -rate, k, v, -unit, unit * rate, **more)


def _replaced(v: Tensor, k: Tensor, beta: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """With one key of length 1 for queries and for what is replaced."""
    unit = torch.nn.functional.normalize(k, dim=-1)
    return gated_delta_rule(unit, unit, v, beta, -beta, **more)


def _modes() -> dict[str, Tensor]:
    poles = torch.complex(-torch.rand(WIDTH, 4, dtype=torch.float64) - 0.01, 6 * torch.rand(WIDTH, 4).double())
    return {"Abar": (0.1 * poles).exp().to(torch.complex64), "CB": torch.randn(WIDTH, 4, dtype=torch.complex64)}


def _summed(initial_state: Tensor | None = None, **given: Any) -> tuple[Tensor, Tensor]:
    y, _ = add_norm(**given)
    return y, 0 * y[:, -1:, :1]


def _gated(initial_state: Tensor | None = None, **given: Any) -> tuple[Tensor, Tensor]:
    y = gated_norm(**given)
    return y, 0 * y[:, -1:, :1]


def _norm() -> dict[str, Tensor]:
    return {"weight": torch.randn(WIDTH), "bias": torch.randn(WIDTH)}


CASES = (
    LongCase(
        "selective_scan",
        selective_scan,
        {"u": (WIDTH,), "delta": (WIDTH,), "B": (1, 16), "C": (1, 16), "z": (WIDTH,)},
        _rates,
        {"delta_softplus": True},
    ),
    LongCase(
        "ssd",
        ssd,
        {"x": (_HEADS, WIDTH // _HEADS), "dt": (_HEADS,), "B": (1, 16), "C": (1, 16)},
        _heads,
        {"dt_softplus": True},
        half=True,
    ),
    LongCase(
        "wkv7",
        _generalised,
        dict.fromkeys(("v", "k", "rate"), (_HEADS, WIDTH // _HEADS)),
        positive=("rate",),
        half=True,
    ),
    LongCase(
        "gated_delta_rule",
        _replaced,
        {"v": (_HEADS, WIDTH // _HEADS), "k": (_HEADS, WIDTH // _HEADS), "beta": (_HEADS,)},
        positive=("beta",),
        half=True,
    ),
    LongCase("linear_scan", linear_scan, {"a": (WIDTH,), "b": (WIDTH,)}, positive=("a",)),
    LongCase(
        "causal_conv1d",
        causal_conv1d,
        {"x": (WIDTH,)},
        lambda: {"weight": torch.randn(WIDTH, 4), "bias": torch.randn(WIDTH)},
        {"activation": "silu"},
    ),
    LongCase("diagonal_ssm", diagonal_ssm, {"u": (WIDTH,)}, _modes),
    LongCase("add_norm", _summed, {"x": (WIDTH,), "residual": (WIDTH,)}, _norm, stateless=True),
    LongCase("gated_norm", _gated, {"x": (WIDTH,), "z": (WIDTH,)}, _norm, stateless=True),
)


def split_error(case: LongCase, device: torch.device, dtype: torch.dtype, *, backward: bool, elements: int) -> Worst:
    """How far the whole is from its pieces: outputs and final state, or the gradients of everything.

    Args:
        case: the call.
        device: where it runs.
        dtype: of what varies with time.
        backward: compare gradients.
        elements: the sequence has at least as many, and an odd length.
    """
    length = elements // WIDTH + 65
    torch.manual_seed(0)
    given = {name: value.to(device) for name, value in case.constant().items()}
    for name, axes in case.varying.items():
        make = torch.rand if name in case.positive else torch.randn
        given[name] = make(1, length, *axes, device=device, dtype=dtype)
    cut = length // 2 + 1
    if not backward:
        with torch.no_grad():
            y, final = case.function(**given, **case.options)
            y1, middle = case.function(**_piece(case, given, 0, cut), **case.options)
            errors = [_far(y[:, :cut], y1, "output")]
            del y1
            y2, end = case.function(**_piece(case, given, cut, length), initial_state=middle, **case.options)
            return worst([*errors, _far(y[:, cut:], y2, "output"), _far(final, end, "final state")])
    dy = torch.randn(1, length, *next(iter(case.varying.values())), device=device, dtype=dtype)
    whole, _ = _gradients(case, given, None, dy, None)
    with torch.no_grad():
        _, middle = case.function(**_piece(case, given, 0, cut), **case.options)
    late, dmiddle = _gradients(case, _piece(case, given, cut, length), middle, dy[:, cut:], None)
    early, _ = _gradients(case, _piece(case, given, 0, cut), None, dy[:, :cut], dmiddle)
    errors = []
    for name, found in whole.items():
        if name in case.varying:
            errors += [_far(found[:, :cut], early[name], f"gradient of {name}")]
            errors += [_far(found[:, cut:], late[name], f"gradient of {name}")]
        else:
            errors += [_far(found, early[name] + late[name], f"gradient of {name}")]
    return worst(errors)


def _piece(case: LongCase, given: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {name: x[:, begin:end] if name in case.varying else x for name, x in given.items()}


def _gradients(
    case: LongCase, given: dict[str, Tensor], state: Tensor | None, dy: Tensor, dfinal: Tensor | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    start = None if state is None else state.detach().requires_grad_()
    out = case.function(**leaves, initial_state=start, **case.options)
    wanted = [*leaves.values(), *([] if start is None else [start])]
    pulled = [(out[0], dy), *([] if dfinal is None else [(out[1], dfinal)])]
    found = torch.autograd.grad(
        [y for y, _ in pulled], wanted, [g for _, g in pulled], materialize_grads=case.stateless
    )
    return dict(zip(leaves, found, strict=False)), None if start is None else found[-1]


def _far(got: Tensor, want: Tensor, where: str) -> Worst:
    """The greatest difference over the greatest value, without a copy of either."""
    rows = max(1, _AT_ONCE // max(1, want[0, 0].numel())) if want.dim() > 2 else want.shape[-1]
    pairs = zip(got.split(rows, 1), want.split(rows, 1), strict=True) if want.dim() > 2 else [(got, want)]
    error = top = 0.0
    for a, b in pairs:
        difference, largest = (a - b).abs().max().item(), b.abs().max().item()
        error, top = (difference if difference != difference else max(error, difference)), max(top, largest)
        if error != error:
            break
    return Worst(float("inf") if error != error else error / max(top, 1e-30), where)
