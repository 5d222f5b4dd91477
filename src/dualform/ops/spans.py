"""A portable backend for recurrences that PyTorch can differentiate: span by span, in bounded memory.

The forward keeps the states between spans. The backward runs every span once more, under autograd, and differentiates
it: what the parallel form makes is held for one span at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from dualform.ops.op import Backend, Op

Arguments = TypeVar("Arguments", bound=tuple)
Tables = tuple[Tensor, ...]

_CPU_ELEMENTS = 2**20  # numbers held at once, (B, span, width)
_GPU_ELEMENTS = 2**22  # elsewhere, where launches cost more


class _Span(NamedTuple):
    begin: int
    end: int
    rows: slice  # of the state
    enters: bool  # whether the state of the first of those rows comes from the span before
    packing: Any


@dataclass(frozen=True)
class Spanned(Generic[Arguments]):
    """A parallel form, cut into spans of time, for an op whose outputs are ``(y, final state)``.

    Args:
        op: gives the shapes of the outputs.
        run: ``(a, tables) -> (y, final state)``, in differentiable operations: the parallel form of a record that
            holds one span of the inputs, the states that enter it, and its packing.
        tables: ``(a, most) -> tables``, in differentiable operations: what every span, of at most that many steps,
            needs of the weights.
        inputs: names of the fields ``(B, T, ...)``; the state is ``h0``, the packing ``packing``.
        width: ``(a) -> `` numbers that ``run`` holds for each step of a row; it sets the length of a span.
        unit: spans are a multiple of it.
    """

    op: Op[Arguments]
    run: Callable[[Arguments, Tables], tuple[Tensor, Tensor]]
    tables: Callable[[Arguments, int], Tables]
    inputs: tuple[str, ...]
    width: Callable[[Arguments], int]
    unit: int = 1

    def single(self, a: Any) -> tuple[Tensor, Tensor] | None:
        """The outputs of a call of a single span, which autograd differentiates without running it twice; or None."""
        length = getattr(a, self.inputs[0]).shape[1]
        if length > self.size(a):
            return None
        return self.run(a, self.tables(a, length))

    def backend(self) -> Backend[Arguments]:
        """What to register."""
        return Backend("torch", self.forward, self.backward, self.infer, self.saved, plain=self.single)

    def size(self, a: Any) -> int:
        """Steps of a span; an expression without branches, as shapes may be symbols."""
        batch, unit = getattr(a, self.inputs[0]).shape[0], self.unit
        limit = _CPU_ELEMENTS if a.h0.device.type == "cpu" else _GPU_ELEMENTS
        return unit * (1 + limit // (1 + batch * self.width(a) * unit))

    def infer(self, a: Any) -> list[Tensor]:
        """The outputs."""
        return self.forward(a)[:2]

    def saved(self, a: Any) -> list[Tensor]:
        """The state at the end of every full span: of all rows, or of the one sequence that is under way."""
        batch, length = getattr(a, self.inputs[0]).shape[:2]
        return [a.h0.new_empty(length // self.size(a), batch, *a.h0.shape[1:])]

    def forward(self, a: Any) -> list[Tensor]:
        """The outputs and the states between spans."""
        h, y, size = a.h0.clone(), self.op.fake(a)[0], self.size(a)
        (between,) = self.saved(a)
        tables = self.tables(a, min(size, y.shape[1]))
        for number, span in enumerate(self._spans(a, size)):
            part = a._replace(h0=h[span.rows], packing=span.packing, **self._inputs(a, span))
            y[:, span.begin : span.end], h[span.rows] = self.run(part, tables)
            if number < len(between):
                between[number] = h if a.packing is None else h[span.rows][-1:]
        return [y, h, between]

    def backward(self, grads: list[Tensor], kept: list[Tensor], a: Any) -> dict[str, Tensor]:
        """Gradients of the tables are summed over spans, and led back to the weights once."""
        dy, dh, between, size = grads[0], grads[1].clone(), kept[0], self.size(a)
        names = [name for name, _ in self.op.differentiable(a) if name not in (*self.inputs, "h0")]
        weights = {name: getattr(a, name).detach().requires_grad_() for name in names}
        found = {name: torch.zeros_like(getattr(a, name)) for name in self.inputs if getattr(a, name) is not None}
        with torch.enable_grad():
            tables = self.tables(a._replace(**weights), min(size, dy.shape[1]))
        dtables = [torch.zeros_like(m) for m in tables]
        for number, span in reversed(list(enumerate(self._spans(a, size)))):
            h = a.h0[span.rows].clone()
            if span.enters:
                h[: len(h) if a.packing is None else 1] = between[number - 1]
            leaves = {name: m.detach().requires_grad_() for name, m in self._inputs(a, span).items()}
            fixed = tuple(m.detach().requires_grad_() for m in tables)
            with torch.enable_grad():
                part = a._replace(h0=h.requires_grad_(), packing=span.packing, **leaves)
                outputs = self.run(part, fixed)
            sources = [h, *leaves.values(), *fixed]
            ends = dy[:, span.begin : span.end], dh[span.rows]
            into, *rest = torch.autograd.grad(outputs, sources, ends, materialize_grads=True)
            dh[span.rows] = into
            for name, g in zip(leaves, rest, strict=False):
                found[name][:, span.begin : span.end] = g
            for total, g in zip(dtables, rest[len(leaves) :], strict=True):
                total += g
        pairs = [(m, g) for m, g in zip(tables, dtables, strict=True) if m.requires_grad]
        roots, into_roots = zip(*pairs, strict=True) if pairs else ((), ())
        led = torch.autograd.grad(roots, list(weights.values()), into_roots, materialize_grads=True) if pairs else ()
        return {**found, **dict(zip(weights, led, strict=True)), "h0": dh}

    def _inputs(self, a: Any, span: _Span) -> dict[str, Tensor]:
        given = {name: getattr(a, name) for name in self.inputs}
        return {name: m[:, span.begin : span.end] for name, m in given.items() if m is not None}

    def _spans(self, a: Any, size: int) -> Iterator[_Span]:
        length = getattr(a, self.inputs[0]).shape[1]
        for begin in range(0, length, size):
            end = min(begin + size, length)
            if a.packing is None:
                yield _Span(begin, end, slice(None), begin > 0, None)
            else:
                rows, packing = a.packing.of_span(begin, end)
                enters = begin > int(a.packing.host_borders()[rows.start])
                yield _Span(begin, end, rows, enters, packing)
