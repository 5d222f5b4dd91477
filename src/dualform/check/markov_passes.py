"""Arguments for the passes over a Markov chain."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dualform.ops.markov_filter import markov_filter
from dualform.ops.markov_path import markov_path
from dualform.ops.markov_smoother import markov_smoother


def markov_cases(normal: Callable[..., Tensor], length: int) -> list[tuple[str, str, Callable[..., Any], Any, Any]]:
    """Of each case the name, the op, the function, its tensors and its options: chains of three rows.

    Args:
        normal: draws numbers of a shape.
        length: transitions, one less than steps.
    """

    def chain(first: str, states: int, constant: bool = False) -> dict[str, Tensor]:
        """With ``start`` of the first step or ``p`` of all."""
        moves = normal(states, states) if constant else normal(3, length, states, states)
        vectors = normal(*((3, states) if first == "start" else (3, length + 1, states))).softmax(-1)
        moves = moves.softmax(-1).expand(3, length, states, states)
        return {first: vectors, "A": moves, "log_b": normal(3, length + 1, states)}

    return [
        ("markov_filter", "markov_filter", markov_filter, chain("start", 5), {}),
        ("markov_filter wide", "markov_filter", markov_filter, chain("start", 17, constant=True), {}),
        ("markov_smoother", "markov_smoother", markov_smoother, chain("p", 5), {}),
        ("markov_smoother wide", "markov_smoother", markov_smoother, chain("p", 17, constant=True), {}),
        ("markov_path", "markov_path", markov_path, chain("start", 5), {}),
    ]
