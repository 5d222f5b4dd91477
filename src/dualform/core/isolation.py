"""What a recurrence must leave alone: memory that is not its own to write, and rows that nothing happened to."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualform.core.deviation import Worst, deviation, largest, worst
from dualform.core.errors import DualformError
from dualform.core.forms import Form, alone, chunked, packed, padded, stepped, whole
from dualform.core.recurrence import State
from dualform.core.tree import Tree, clone, leaves, named_leaves, take, tree_map
from dualform.core.trial import Trial, floats, functional

_FEW = 5  # steps are enough to see what is written where


def ownership(trial: Trial) -> Worst:
    """Nothing given is written to where gradients are recorded, nor ever a state that shares memory.

    Shared is a view of a larger tensor, one row expanded to all, and, outside of inference mode, what was made inside.
    """
    f, x, rows = trial.f, trial.inputs[:, :_FEW], trial.inputs.shape[0]
    lengths = [min(n, x.shape[1]) for n in trial.lengths]
    runs: dict[str, Callable[[State], Any]] = {
        "forward": lambda state: f.forward(x, state),
        "step": lambda state: f.step(x[:, 0], state),
        "packed": lambda state: packed(lengths)(f, x, state),
    }
    middle, found = slice(rows, 2 * rows), []
    for name, run in runs.items():

        def check(given: State, owner: State, what: str, name: str = name, run: Callable[[State], Any] = run) -> None:
            before = clone(owner)
            try:
                run(given)
            except RuntimeError as error:  # of PyTorch, which refuses some writes
                found.append(Worst(math.inf, f"{name} {what}: {error}"))
                return
            pairs = zip(named_leaves(owner), leaves(before), strict=True)
            changed = [leaf for (leaf, a), b in pairs if not torch.equal(a.nan_to_num(), b.nan_to_num())]
            found.append(Worst(math.inf, f"{name} {what}: it wrote into {', '.join(changed)}") if changed else Worst())

        with torch.enable_grad():
            given = clone(trial.state)
            check(given, given, "while gradients are recorded")
        with torch.inference_mode():
            inference = clone(trial.state)
        with torch.no_grad():
            large, one = tree_map(lambda leaf: torch.cat([leaf] * 3), trial.state), take(trial.state, slice(0, 1))
            check(tree_map(lambda leaf: leaf[middle], large), large, "from a view of a larger tensor")
            check(tree_map(lambda leaf: leaf.expand(rows, *leaf.shape[1:]), one), one, "from one row, expanded")
            check(inference, inference, "from a state of inference mode, outside of it")
    return worst(found)


def contained(trial: Trial) -> Worst | None:
    """What is not finite in one row or sequence reaches no other: outputs, final states and gradients, in any form.

    NaN and infinity are planted in an input, in the initial state and in the gradients that come in. A recurrence may
    refuse them instead.
    """
    rows, lengths = trial.inputs.shape[0], trial.lengths
    if rows < 2:
        return None
    last, longest = sorted(range(rows), key=lambda i: lengths[i])[-2:]
    ragged = alone(lengths)
    forms: list[tuple[str, Form, Form]] = [("whole", whole, whole), ("stepped", stepped(8), whole)]
    forms += [("chunked", chunked(cuts), whole) for cuts in trial.cuts[-1:]]
    forms.append(("packed", packed(lengths), ragged))
    if trial.takes_mask:
        forms.append(("padded left", padded(lengths, "left"), ragged))
    clean, found = {form: _results(trial, form) for form in (whole, ragged)}, []
    for what, form, equal in forms:
        for row, value in ((longest, math.nan), (last, math.inf)):
            others = [i for i in range(rows) if i != row]
            try:
                got = _results(trial, form, row, value)
            except DualformError:
                continue
            want = {name: take(tree, others) for name, tree in clean[equal].items()}
            top = max(largest(tree) for name, tree in want.items() if name.startswith("gradient"))
            for name, tree in got.items():
                where, beside = f"{name} of other rows, {what}, with {value} in one:", name.startswith("gradient") * top
                found.append(deviation(take(tree, others), want[name], where, beside=beside))
    return worst(found)


def _results(trial: Trial, form: Form, row: int = 0, value: float = 0.0) -> dict[str, Tree]:
    """Outputs, final state and gradients by what has rows; a value other than 0 is planted in one row."""
    x, start, at = trial.inputs.detach().clone(), clone(trial.state), trial.lengths[row] // 2
    if value and x.is_floating_point():
        x[row, at].view(-1)[0] = value
    for leaf in leaves(start):
        if value and floats(leaf) and leaf[row].numel():
            leaf[row].view(-1)[0] = value
    sources = [m.requires_grad_() for m in (x, *leaves(start)) if floats(m)]
    with torch.enable_grad():
        y, state = form(trial.f, x, clone(start))
        loss = functional((y, state), trial.generator())
        if value:
            loss = loss + sum((leaf[row].abs() * value).sum() for leaf in leaves((y, state)) if floats(leaf))
    gradients: dict[int, Tensor] = {}
    if loss.requires_grad and sources:
        got = torch.autograd.grad(loss, sources, allow_unused=True)
        gradients = {id(m): g for m, g in zip(sources, got, strict=True) if g is not None}

    def gradient(m: Tensor) -> Tensor:
        return gradients.get(id(m), torch.zeros_like(m))

    initial = trial.tangent(tree_map(gradient, start))
    return {"output": y, "final state": state, "gradient by the input": gradient(x), "gradient by the state": initial}
