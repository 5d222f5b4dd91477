"""What autograd sees of an operator: one function, whose gradients are a backend's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualform.ops.derivatives import floats, once, outline
from dualform.ops.dispatch import exactly, run_there
from dualform.ops.layout import lay, time_last


def function_of(op: Any) -> type[torch.autograd.Function]:
    """The function of an :class:`~dualform.ops.op.Op`."""

    class OpFunction(torch.autograd.Function):
        """Runs ``by`` a backend, given the record's fields, or by a backend's name below the dispatcher, given its."""

        @staticmethod
        def forward(ctx: Any, by: Any, again: Any, *args: Any) -> Any:
            unread: list[str] = []
            if isinstance(by, str):
                results = op._forward(by, True, *args)
            else:
                a = op.arguments(*args)
                unread = [f for f in by.unread(a) if not time_last(getattr(a, f))]
                results = run_there(by.forward, a, args[0].device)
            kept = [results[i] for i in op.keeps] + results[op.outputs :]
            ctx.by, ctx.kept = by, len(kept)
            ctx.again = again or (None if isinstance(by, str) else by.again) or op.reference
            ctx.last = [time_last(y) for y in results[: op.outputs]]
            others: list[Any] = []  # of the arguments, what is not among the saved tensors
            for f, m in zip(op.fields, args, strict=True):
                if not isinstance(m, Tensor):
                    others.append((m,))
                elif f in unread:
                    others.append((outline(m),))
                else:
                    others.append(None)
                    kept.append(m)
            ctx.others = others
            ctx.save_for_backward(*kept)
            return tuple(results[: op.outputs])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
            kept, tensors = list(saved[: ctx.kept]), saved[ctx.kept :]
            rest = iter(tensors)
            args = [next(rest) if m is None else m[0] for m in ctx.others]
            if not torch.is_grad_enabled():
                found = _found(op, ctx, grads, kept, args)
            elif op.stepwise:
                with exactly(args[0].device.type):
                    return (None, None, *_recorded(op, ctx.again, args, grads))
            else:
                with torch.no_grad():
                    found = _found(op, ctx, grads, kept, args)
                found = once(op.name, tuple(found), *grads, *saved)
            given = iter(found)
            gradients: list[Tensor | None] = [None, None]
            for m in args:
                gradients.append(next(given) if isinstance(m, Tensor) and floats(m) else None)
            return tuple(gradients)

    OpFunction.__name__ = OpFunction.__qualname__ = op.name
    return OpFunction


def _found(op: Any, ctx: Any, grads: Sequence[Tensor], kept: list[Tensor], args: list[Any]) -> Sequence[Tensor | None]:
    """The gradients by the backend, of every argument that has one."""
    full = [lay(g, last) for g, last in zip(grads, ctx.last, strict=True)]
    if isinstance(ctx.by, str):
        return op._backward(ctx.by, full, kept, *args)
    return run_there(lambda a: op._gradients(ctx.by, full, kept, a), op.arguments(*args), args[0].device)


def _recorded(
    op: Any, run: Callable[[Any], Sequence[Tensor]], args: list[Any], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients in operations that PyTorch records: the outputs are computed anew, from views of the arguments.

    Of one that is given twice, each view has a gradient of its own.
    """
    wanted = [isinstance(m, Tensor) and m.requires_grad for m in args]
    views = [m.view_as(m) if w else m for m, w in zip(args, wanted, strict=True)]
    pairs = [(y, g) for y, g in zip(run(op.arguments(*views)), grads, strict=True) if y.requires_grad]
    sources = [m for m, w in zip(views, wanted, strict=True) if w]
    roots, into = [y for y, _ in pairs], [g for _, g in pairs]
    found = iter(torch.autograd.grad(roots, sources, into, create_graph=True, allow_unused=True))
    return [next(found) if w else None for w in wanted]
