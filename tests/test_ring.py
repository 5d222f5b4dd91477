"""Caches by slot, and the memory of states that may be written to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dualform.core.ring import held, write
from dualform.core.tree import may_write


def test_what_slots_hold() -> None:
    assert held(torch.tensor([0, 2, 5]), 3).tolist() == [[-3, -2, -1], [0, 1, -1], [3, 4, 2]]
    assert held(torch.tensor([4]), 0).shape == (1, 0)


def large() -> Tensor:
    return torch.zeros(6, 4)


@pytest.mark.parametrize(
    "make, may",
    [
        (large, True),
        (lambda: large().clone(), True),
        (lambda: large()[2:4], False),
        (lambda: large()[0:6], False),
        (lambda: large()[:1].expand(3, 4), False),
        (lambda: large().T, False),
        (lambda: large().requires_grad_(), False),
    ],
)
def test_only_memory_of_its_own_may_be_written(make: Any, may: bool) -> None:
    with torch.no_grad():
        cache = make()
        assert may_write(cache) == may
        new = write(cache, (torch.tensor([0]), torch.tensor([1])), torch.ones(1))
        assert float(new[0, 1]) == 1
        assert bool(cache.any()) == may
    assert not may_write(cache)  # gradients are recorded


def test_memory_of_inference_mode_is_written_inside_only() -> None:
    with torch.inference_mode():
        cache = large()
        assert may_write(cache)
    with torch.no_grad():
        assert not may_write(cache)


def test_nothing_is_written_that_something_watches() -> None:
    seen = []

    def f(cache: Tensor) -> Tensor:
        seen.append(may_write(cache))
        return cache + 1

    with torch.no_grad():
        torch.func.vmap(f)(large())
        torch.compile(f, backend="eager")(large())
        with torch._subclasses.FakeTensorMode():
            f(torch.zeros(2))
    assert seen and not any(seen)
