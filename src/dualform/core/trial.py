"""One recurrence, the inputs that its laws are tried on, and what a form makes of them, gradients included."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.deviation import Worst, deviation, largest, worst
from dualform.core.forms import Form
from dualform.core.recurrence import Recurrence, State
from dualform.core.tree import Tree, clone, concat, leaves, tree_map

Law = Callable[["Trial"], Worst | None]


@dataclass(frozen=True)
class Trial:
    """A recurrence and the inputs that its laws are tried on.

    Args:
        f: the recurrence.
        x: ``(B, warmup + T, ...)``; four rows or more let the ragged laws meet an empty sequence, a single element,
            a middling and a whole one.
        warmup: the first elements bring the rows, each over another number of them, to the states that the laws
            start from: a state that was reached is a state that can be.
        parameters: tensors whose gradients must agree; the default is ``f.named_parameters()`` where it exists.
        seed: of the places to cut and the weights of the losses.
        tangent: projects a gradient by the initial state on the directions in which a state may move, such as
            symmetric matrices for a covariance; forms may differ in the others.
    """

    f: Recurrence[Any]
    x: Tensor
    warmup: int = 0
    parameters: Mapping[str, Tensor] | None = None
    seed: int = 0
    tangent: Callable[[State], State] = lambda gradient: gradient

    @property
    def inputs(self) -> Tensor:
        """``(B, T, ...)``, what follows the warm-up."""
        return self.x[:, self.warmup :]

    @cached_property
    def state(self) -> State:
        """The state that the laws start from, B rows, detached; a form must be given a clone of it."""
        capacity, rows = self.x.shape[1], []
        with torch.no_grad():
            for i in range(self.x.shape[0]):
                row, length = self.f.init_state(1, max_len=capacity), self.warmup - i % (self.warmup + 1)
                if length:
                    _, row = self.f.forward(self.x[i : i + 1, self.warmup - length : self.warmup], row)
                rows.append(row)
            return clone(concat(rows))

    @cached_property
    def lengths(self) -> list[int]:
        """How much of each row the ragged forms run: something between, nothing, one element, everything."""
        rows, length = self.inputs.shape[:2]
        between = self.random(min(2, length), max(1, length - 1))
        pattern = [(between, 0, 1, length)[i % 4] for i in range(rows)]
        order = torch.randperm(rows, generator=self.generator()).tolist()
        return [pattern[i] for i in order]

    @cached_property
    def cuts(self) -> list[list[int]]:
        """Where the chunked form cuts: next to both ends, at a random place, at several with single elements."""
        length = self.inputs.shape[1]
        if length < 2:
            return []
        k = self.random(1, length - 1)
        many = sorted({1, max(1, k - 1), k, min(length - 1, k + 1), length - 1})
        return [list(cuts) for cuts in dict.fromkeys([(k,), tuple(many)])]

    @property
    def takes_mask(self) -> bool:
        """Whether the recurrence has padding, shown by an ``attention_mask``."""
        return "attention_mask" in inspect.signature(self.f.forward).parameters

    def generator(self) -> torch.Generator:
        """A fresh random source on the CPU: the same numbers at every call and on every device."""
        return torch.Generator().manual_seed(self.seed)

    def random(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both possible."""
        return int(torch.randint(low, max(low, high) + 1, (), generator=self.generator()))

    def differentiable(self) -> dict[str, Tensor]:
        """The parameters that want a gradient, by name."""
        found = self.parameters
        if found is None:
            named = getattr(self.f, "named_parameters", dict)
            found = dict(named())
        return {name: p for name, p in found.items() if p.requires_grad}


class Gradients(NamedTuple):
    """What a form gave, and the gradients of a functional of it by everything that went in."""

    y: Tree
    state: State
    parameters: dict[str, Tensor]
    input: dict[str, Tensor]
    initial: State


def functional(tree: Tree, generator: torch.Generator) -> Tensor:
    """A random linear functional of the floating leaves: the same one on every device and in every dtype."""
    total = torch.zeros((), dtype=torch.float32, device=leaves(tree)[0].device)
    for leaf in leaves(tree):
        if leaf.is_complex():
            leaf = torch.view_as_real(leaf)
        if leaf.is_floating_point():
            weight = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            kind = torch.promote_types(leaf.dtype, torch.float32)
            total = total + (leaf.to(kind) * weight.to(leaf.device, kind)).sum()
    return total


def gradients(trial: Trial, form: Form, of: str) -> Gradients:
    """Gradients of one random functional of ``both`` the outputs and the final state, or of the final ``state``."""
    parameters, x = trial.differentiable(), trial.inputs.detach().clone()
    inputs = {"": x.requires_grad_()} if x.is_floating_point() else {}
    start = tree_map(lambda s: s.clone().requires_grad_(floats(s)), trial.state)
    with torch.enable_grad():
        y, state = form(trial.f, x, clone(start))
        loss = functional((y, state) if of == "both" else state, trial.generator())
    sources = [*parameters.values(), *inputs.values(), *(leaf for leaf in leaves(start) if leaf.requires_grad)]
    found: Iterator[Tensor | None] = iter(())
    if loss.requires_grad and sources:
        found = iter(torch.autograd.grad(loss, sources, allow_unused=True))

    def gradient(source: Tensor) -> Tensor:
        got = next(found, None) if source.requires_grad else None
        return torch.zeros_like(source) if got is None else got

    return Gradients(
        y,
        state,
        {name: gradient(parameter) for name, parameter in parameters.items()},
        {name: gradient(x) for name, x in inputs.items()},
        trial.tangent(tree_map(gradient, start)),
    )


def compare_gradients(got: Gradients, want: Gradients, what: str) -> Worst:
    """Every output and every gradient of two forms; ``what`` names the first one in the message.

    All gradients belong together: that of an initial state that is all but forgotten is the rounding of the others.
    """
    top = max(map(largest, want[2:]))
    return worst(
        [
            deviation(got.y, want.y, f"output, {what}:"),
            deviation(got.state, want.state, f"final state, {what}:"),
            deviation(got.parameters, want.parameters, f"gradient, {what}, of parameter", beside=top),
            deviation(got.input, want.input, f"gradient, {what}, of input", beside=top),
            deviation(got.initial, want.initial, f"gradient, {what}, of initial state", beside=top),
        ]
    )


def floats(leaf: Tensor) -> bool:
    """Whether a leaf has a gradient."""
    return leaf.is_floating_point() or leaf.is_complex()
