"""The linear recurrence in Triton, real and complex: one pass, or, where channels do not fill the chip, two."""

import torch
from torch import Tensor

from dualform.ops.linear_scan import linear_scan_op
from dualform.ops.op import Backend
from dualform.ops.triton.support import DEVICES, blocks, kernels, missing, owners, power_of_two, processors

_ROWS, _CHANNELS, _BYTES = 16, 32, 128  # steps and channels of a tile, and at most the bytes of one of its steps


class _Plan:
    """How a call is cut: chunks of time, tiles, and what every kernel is told about both."""

    def __init__(self, a: Tensor, b: Tensor, h0: Tensor, reverse: bool):
        self.rows, self.length, self.width = b.shape[0], b.shape[1], h0[0].numel()
        channels = min(power_of_two(self.width), _CHANNELS, _BYTES // max(a.element_size(), b.element_size()))
        steps = min(_ROWS, max(2, power_of_two(self.length)))
        self.columns = blocks(self.width, channels)
        programs, tiles, fill = self.rows * self.columns, blocks(self.length, steps), 2 * processors(b)
        chunks = 1 if programs >= fill else min(blocks(8 * fill, programs), blocks(tiles, 4))
        self.steps = blocks(tiles, chunks) * steps
        self.chunks = blocks(self.length, self.steps)
        self.grid = (programs * self.chunks,)
        self.flags = {
            "COMPLEX": h0.is_complex(),
            "A_COMPLEX": a.is_complex(),
            "B_COMPLEX": b.is_complex(),
            "BT": steps,
            "BD": channels,
            "num_warps": 1,
        }
        self.sizes = self.length, self.width, self.chunks, self.steps
        self.reverse = reverse

    def entering(
        self, a: Tensor, b: Tensor, ends: Tensor, owner: Tensor | None, strides: tuple[int, ...], backward: bool
    ) -> Tensor:
        """What enters every chunk ``(B, chunks, D)``, given what enters every sequence ``(rows, D)``; real views."""
        if self.chunks == 1:
            return ends if owner is None else torch.zeros_like(ends[:1])
        decay, state, entering = (ends.new_empty(self.rows * self.chunks, *ends.shape[1:]) for _ in range(3))
        kernels("linear_scan").summarize[self.grid](
            a, b, ends, owner, decay, state, *self.sizes, *strides,
            DOWN=self.reverse != backward, BACKWARD=backward, **self.flags,
        )  # fmt: skip
        kernels("chunks").enter[(self.rows * blocks(self.width, 128),)](
            decay, state, ends, entering, self.chunks, self.width, 1 + self.flags["COMPLEX"], 1,
            COMPLEX=self.flags["COMPLEX"], START=owner is None, BD=128,
        )  # fmt: skip
        return entering


def _forward(a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> list[Tensor]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    dtype = torch.promote_types(dtype, h0.dtype) if h0.is_complex() else dtype
    h = b.new_empty(b.shape, dtype=dtype)
    if h.numel() == 0:
        return [h, h0.clone(memory_format=torch.contiguous_format)]
    final = h0.clone(memory_format=torch.contiguous_format)  # of an empty sequence, its initial state
    plan, owner = _Plan(a, b, h0, reverse), owners(cu_seqlens, b.shape[1])
    (a, *a_strides), (b, *b_strides), start = _flat(a), _flat(b), _pairs(h0.contiguous())
    strides = (*a_strides, *b_strides)
    entering = plan.entering(a, b, start, owner, strides, False)
    kernels("linear_scan").forward[plan.grid](
        a, b, start, owner, entering, _pairs(h), _pairs(final), *plan.sizes, *strides, DOWN=reverse, **plan.flags
    )
    return [h, final]


def _backward(
    grads: list[Tensor], kept: list[Tensor], a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> list[Tensor]:
    dstart = grads[1].clone(memory_format=torch.contiguous_format)  # an empty sequence passes it on
    da, db = (x.new_empty(x.shape) for x in (a, b))
    if b.numel() == 0:
        return [da, db, dstart]
    plan, owner = _Plan(a, b, h0, reverse), owners(cu_seqlens, b.shape[1])
    plan.flags["B_COMPLEX"] = h0.is_complex()
    (flat_a, *strides), start, dfinal = _flat(a), _pairs(h0.contiguous()), _pairs(grads[1].contiguous())
    dh, h = _pairs(grads[0]), _pairs(kept[0])
    along = (*strides, plan.length * plan.width, plan.width, 1)
    entering = plan.entering(flat_a, dh, dfinal, owner, along, True)
    kernels("linear_scan").backward[plan.grid](
        flat_a, h, start, owner, entering, dh, dfinal, _pairs(da), _pairs(db), _pairs(dstart),
        *plan.sizes, *strides, DOWN=not reverse, **{**plan.flags, "B_COMPLEX": b.is_complex()},
    )  # fmt: skip
    return [da, db, dstart]


def _pairs(x: Tensor) -> Tensor:
    """The real numbers that a tensor consists of."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _flat(x: Tensor) -> tuple[Tensor, *tuple[int, ...]]:
    """``(B, T, ...)`` as real numbers, and the strides of its ``(B, T, D)``; axes that repeat themselves stay so."""
    flat = x.flatten(2) if x.dim() > 2 else x[..., None]
    return _pairs(flat), *flat.stride()


linear_scan_op.add(Backend("triton", _forward, _backward, devices=DEVICES, missing=missing))
