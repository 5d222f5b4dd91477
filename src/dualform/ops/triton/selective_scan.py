"""The selective scan in Triton: 32 channels a program, and chunks of time side by side where channels are few."""

from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor

from dualform.ops.layout import inner_contiguous
from dualform.ops.op import Backend
from dualform.ops.selective_scan import selective_scan_op
from dualform.ops.triton.support import (
    DEVICES,
    blocks,
    kernels,
    missing,
    owners,
    power_of_two,
    processors,
)

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

    def __init__(self, *args: Any):
        u, delta, A, B, C, D, z, bias, softplus, h0, cu_seqlens = args
        (self.rows, self.length, self.width), states = u.shape, A.shape[1]
        per_b, per_c = self.width // B.shape[2], self.width // C.shape[2]
        self.cell = gcd(per_b, per_c)  # channels that share a group of B and one of C
        channels, padded = min(_CHANNELS, power_of_two(self.cell)), power_of_two(states)
        self.blocks = self.width // self.cell * blocks(self.cell, channels)
        self.segments = blocks(self.length, _SAVE_EVERY)
        programs, fill = self.rows * self.blocks, 4 * processors(u)
        chunks = 1 if programs >= fill else min(self.segments, blocks(2 * fill, programs))
        self.steps = blocks(self.segments, chunks) * _SAVE_EVERY
        self.chunks = blocks(self.length, self.steps)
        self.grid, self.carried = (programs * self.chunks,), (self.rows, self.chunks, states, self.width)
        self.u, self.delta, self.z, self.B, self.C = (_strides(m) for m in (u, delta, z, B, C))
        self.A, self.start, self.owner = A.T.contiguous(), h0.contiguous(), owners(cu_seqlens, self.length)
        self.D, self.bias = (None if m is None else m.contiguous() for m in (D, bias))
        self.sizes = self.length, self.width, self.cell, per_b, per_c, self.chunks, self.steps
        self.flags = {"SOFTPLUS": softplus, "N": states, "NP": padded, "BD": channels}
        self.flags["num_warps"] = max(1, padded * channels // _ELEMENTS)

    def forward(self, entering: Tensor | None, *outputs: Tensor | None) -> None:
        kernels("selective_scan").forward[self.grid](
            self.u, self.delta, self.z, self.B, self.C, self.A, self.D, self.bias, self.start, self.owner, entering,
            *outputs, *self.sizes, K=_SAVE_EVERY, **self.flags,
        )  # fmt: skip

    def entering(self, decay: Tensor, state: Tensor) -> Tensor:
        """What enters every chunk, from what every chunk does."""
        found, width = torch.empty_like(state), state.shape[2] * state.shape[3]
        kernels("chunks").enter[(self.rows * blocks(width, 128),)](
            decay, state, None, found, self.chunks, width, 1, 0, COMPLEX=False, START=False, BD=128
        )
        return found


def _run(keep: bool, *args: Any) -> list[Tensor]:
    u, h0 = args[0], args[9]
    y, saved = u.new_empty(u.shape), _saved(*args) if keep else []
    final = h0.clone(memory_format=torch.contiguous_format)  # of an empty sequence, its initial state
    if u.numel() == 0:
        return [y, final, *saved]
    plan, entering = _Plan(*args), None
    if plan.chunks > 1:
        decay, state = (h0.new_empty(plan.carried) for _ in range(2))
        plan.forward(None, None, None, None, decay, state)
        entering = plan.entering(decay, state)
    plan.forward(entering, y, final, saved[0] if keep else None, None, None)
    return [y, final, *saved]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(*args: Any) -> list[Tensor]:
    u, h0 = args[0], args[9]
    return [h0.new_empty(u.shape[0], blocks(u.shape[1], _SAVE_EVERY), h0.shape[2], h0.shape[1])]


def _backward(grads: list[Tensor], kept: list[Tensor], *args: Any) -> list[Tensor]:
    u, delta, A, B, C, D, z, bias, _, h0, _ = args
    dstart = grads[1].clone(memory_format=torch.contiguous_format)  # an empty sequence passes it on
    if u.numel() == 0:
        given = (u, delta, A, B, C, D, z, bias)
        return [*(torch.zeros_like(m, memory_format=torch.contiguous_format) for m in given if m is not None), dstart]
    plan, entering, dfinal = _Plan(*args), None, grads[1].contiguous()
    du, ddelta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    dz = None if z is None else z.new_empty(z.shape)
    states = A.shape[1]
    dB, dC = (h0.new_empty(plan.rows, plan.length, plan.blocks, states) for _ in range(2))
    partial = h0.new_empty(plan.rows * plan.chunks, states + 2, plan.width)
    scratch = h0.new_empty(plan.grid[0], _SAVE_EVERY // _TOGETHER, plan.flags["NP"], plan.flags["BD"])
    if plan.chunks > 1:
        decay, state = (h0.new_empty(plan.carried) for _ in range(2))
        length, width, cell, _, per_c, chunks, steps = plan.sizes
        kernels("selective_scan").adjoint[plan.grid](
            plan.delta, plan.z, plan.C, plan.A, plan.bias, plan.owner, grads[0], dfinal, decay, state,
            length, width, cell, per_c, chunks, steps, **plan.flags,
        )  # fmt: skip
        entering = plan.entering(decay, state)
    kernels("selective_scan").backward[plan.grid](
        plan.u, plan.delta, plan.z, plan.B, plan.C, plan.A, plan.D, plan.bias, plan.start, plan.owner,
        entering, kept[0], scratch, grads[0], dfinal, du, ddelta, dz, dB, dC, partial, dstart, *plan.sizes,
        K=_SAVE_EVERY, S=_TOGETHER, **plan.flags,
    )  # fmt: skip
    total = partial.sum(0)
    maps = (g.unflatten(2, (m.shape[2], -1)).sum(3).to(m.dtype) for g, m in ((dB, B), (dC, C)))
    found = [du, ddelta, total[:-2].T.to(A.dtype).contiguous(), *maps]
    found += [] if D is None else [total[-2].to(D.dtype)]
    found += [] if dz is None else [dz]
    found += [] if bias is None else [total[-1].to(bias.dtype)]
    return [*found, dstart]


def _refuses(*args: Any) -> str | None:
    A, C = args[2], args[4]
    if A.is_complex() or C.is_complex():
        return "A is complex"
    if not 0 < A.shape[1] <= _MOST_STATES:
        return f"N is {A.shape[1]}, expected 1 to {_MOST_STATES}"
    return None


selective_scan_op.add(
    Backend("triton", _forward, _backward, _infer, _saved, devices=DEVICES, refuses=_refuses, missing=missing)
)
