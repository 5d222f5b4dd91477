"""The selective scan in Triton: 32 channels a program, and spans of time side by side where channels are few."""

from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor

from dualform.ops.layout import inner_contiguous, lay, time_last
from dualform.ops.selective_scan import SelectiveScan, selective_scan_op
from dualform.ops.triton.support import add_backend, blocks, enter, kernels, owners, power_of_two, processors

_SAVE_EVERY = 64  # steps between the states that a backward starts from
_TOGETHER = 2  # steps whose states a backward holds in registers
_CHANNELS, _ELEMENTS = 32, 512  # of a program; elements of its states to each warp
_MOST_STATES = 256


def _strides(x: Tensor | None) -> tuple[Any, ...] | None:
    if x is None:
        return None
    x = inner_contiguous(x)
    return x, *x.stride()[:-1]


class _Plan:
    """How a call is cut, and what all of its kernels are told."""

    def __init__(self, a: SelectiveScan):
        a = a.over_time()
        (self.rows, self.length, self.width), states = a.u.shape, a.A.shape[1]
        per_b, per_c = self.width // a.B.shape[2], self.width // a.C.shape[2]
        self.per_both = gcd(per_b, per_c)  # channels that share a group of B and one of C
        channels, padded = min(_CHANNELS, power_of_two(self.per_both)), power_of_two(states)
        self.blocks = self.width // self.per_both * blocks(self.per_both, channels)
        self.tiles = blocks(self.length, _SAVE_EVERY)
        programs, fill = self.rows * self.blocks, 4 * processors(a.u)
        spans = 1 if programs >= fill else min(self.tiles, blocks(2 * fill, programs))
        self.steps = blocks(self.tiles, spans) * _SAVE_EVERY
        self.spans = blocks(self.length, self.steps)
        self.grid, self.carried = (programs * self.spans,), (self.rows, self.spans, states, self.width)
        self.u, self.delta, self.z, self.B, self.C = (_strides(m) for m in (a.u, a.delta, a.z, a.B, a.C))
        self.A, self.start, self.owner = a.A.T.contiguous(), a.h0.contiguous(), owners(a.packing, self.length)
        self.D, self.bias = (None if m is None else m.contiguous() for m in (a.D, a.delta_bias))
        self.sizes = self.length, self.width, self.per_both, per_b, per_c, self.spans, self.steps
        self.flags = {"SOFTPLUS": a.delta_softplus, "N": states, "NP": padded, "BD": channels}
        self.flags["num_warps"] = max(1, padded * channels // _ELEMENTS)

    def forward(self, entering: Tensor | None, *outputs: Tensor | None) -> None:
        kernels("selective_scan").forward[self.grid](
            self.u, self.delta, self.z, self.B, self.C, self.A, self.D, self.bias, self.start, self.owner, entering,
            *outputs, *self.sizes, K=_SAVE_EVERY, **self.flags,
        )  # fmt: skip


def _run(keep: bool, a: SelectiveScan) -> list[Tensor]:
    y, saved = a.u.new_empty(a.u.shape), _saved(a) if keep else []
    final = a.h0.clone(memory_format=torch.contiguous_format)  # of an empty sequence, its initial state
    if y.numel() == 0:
        return [lay(y, time_last(a.u)), final, *saved]
    plan, entering = _Plan(a), None
    if plan.spans > 1:
        decay, state = (a.h0.new_empty(plan.carried) for _ in range(2))
        plan.forward(None, None, None, None, decay, state)
        entering = enter(decay, state, plan.rows, plan.spans, packed=plan.owner is not None)
    plan.forward(entering, y, final, saved[0] if keep else None, None, None)
    return [lay(y, time_last(a.u)), final, *saved]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(a: SelectiveScan) -> list[Tensor]:
    return [a.h0.new_empty(a.u.shape[0], blocks(a.u.shape[1], _SAVE_EVERY), a.h0.shape[2], a.h0.shape[1])]


def _backward(grads: list[Tensor], kept: list[Tensor], a: SelectiveScan) -> dict[str, Tensor]:
    dstart = grads[1].clone(memory_format=torch.contiguous_format)  # an empty sequence passes it on
    if a.u.numel() == 0:
        return {**{f: torch.zeros_like(m) for f, m in a._asdict().items() if isinstance(m, Tensor)}, "h0": dstart}
    plan, entering, dfinal, new = _Plan(a), None, grads[1].contiguous(), a.h0.new_empty
    dy = lay(grads[0], False)
    du, ddelta = a.u.new_empty(a.u.shape), a.delta.new_empty(a.delta.shape)
    dz = None if a.z is None else a.z.new_empty(a.z.shape)
    states = a.A.shape[1]
    dB, dC = (new(plan.rows, plan.length, plan.blocks, states) for _ in range(2))
    partial = new(plan.rows * plan.spans, states + 2, plan.width)
    scratch = new(plan.grid[0], _SAVE_EVERY // _TOGETHER, plan.flags["NP"], plan.flags["BD"])
    if plan.spans > 1:
        decay, state = (new(plan.carried) for _ in range(2))
        length, width, per_both, _, per_c, spans, steps = plan.sizes
        kernels("selective_scan").adjoint[plan.grid](
            plan.delta, plan.z, plan.C, plan.A, plan.bias, plan.owner, dy, dfinal, decay, state,
            length, width, per_both, per_c, spans, steps, **plan.flags,
        )  # fmt: skip
        entering = enter(decay, state, plan.rows, plan.spans, packed=plan.owner is not None)
    kernels("selective_scan").backward[plan.grid](
        plan.u, plan.delta, plan.z, plan.B, plan.C, plan.A, plan.D, plan.bias, plan.start, plan.owner,
        entering, kept[0], scratch, dy, dfinal, du, ddelta, dz, dB, dC, partial, dstart, *plan.sizes,
        K=_SAVE_EVERY, S=_TOGETHER, **plan.flags,
    )  # fmt: skip
    total = partial.sum(0)
    dB, dC = (_of_map(g, m) for g, m in ((dB, a.B), (dC, a.C)))
    found = {"u": du, "delta": ddelta, "A": total[:-2].T, "B": dB, "C": dC, "h0": dstart}
    found |= {"D": total[-2], "delta_bias": total[-1]}
    return found if dz is None else {**found, "z": dz}


def _of_map(g: Tensor, m: Tensor) -> Tensor:
    """The gradient of B or C, from that of every program's channels ``(B, T, programs, N)``."""
    if m.dim() == 2:
        return g.sum((0, 1))
    return g.unflatten(2, (m.shape[2], -1)).sum(3)


def _refuses(a: SelectiveScan) -> str | None:
    if a.A.is_complex():
        return "A is complex"
    if not 0 < a.A.shape[1] <= _MOST_STATES:
        return f"N is {a.A.shape[1]}, expected 1 to {_MOST_STATES}"
    return None


add_backend(selective_scan_op, forward=_forward, backward=_backward, infer=_infer, saved=_saved, refuses=_refuses)
