"""The laws of a :class:`~dualform.core.recurrence.Recurrence`, as measurements.

A law says that two forms of a recurrence (:mod:`dualform.core.forms`) are the same function. It returns the greatest
relative error it met and where (:mod:`dualform.core.deviation`), so that a test asserts on the number and a person
reads it. A law that does not apply, such as padding without an ``attention_mask``, returns None.

    >>> for name, law in LAWS.items():
    ...     print(name, law(Trial(recurrence, x, warmup=5)))
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.deviation import Worst, describe, deviation, relative, worst
from dualform.core.forms import Form, alone, chunked, packed, padded, stepped, whole
from dualform.core.isolation import contained, ownership
from dualform.core.recurrence import State
from dualform.core.tree import Tree, clone, leaves, named_leaves, tree_map
from dualform.core.trial import Gradients, Law, Trial, compare_gradients, floats, functional, gradients

__all__ = ["LAWS", "Law", "Trial", "compare_gradients", "functional", "gradients"]


def _compare(trial: Trial, form: Form, reference: Form, what: str) -> Worst:
    """Outputs and final states of two forms, without gradients."""
    with torch.no_grad():
        y, state = form(trial.f, trial.inputs, clone(trial.state))
        want_y, want_state = reference(trial.f, trial.inputs, clone(trial.state))
    return worst([deviation(y, want_y, f"output, {what}:"), deviation(state, want_state, f"final state, {what}:")])


def _gradients_agree(trial: Trial, of: str) -> tuple[Worst, Gradients]:
    """Every form against the one it must equal, and the gradients of the whole form."""
    forms: list[tuple[str, Form, Form]] = [("stepped", stepped(64), whole), ("row by row", alone(), whole)]
    forms += [("chunked", chunked(cuts), whole) for cuts in trial.cuts[-1:]]
    ragged = alone(trial.lengths)
    forms.append(("packed", packed(trial.lengths), ragged))
    if trial.takes_mask:
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
        if not trial.takes_mask:
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
    rolled = tree_map(lambda leaf: leaf.roll(1, 0) if floats(leaf) else leaf, trial.state)
    moved = _final(trial, trial.inputs, rolled)
    return worst([*found, _reaches(whole_form.initial, moved, still, "the initial state")])


def _final(trial: Trial, x: Tensor, state: State) -> State:
    with torch.no_grad():
        return trial.f.forward(x, clone(state))[1]


def _reaches(gradient: Tree, moved: State, still: State, name: str) -> Worst:
    pairs = zip(leaves(moved), leaves(still), strict=True)
    moves = any(relative(a, b) > 1e-4 for a, b in pairs if floats(a))
    missing = moves and not any(bool(leaf.any()) for leaf in leaves(gradient))
    return Worst(1.0, f"{name} moves the final state, whose gradient does not reach it") if missing else Worst()


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
    "ownership": ownership,
    "contained": contained,
}
