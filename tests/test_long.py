"""The check of very long sequences, on short ones."""

import math

import pytest
import torch

from dualform.check import long
from dualform.ops.op import OPS


def test_every_op_with_kernels_that_index_memory_has_a_case():
    kernels = {op for op, found in OPS.items() if {b.name for b in found.backends} & {"triton", "cuda", "native"}}
    sequences = {op for op in kernels if not op.endswith(("_update", "_step", "linear"))}  # these are one step
    # On a CPU alone, where all counts have 64 bits, and with two tensors as the state, or none that comes out. The
    # Kalman filter's kernel has a test of its own on a GPU.
    sequences -= {"kalman_filter", "kalman_smoother", "arma_likelihood"}
    sequences -= {"markov_filter", "markov_smoother", "markov_path"}
    assert sequences <= {case.op for case in long.CASES} and len(sequences) > 3


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", long.CASES, ids=lambda case: case.op)
def test_the_whole_equals_its_pieces(case, backward):
    found = long.split_error(case, torch.device("cpu"), torch.float32, backward=backward, elements=4 * long.WIDTH)
    assert found.error <= 1e-4, found.where


@pytest.mark.parametrize("backward", [False, True])
def test_a_state_that_is_lost_shows(backward, monkeypatch):
    case = next(case for case in long.CASES if case.op == "linear_scan")

    def forgetful(a, b, initial_state=None):
        return case.function(a, b)

    broken = long.LongCase("linear_scan", forgetful, case.varying, positive=case.positive)
    if backward:
        with pytest.raises(RuntimeError):  # the state has no gradient
            long.split_error(broken, torch.device("cpu"), torch.float32, backward=True, elements=4 * long.WIDTH)
    else:
        found = long.split_error(broken, torch.device("cpu"), torch.float32, backward=False, elements=4 * long.WIDTH)
        assert found.error > 1e-2


def test_nan_is_an_infinite_error():
    nan, one = torch.full((1, 3, 2), math.nan), torch.ones(1, 3, 2)
    assert long._far(nan, one, "").error == math.inf
    assert long._far(one, one, "").error == 0
