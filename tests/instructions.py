"""The instruction sets of the CPU kernels that this processor has, and the number of threads, as fixtures."""

from collections.abc import Callable, Iterator

import pytest
import torch

from dualform.ops.native import library

INSTRUCTIONS = [name for name in ("avx512", "avx2", "baseline") if library.choose(name) == name]
library.choose()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    library.choose(request.param)
    yield request.param
    library.choose()
