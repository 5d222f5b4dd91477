"""A recurrence over a long sequence span by span, in bounded memory, forward and backward."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.packing import Borders, Packing
from dualform.layers.mixer import exactly

Run = Callable[..., tuple[Tensor, Tensor]]  # (state, packing or None, *inputs, *weights) -> (y, state)

_CPU_ELEMENTS = 2**20  # of (B, span, width) held at once
_GPU_ELEMENTS = 2**22  # elsewhere, where launches cost more


def in_spans(
    run: Run,
    state: Tensor,
    inputs: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    *,
    width: int,
    packing: Borders = None,
) -> tuple[Tensor, Tensor]:
    """``run(state, packing, *inputs, *weights)``, by spans of time where the sequence is long.

    Between spans only states are kept; what ``run`` makes inside a span is made again by the backward. A compiler
    sees the whole sequence as one span.

    Args:
        run: a recurrence: ``(state, packing, *inputs, *weights) -> (y (B, T, ...), state)``. What it
            differentiates must be among its arguments.
        state: ``(B, ...)``, or with a packing one row per sequence.
        inputs: each ``(B, T, ...)``.
        weights: the same at all times.
        width: numbers that ``run`` holds per row and step; it sets the length of a span.
        packing: of packed sequences; a span sees those that reach into it.
    """
    packing = Packing.of("in_spans", packing, inputs[0])
    batch, length = inputs[0].shape[:2]
    limit = _CPU_ELEMENTS if inputs[0].device.type == "cpu" else _GPU_ELEMENTS
    size = max(1, limit // max(1, batch * width))
    if length <= size or torch.compiler.is_compiling():
        return run(state, packing, *inputs, *weights)
    return _Spans.apply(run, _plan(length, size, packing), len(inputs), state, *inputs, *weights)


class _Span(NamedTuple):
    times: slice
    rows: slice  # of the state
    packing: Packing | None


def _plan(length: int, size: int, packing: Packing | None) -> list[_Span]:
    times = [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]
    if packing is None:
        return [_Span(t, slice(None), None) for t in times]
    return [_Span(t, *packing.of_span(t.start, t.stop)) for t in times]


class _Spans(torch.autograd.Function):
    """All that outlives a span is allocated once: small survivors among large temporaries would tear memory apart."""

    @staticmethod
    def forward(ctx: Any, run: Run, plan: list[_Span], count: int, state: Tensor, *tensors: Tensor) -> Any:
        def at(span: _Span) -> list[Any]:
            """What of each tensor a span sees."""
            return [(slice(None), span.times)] * count + [...] * (len(tensors) - count)

        state, y = state.clone(), state.new_empty(0)
        places = _places(state, plan)
        entering = state.new_empty(places[-1].stop, *state.shape[1:])
        with exactly(state.device.type):
            for span, place in zip(plan, places, strict=True):
                entering[place] = state[span.rows]
                parts = (m[i] for m, i in zip(tensors, at(span), strict=True))
                out, state[span.rows] = run(entering[place], span.packing, *parts)
                if span is plan[0]:
                    y = out.new_empty(out.shape[0], plan[-1].times.stop, *out.shape[2:])
                y[:, span.times] = out
        ctx.run, ctx.plan, ctx.at = run, plan, at
        ctx.save_for_backward(entering, *tensors)
        return y, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy, dstate), (entering, *tensors) = outer, ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        grads = [torch.zeros_like(m) if w else None for m, w in zip(tensors, wanted, strict=True)]
        dstate, places = dstate.clone(), _places(dstate, ctx.plan)
        for span, place in reversed(list(zip(ctx.plan, places, strict=True))):
            parts = [m.detach()[at].requires_grad_(w) for m, at, w in zip(tensors, ctx.at(span), wanted, strict=True)]
            h = entering[place].requires_grad_()
            with torch.enable_grad(), exactly(dy.device.type):
                out = ctx.run(h, span.packing, *parts)
            sources = [h, *(m for m in parts if m.requires_grad)]
            found = torch.autograd.grad(out, sources, (dy[:, span.times], dstate[span.rows]), allow_unused=True)
            dstate[span.rows] = 0 if found[0] is None else found[0]
            rest = iter(found[1:])
            for grad, at in zip(grads, ctx.at(span), strict=True):
                if grad is not None and (add := next(rest)) is not None:
                    grad[at] += add
        return None, None, None, dstate, *grads


def _places(state: Tensor, plan: list[_Span]) -> list[slice]:
    """Where the states that enter each span lie, end to end."""
    ends = list(accumulate(len(range(*span.rows.indices(len(state)))) for span in plan))
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
