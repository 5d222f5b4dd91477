"""The diagonal state space model in Triton: its recurrence, chunks of time side by side where channels are few."""

from functools import partial

import torch
from torch import Tensor

from dualform.ops.diagonal_ssm import diagonal_ssm_op
from dualform.ops.layout import inner_contiguous
from dualform.ops.op import Backend
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
_CHANNELS, _ELEMENTS = 16, 256  # of a program; elements of its states to each warp
_MOST_STATES = 256


class _Plan:
    """How a call is cut, and what all of its kernels are told."""

    def __init__(self, u: Tensor, Abar: Tensor, CB: Tensor, h0: Tensor, cu_seqlens: Tensor | None):
        (self.rows, self.length, self.width), states = u.shape, Abar.shape[1]
        channels, padded = min(_CHANNELS, power_of_two(self.width)), power_of_two(states)
        segments, programs = blocks(self.length, _SAVE_EVERY), self.rows * blocks(self.width, channels)
        fill = 4 * processors(u)
        chunks = 1 if programs >= fill else min(segments, blocks(2 * fill, programs))
        steps = blocks(segments, chunks) * _SAVE_EVERY
        self.chunks = blocks(self.length, steps)
        self.grid, self.carried = (programs * self.chunks,), (self.rows * self.chunks, 2, states, self.width)
        self.u, self.A, self.C, self.start = inner_contiguous(u), _planes(Abar), _planes(CB), _planes(h0)
        self.owner = owners(cu_seqlens, self.length)
        self.sizes = self.length, self.width, self.u.stride(0), self.u.stride(1), self.chunks, steps
        self.flags = {"N": states, "NP": padded, "BD": channels}
        self.flags["num_warps"] = max(1, padded * channels // _ELEMENTS)

    def forward(self, entering: Tensor | None, *outputs: Tensor | None) -> None:
        kernels("diagonal_ssm").forward[self.grid](
            self.u, self.A, self.C, self.start, self.owner, entering, *outputs, *self.sizes, K=_SAVE_EVERY, **self.flags
        )

    def entering(self, decay: Tensor, state: Tensor) -> Tensor:
        """What enters every chunk, from what every chunk does."""
        found, width = torch.empty_like(state), state.shape[2] * state.shape[3]
        kernels("chunks").enter[(self.rows * blocks(width, 128),)](
            decay, state, None, found, self.chunks, width, 1, width, COMPLEX=True, START=False, BD=128
        )
        return found


def _planes(x: Tensor) -> Tensor:
    """``(..., D, N)`` complex -> ``(..., 2, N, D)``."""
    return torch.view_as_real(x.resolve_conj()).transpose(-1, -3).contiguous()


def _numbers(planes: Tensor) -> Tensor:
    """The inverse of :func:`_planes`."""
    return torch.view_as_complex(planes.transpose(-1, -3).contiguous())


def _run(keep: bool, u: Tensor, Abar: Tensor, CB: Tensor, h0: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    saved = _saved(u, Abar, CB, h0, cu_seqlens) if keep else []
    if u.numel() == 0 or h0.numel() == 0:
        return [u.new_zeros(u.shape), h0.clone(memory_format=torch.contiguous_format), *saved]
    plan, y, entering = _Plan(u, Abar, CB, h0, cu_seqlens), u.new_empty(u.shape), None
    final = plan.start.clone()  # of an empty sequence, its initial state
    if plan.chunks > 1:
        decay, state = (final.new_empty(plan.carried) for _ in range(2))
        plan.forward(None, None, None, None, decay, state)
        entering = plan.entering(decay, state)
    plan.forward(entering, y, final, saved[0] if keep else None, None, None)
    return [y, _numbers(final), *saved]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(u: Tensor, Abar: Tensor, CB: Tensor, h0: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    return [h0.real.new_empty(u.shape[0], blocks(u.shape[1], _SAVE_EVERY), 2, h0.shape[2], h0.shape[1])]


def _backward(
    grads: list[Tensor],
    kept: list[Tensor],
    u: Tensor,
    Abar: Tensor,
    CB: Tensor,
    h0: Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    if u.numel() == 0 or h0.numel() == 0:
        return [*(x.new_zeros(x.shape) for x in (u, Abar, CB)), grads[1].clone()]
    plan, du, entering = _Plan(u, Abar, CB, h0, cu_seqlens), u.new_empty(u.shape), None
    dfinal = _planes(grads[1])
    dstart = dfinal.clone()  # an empty sequence passes it on
    states, padded, channels = (plan.flags[k] for k in ("N", "NP", "BD"))
    partial = dfinal.new_empty(plan.rows * plan.chunks, 2, 2, states, plan.width)
    scratch = dfinal.new_empty(plan.grid[0], _SAVE_EVERY // _TOGETHER, 2, padded, channels)
    if plan.chunks > 1:
        decay, state = (dfinal.new_empty(plan.carried) for _ in range(2))
        kernels("diagonal_ssm").adjoint[plan.grid](
            plan.A, plan.C, plan.owner, grads[0], dfinal, decay, state, *plan.sizes[:2], *plan.sizes[4:],
            **plan.flags,
        )  # fmt: skip
        entering = plan.entering(decay, state)
    kernels("diagonal_ssm").backward[plan.grid](
        plan.u, plan.A, plan.C, plan.start, plan.owner, entering, kept[0], scratch, grads[0], dfinal, du, partial,
        dstart, *plan.sizes, K=_SAVE_EVERY, S=_TOGETHER, **plan.flags,
    )  # fmt: skip
    dA, dC = _numbers(partial.sum(0))
    return [du, dA, dC, _numbers(dstart)]


def _refuses(u: Tensor, Abar: Tensor, CB: Tensor, h0: Tensor, cu_seqlens: Tensor | None) -> str | None:
    return f"N is {Abar.shape[1]}, expected at most {_MOST_STATES}" if Abar.shape[1] > _MOST_STATES else None


diagonal_ssm_op.add(
    Backend("triton", _forward, _backward, _infer, _saved, devices=DEVICES, refuses=_refuses, missing=missing)
)
