"""The laws of a :class:`~dualform.core.recurrence.Recurrence`, as measurements.

A law says that two forms of a recurrence (:mod:`dualform.core.forms`) are the same function. It returns the greatest
relative error it met and where (:mod:`dualform.core.deviation`), so that a test asserts on the number and a person
reads it. A law that does not apply, such as padding without an ``attention_mask``, returns None.

    >>> for name, law in LAWS.items():
    ...     print(name, law(Trial(recurrence, x, warmup=5)))
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.deviation import Worst, describe, deviation, relative, worst
from dualform.core.forms import Form, alone, chunked, packed, padded, stepped, whole
from dualform.core.recurrence import Recurrence, State
from dualform.core.tree import Tree, clone, concat, leaves, named_leaves, tree_map

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


def _compare(trial: Trial, form: Form, reference: Form, what: str) -> Worst:
    """Outputs and final states of two forms, without gradients."""
    with torch.no_grad():
        y, state = form(trial.f, trial.inputs, clone(trial.state))
        want_y, want_state = reference(trial.f, trial.inputs, clone(trial.state))
    return worst([deviation(y, want_y, f"output, {what}:"), deviation(state, want_state, f"final state, {what}:")])


# Gradients.


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
    start = tree_map(lambda s: s.clone().requires_grad_(_floats(s)), trial.state)
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
    """Every output and every gradient of two forms; ``what`` names the first one in the message."""
    return worst(
        [
            deviation(got.y, want.y, f"output, {what}:"),
            deviation(got.state, want.state, f"final state, {what}:"),
            deviation(got.parameters, want.parameters, f"gradient, {what}, of parameter"),
            deviation(got.input, want.input, f"gradient, {what}, of input"),
            deviation(got.initial, want.initial, f"gradient, {what}, of initial state"),
        ]
    )


def _gradients_agree(trial: Trial, of: str) -> tuple[Worst, Gradients]:
    """Every form against the one it must equal, and the gradients of the whole form."""
    forms: list[tuple[str, Form, Form]] = [("stepped", stepped(64), whole), ("row by row", alone(), whole)]
    forms += [("chunked", chunked(cuts), whole) for cuts in trial.cuts[-1:]]
    ragged = alone(trial.lengths)
    forms.append(("packed", packed(trial.lengths), ragged))
    if _takes_mask(trial):
        forms.append(("padded left", padded(trial.lengths, "left"), ragged))
    want = {form: gradients(trial, form, of) for form in (whole, ragged)}
    found = [compare_gradients(gradients(trial, form, of), want[equal], what) for what, form, equal in forms]
    return worst(found), want[whole]


# Laws.


def layout(trial: Trial) -> Worst:
    """States are batch first and keep shape and dtype; ``step`` drops the time axis; inputs are left as they were."""
    x, rows = trial.inputs, trial.x.shape[0]
    before = x.clone()
    start = trial.f.init_state(rows, max_len=trial.x.shape[1])
    for name, leaf in named_leaves(start):
        if leaf.dim() == 0 or leaf.shape[0] != rows:
            return Worst(math.inf, f"initial state {name}: {describe(leaf)}, expected {rows} rows")
    with torch.no_grad():
        y, state = trial.f.forward(x, clone(start))
        y_t, state_t = trial.f.step(x[:, 0], clone(start))
    found = [
        deviation(_blank(state), _blank(start), "final state"),
        deviation(_blank(state_t), _blank(start), "state after a step"),
        deviation(_blank(y_t), _blank(tree_map(lambda leaf: leaf[:, 0], y)), "output of a step"),
        Worst() if _same(x, before) else Worst(math.inf, "the input was written to"),
    ]
    for name, leaf in named_leaves(y):
        if leaf.shape[:2] != x.shape[:2]:
            found.append(Worst(math.inf, f"output {name}: {describe(leaf)}, expected {tuple(x.shape[:2])} first"))
    return worst(found)


def fresh(trial: Trial) -> Worst:
    """No state means ``init_state``, in one call and packed, there and when going on; the capacity changes nothing."""
    rows, length = trial.inputs.shape[:2]

    def same(form: Form, state: State | None, what: str) -> Worst:
        def twice(start: State | None) -> _Twice:
            y, after = form(trial.f, trial.inputs, start)
            return _Twice(y, trial.f.forward(trial.inputs, after)[0])

        with torch.no_grad():
            got, want = twice(state), twice(trial.f.init_state(rows, max_len=2 * length))
        return deviation(got, want, f"output, {what}:")

    return worst(
        [
            same(whole, None, "state=None"),
            same(packed(trial.lengths), None, "state=None, packed"),
            same(whole, trial.f.init_state(rows, max_len=3 * length + 1), "more max_len"),
        ]
    )


def split(trial: Trial) -> Worst:
    """Whole = in chunks, cut at random places and next to the ends."""
    return worst([_compare(trial, chunked(cuts), whole, f"cut at {cuts}") for cuts in trial.cuts])


def step(trial: Trial) -> Worst:
    """Whole = one element at a time."""
    return _compare(trial, stepped(512), whole, "stepped")


def rows(trial: Trial) -> Worst:
    """Row i of outputs and states depends on row i only."""
    return _compare(trial, whole, alone(), "each row alone")


def ragged(trial: Trial) -> Worst:
    """Packed with ``cu_seqlens`` = each sequence alone, an empty one and a single element among them."""
    reference, lengths = alone(trial.lengths), trial.lengths
    return worst(
        [
            _compare(trial, packed(lengths, dtype), reference, f"packed with lengths {lengths}")
            for dtype in (torch.int32, torch.int64)
        ]
    )


def padding(places: str) -> Law:
    """With an ``attention_mask``, padding anywhere = each row alone without it; outputs at padding are zero."""

    def law(trial: Trial) -> Worst | None:
        if not _takes_mask(trial):
            return None
        reference, lengths = alone(trial.lengths), trial.lengths
        return worst(
            [
                _compare(trial, padded(lengths, places, dtype), reference, f"padded {places} to lengths {lengths}")
                for dtype in (torch.int64, torch.bool)
            ]
        )

    return law


class _Twice(NamedTuple):
    first: Tree
    going_on: Tree


def _takes_mask(trial: Trial) -> bool:
    return "attention_mask" in inspect.signature(trial.f.forward).parameters


def causal(trial: Trial) -> Worst | None:
    """Outputs before t do not change, and have no gradient, when inputs from t on change."""
    x = trial.inputs
    found = []
    for t in sorted({cut for cuts in trial.cuts for cut in (cuts[0], cuts[-1])}):
        other = torch.cat([x[:, :t], x[:, t:].flip(1).roll(1, 0)], 1)

        def early(f: Any, x: Tensor, state: State, t: int = t) -> tuple[Tree, State]:
            y, _ = f.forward(x, state)
            return tree_map(lambda leaf: leaf[:, :t], y), ()

        def late(f: Any, x: Tensor, state: State, other: Tensor = other) -> tuple[Tree, State]:
            return early(f, other, state)

        found.append(_compare(trial, late, early, f"before {t} when later inputs change"))
        gradient = gradients(trial, early, "both").input.get("")
        if gradient is not None:
            want = {"before": gradient[:, :t], "after": torch.zeros_like(gradient[:, t:])}
            got = {"before": gradient[:, :t], "after": gradient[:, t:]}
            found.append(deviation(got, want, f"gradient of outputs before {t} by the inputs"))
    return worst(found) if found else None


def gradient(trial: Trial) -> Worst:
    """All forms give parameters, input and initial state the same gradients, from outputs and final state together."""
    return _gradients_agree(trial, "both")[0]


def final_state(trial: Trial) -> Worst:
    """A loss on the final state alone has the same gradients in all forms, and reaches whatever moves that state."""
    agree, whole_form = _gradients_agree(trial, "state")
    still, found = _final(trial, trial.inputs, trial.state), [agree]
    for name, parameter in trial.differentiable().items():
        before = parameter.detach().clone()
        noise = 0.1 * torch.randn(parameter.shape, generator=trial.generator()).to(parameter)
        with torch.no_grad():  # relative noise, so that a covariance stays one
            parameter.add_(before * noise if bool(before.any()) else noise)
            moved = _final(trial, trial.inputs, trial.state)
            parameter.copy_(before)
        found.append(_reaches(whole_form.parameters[name], moved, still, f"parameter {name}"))
    if whole_form.input:
        moved = _final(trial, trial.inputs.roll(1, 0), trial.state)
        found.append(_reaches(whole_form.input[""], moved, still, "the input"))
    rolled = tree_map(lambda leaf: leaf.roll(1, 0) if _floats(leaf) else leaf, trial.state)
    moved = _final(trial, trial.inputs, rolled)
    return worst([*found, _reaches(whole_form.initial, moved, still, "the initial state")])


def _final(trial: Trial, x: Tensor, state: State) -> State:
    with torch.no_grad():
        return trial.f.forward(x, clone(state))[1]


def _reaches(gradient: Tree, moved: State, still: State, name: str) -> Worst:
    pairs = zip(leaves(moved), leaves(still), strict=True)
    moves = any(relative(a, b) > 1e-4 for a, b in pairs if _floats(a))
    missing = moves and not any(bool(leaf.any()) for leaf in leaves(gradient))
    return Worst(1.0, f"{name} moves the final state, whose gradient does not reach it") if missing else Worst()


def _floats(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _blank(tree: Tree) -> Tree:
    return tree_map(torch.zeros_like, tree)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


LAWS: dict[str, Law] = {
    "layout": layout,
    "fresh": fresh,
    "split": split,
    "step": step,
    "rows": rows,
    "packed": ragged,
    "padded left": padding("left"),
    "padded right": padding("right"),
    "padded between": padding("between"),
    "causal": causal,
    "gradient": gradient,
    "final state": final_state,
}
