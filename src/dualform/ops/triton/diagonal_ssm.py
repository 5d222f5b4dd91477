"""The diagonal state space model in Triton: its recurrence, spans of time side by side where channels are few."""

from functools import partial

import torch
from torch import Tensor

from dualform.ops.diagonal_ssm import DiagonalSSM, diagonal_ssm_op
from dualform.ops.layout import inner_contiguous
from dualform.ops.triton.support import add_backend, blocks, enter, kernels, owners, power_of_two, processors

_SAVE_EVERY = 64  # steps between the states that a backward starts from
_TOGETHER = 2  # steps whose states a backward holds in registers
_CHANNELS, _ELEMENTS = 16, 256  # of a program; elements of its states to each warp
_MOST_STATES = 256


class _Plan:
    """How a call is cut, and what all of its kernels are told."""

    def __init__(self, a: DiagonalSSM):
        (self.rows, self.length, self.width), states = a.u.shape, a.Abar.shape[1]
        channels, padded = min(_CHANNELS, power_of_two(self.width)), power_of_two(states)
        tiles, programs = blocks(self.length, _SAVE_EVERY), self.rows * blocks(self.width, channels)
        fill = 4 * processors(a.u)
        spans = 1 if programs >= fill else min(tiles, blocks(2 * fill, programs))
        steps = blocks(tiles, spans) * _SAVE_EVERY
        self.spans = blocks(self.length, steps)
        self.grid, self.carried = (programs * self.spans,), (self.rows * self.spans, 2, states, self.width)
        self.u, self.A, self.C, self.start = inner_contiguous(a.u), _planes(a.Abar), _planes(a.CB), _planes(a.h0)
        self.owner = owners(a.packing, self.length)
        self.sizes = self.length, self.width, self.u.stride(0), self.u.stride(1), self.spans, steps
        self.flags = {"N": states, "NP": padded, "BD": channels}
        self.flags["num_warps"] = max(1, padded * channels // _ELEMENTS)

    def forward(self, entering: Tensor | None, *outputs: Tensor | None) -> None:
        kernels("diagonal_ssm").forward[self.grid](
            self.u, self.A, self.C, self.start, self.owner, entering, *outputs, *self.sizes, K=_SAVE_EVERY, **self.flags
        )


def _planes(x: Tensor) -> Tensor:
    """``(..., D, N)`` complex -> ``(..., 2, N, D)``."""
    return torch.view_as_real(x.resolve_conj()).transpose(-1, -3).contiguous()


def _numbers(planes: Tensor) -> Tensor:
    """The inverse of :func:`_planes`."""
    return torch.view_as_complex(planes.transpose(-1, -3).contiguous())


def _run(keep: bool, a: DiagonalSSM) -> list[Tensor]:
    saved = _saved(a) if keep else []
    if a.u.numel() == 0 or a.h0.numel() == 0:
        return [a.u.new_zeros(a.u.shape), a.h0.clone(memory_format=torch.contiguous_format), *saved]
    plan, y, entering = _Plan(a), a.u.new_empty(a.u.shape), None
    final = plan.start.clone()  # of an empty sequence, its initial state
    if plan.spans > 1:
        decay, state = (final.new_empty(plan.carried) for _ in range(2))
        plan.forward(None, None, None, None, decay, state)
        entering = enter(
            decay, state, plan.rows, plan.spans, packed=plan.owner is not None, apart=plan.flags["N"] * plan.width
        )
    plan.forward(entering, y, final, saved[0] if keep else None, None, None)
    return [y, _numbers(final), *saved]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(a: DiagonalSSM) -> list[Tensor]:
    return [a.h0.real.new_empty(a.u.shape[0], blocks(a.u.shape[1], _SAVE_EVERY), 2, a.h0.shape[2], a.h0.shape[1])]


def _backward(grads: list[Tensor], kept: list[Tensor], a: DiagonalSSM) -> dict[str, Tensor]:
    if a.u.numel() == 0 or a.h0.numel() == 0:
        du, dA, dC = (torch.zeros_like(m) for m in (a.u, a.Abar, a.CB))
        return {"u": du, "Abar": dA, "CB": dC, "h0": grads[1].clone()}
    plan, du, entering = _Plan(a), a.u.new_empty(a.u.shape), None
    dfinal = _planes(grads[1])
    dstart = dfinal.clone()  # an empty sequence passes it on
    states, padded, channels = (plan.flags[k] for k in ("N", "NP", "BD"))
    partial = dfinal.new_empty(plan.rows * plan.spans, 2, 2, states, plan.width)
    scratch = dfinal.new_empty(plan.grid[0], _SAVE_EVERY // _TOGETHER, 2, padded, channels)
    if plan.spans > 1:
        decay, state = (dfinal.new_empty(plan.carried) for _ in range(2))
        kernels("diagonal_ssm").adjoint[plan.grid](
            plan.A, plan.C, plan.owner, grads[0], dfinal, decay, state, *plan.sizes[:2], *plan.sizes[4:],
            **plan.flags,
        )  # fmt: skip
        entering = enter(
            decay, state, plan.rows, plan.spans, packed=plan.owner is not None, apart=plan.flags["N"] * plan.width
        )
    kernels("diagonal_ssm").backward[plan.grid](
        plan.u, plan.A, plan.C, plan.start, plan.owner, entering, kept[0], scratch, grads[0], dfinal, du, partial,
        dstart, *plan.sizes, K=_SAVE_EVERY, S=_TOGETHER, **plan.flags,
    )  # fmt: skip
    dA, dC = _numbers(partial.sum(0))
    return {"u": du, "Abar": dA, "CB": dC, "h0": _numbers(dstart)}


def _refuses(a: DiagonalSSM) -> str | None:
    return f"N is {a.Abar.shape[1]}, expected at most {_MOST_STATES}" if a.Abar.shape[1] > _MOST_STATES else None


add_backend(diagonal_ssm_op, forward=_forward, backward=_backward, infer=_infer, saved=_saved, refuses=_refuses)
