"""The linear recurrence in Triton, real and complex: one pass, or, where channels do not fill the chip, two."""

import torch
from torch import Tensor

from dualform.ops.linear_scan import LinearScan, linear_scan_op
from dualform.ops.triton.support import add_backend, blocks, enter, kernels, owners, power_of_two, processors

_ROWS, _CHANNELS, _BYTES = 16, 32, 128  # steps and channels of a tile, and at most the bytes of one of its steps


class _Plan:
    """How a call is cut: spans of time, tiles, and what every kernel is told about both."""

    def __init__(self, args: LinearScan):
        a, b, h0 = args.a, args.b, args.h0
        self.rows, self.length, self.width = b.shape[0], b.shape[1], h0[0].numel()
        channels = min(power_of_two(self.width), _CHANNELS, _BYTES // max(a.element_size(), b.element_size()))
        steps = min(_ROWS, max(2, power_of_two(self.length)))
        self.columns = blocks(self.width, channels)
        programs, tiles, fill = self.rows * self.columns, blocks(self.length, steps), 2 * processors(b)
        spans = 1 if programs >= fill else min(blocks(8 * fill, programs), blocks(tiles, 4))
        self.steps = blocks(tiles, spans) * steps
        self.spans = blocks(self.length, self.steps)
        self.grid = (programs * self.spans,)
        self.flags = {
            "COMPLEX": h0.is_complex(),
            "A_COMPLEX": a.is_complex(),
            "B_COMPLEX": b.is_complex(),
            "BT": steps,
            "BD": channels,
            "num_warps": 1,
        }
        self.sizes = self.length, self.width, self.spans, self.steps
        self.reverse = args.reverse

    def entering(
        self, a: Tensor, b: Tensor, ends: Tensor, owner: Tensor | None, strides: tuple[int, ...], backward: bool
    ) -> Tensor:
        """What enters every span ``(B, spans, D)``, given what enters every sequence ``(rows, D)``; real views."""
        if self.spans == 1:
            return ends if owner is None else torch.zeros_like(ends[:1])
        decay, state = (ends.new_empty(self.rows * self.spans, *ends.shape[1:]) for _ in range(2))
        kernels("linear_scan").summarize[self.grid](
            a, b, ends, owner, decay, state, *self.sizes, *strides,
            DOWN=self.reverse != backward, BACKWARD=backward, **self.flags,
        )  # fmt: skip
        start, apart = ends if owner is None else None, int(self.flags["COMPLEX"])
        return enter(decay, state, self.rows, self.spans, packed=owner is not None, start=start, apart=apart)


def _forward(args: LinearScan) -> list[Tensor]:
    h = args.b.new_empty(args.b.shape, dtype=args.out_dtype)
    final = args.h0.clone(memory_format=torch.contiguous_format)  # of an empty sequence, its initial state
    if h.numel() == 0:
        return [h, final]
    plan, owner = _Plan(args), owners(args.packing, args.b.shape[1])
    (a, *a_strides), (b, *b_strides), start = _flat(args.a), _flat(args.b), _pairs(args.h0.contiguous())
    strides = (*a_strides, *b_strides)
    entering = plan.entering(a, b, start, owner, strides, False)
    kernels("linear_scan").forward[plan.grid](
        a, b, start, owner, entering, _pairs(h), _pairs(final), *plan.sizes, *strides, DOWN=args.reverse, **plan.flags
    )
    return [h, final]


def _backward(grads: list[Tensor], kept: list[Tensor], args: LinearScan) -> dict[str, Tensor]:
    dstart = grads[1].clone(memory_format=torch.contiguous_format)  # an empty sequence passes it on
    da, db = (x.new_empty(x.shape) for x in (args.a, args.b))
    found = {"a": da, "b": db, "h0": dstart}
    if db.numel() == 0:
        return found
    plan, owner = _Plan(args), owners(args.packing, db.shape[1])
    plan.flags["B_COMPLEX"] = args.h0.is_complex()
    (a, *strides), start, dfinal = _flat(args.a), _pairs(args.h0.contiguous()), _pairs(grads[1].contiguous())
    dh, h = _pairs(grads[0]), _pairs(kept[0])
    along = (*strides, plan.length * plan.width, plan.width, 1)
    entering = plan.entering(a, dh, dfinal, owner, along, True)
    kernels("linear_scan").backward[plan.grid](
        a, h, start, owner, entering, dh, dfinal, _pairs(da), _pairs(db), _pairs(dstart),
        *plan.sizes, *strides, DOWN=not args.reverse, **{**plan.flags, "B_COMPLEX": db.is_complex()},
    )  # fmt: skip
    return found


def _pairs(x: Tensor) -> Tensor:
    """The real numbers that a tensor consists of."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _flat(x: Tensor) -> tuple[Tensor, *tuple[int, ...]]:
    """``(B, T, ...)`` as real numbers, and the strides of its ``(B, T, D)``; axes that repeat themselves stay so."""
    flat = x.flatten(2) if x.dim() > 2 else x[..., None]
    return _pairs(flat), *flat.stride()


add_backend(linear_scan_op, forward=_forward, backward=_backward)
