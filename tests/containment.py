"""What is not finite stays in its sequence or row, and reaches nothing earlier: one check for every kernel.

Planted in one sequence, in all that the kernels are given of one step, or of its state, or of the gradients that come
in; every other sequence must get what it gets without.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dualform.ops.op import Op


def sequences(a: Any) -> list[tuple[int, int, int]]:
    """Row of the tensors, begin and end of every sequence."""
    batch, length = a[0].shape[:2]
    if a.packing is None:
        return [(b, 0, length) for b in range(batch)]
    return [(0, begin, end) for begin, end in pairwise(a.packing.cu_seqlens.tolist())]


def check_contained(
    op: Op,
    a: Any,
    forward: Callable[[Any], list[Tensor]],
    backward: Callable[..., dict[str, Tensor]],
    *,
    chunk: int = 1,
    channels: bool = False,
    values: tuple[float, ...] = (float("nan"), float("inf")),
) -> None:
    """Plant in the middle of the longest sequence.

    Args:
        op: the operator.
        a: its record; the length must differ from all other sizes.
        forward: of the backend.
        backward: of the backend.
        chunk: steps that see each other: what is planted may reach the earlier ones.
        channels: whether channels, on the last axis, do not see each other either.
        values: what is planted, one after the other.
    """
    spans = sequences(a)
    longest = max(range(len(spans)), key=lambda i: spans[i][2] - spans[i][1])
    row, begin, end = spans[longest]
    t, length = (begin + end) // 2, a[0].shape[1]
    timed = [name for name, m in op.differentiable(a) if m.dim() > 2 and m.shape[1] == length and name != "h0"]

    def run(a: Any, dy: Tensor, dfinal: Tensor) -> dict[str, Tensor]:
        results = forward(a)
        kept = [results[i] for i in op.keeps] + results[op.outputs :]
        y, final = results[: op.outputs]
        return {"y": y, "final": final, **backward([dy, dfinal], kept, a)}

    dy, dfinal = (torch.randn_like(m) for m in op.fake(a))
    want = run(a, dy, dfinal)

    def unharmed(found: dict[str, Tensor], name: str, here: Tensor) -> None:
        got, exact = (m[name][here.expand(m[name].shape)] for m in (found, want))
        assert torch.isfinite(torch.view_as_real(got) if got.is_complex() else got).all(), name
        torch.testing.assert_close(got, exact, msg=lambda text: f"{name}: {text}")

    def others_unharmed(found: dict[str, Tensor]) -> None:
        for name in ("y", *timed):
            here = torch.ones(want[name].shape[:2], dtype=torch.bool, device=dy.device)
            here[row, begin:end] = False
            unharmed(found, name, here.view(*here.shape, *[1] * (want[name].dim() - 2)))
        for name in ("final", "h0"):
            here = torch.arange(len(spans), device=dy.device) != longest
            unharmed(found, name, here.view(-1, *[1] * (want[name].dim() - 1)))

    reverse = getattr(a, "reverse", False)
    for value in values:

        def planted(m: Tensor, *places: tuple[int, ...], value: float = value) -> Tensor:
            m = m.clone()
            for at in places:
                m[(*at, *[0] * (m.dim() - len(at)))] = value
            return m

        # In the inputs of a step in the middle, and of the last one, behind which kernels run on with what is masked.
        places = (row, t), (row, begin if reverse else end - 1)
        found = run(a._replace(**{name: planted(getattr(a, name), *places) for name in timed}), dy, dfinal)
        assert not torch.isfinite(found["y"][row, t]).all()
        others_unharmed(found)
        before = torch.zeros(want["y"].shape[:2], dtype=torch.bool, device=dy.device)
        if reverse:
            before[row, t + 1 : end] = True
        else:
            before[row, begin : begin + (t - begin) // chunk * chunk] = True
        unharmed(found, "y", before.view(*before.shape, *[1] * (dy.dim() - 2)))
        if channels:
            assert torch.isfinite(found["y"][..., 1:]).all()

        # In the state, in the first step, and in all gradients that come in.
        harmed = {name: planted(getattr(a, name), (row, begin)) for name in timed}
        steps = (row, begin), (row, t), (row, end - 1)
        harmed = a._replace(**harmed, h0=planted(a.h0, (longest,)))
        others_unharmed(run(harmed, planted(dy, *steps), planted(dfinal, (longest,))))


def check_contained_in_runs(
    a: Any, forward: Callable[[Any], list[Tensor]], backward: Callable[..., dict[str, Tensor]]
) -> None:
    """Plant in all steps of one id, padding included, where ids divide rows into sequences."""
    torch.manual_seed(0)
    dy, dfinal = torch.randn_like(a.x), torch.randn_like(a.h0)
    y, final = forward(a)
    want = backward([dy, dfinal], [], a)
    for planted in (-1, 0, 1):
        harmed = a.ids == planted
        assert harmed.any()
        x, there = a.x.masked_fill(harmed[..., None], torch.nan), dy.masked_fill(harmed[..., None], torch.nan)
        got_y, got_final = forward(a._replace(x=x))
        found = backward([there, dfinal], [], a._replace(x=x))
        for got, exact in ((got_y, y), (found["x"], want["x"])):
            torch.testing.assert_close(got[~harmed], exact[~harmed])
            if planted < 0:
                assert not got[harmed].any()
        ends = a.ids[:, -1] != planted
        torch.testing.assert_close(got_final[ends], final[ends])
        begins = a.ids[:, 0] != planted
        torch.testing.assert_close(found["h0"][begins], want["h0"][begins])
        if planted < 0:
            torch.testing.assert_close(found["weight"], want["weight"])
