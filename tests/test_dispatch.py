"""What reaches an operator through ``torch.ops``, past its public function, is checked before a kernel reads it."""

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.ops import OPS, linear_scan, selective_scan

dualform = torch.ops.dualform


def saved_scan() -> tuple[list[Tensor], tuple[object, ...]]:
    """The outputs of a scan and what it keeps for its backward, and its arguments."""
    x, maps = torch.randn(2, 70, 5), torch.randn(2, 70, 1, 3)
    args = x, torch.rand(2, 70, 5), -torch.rand(5, 3), maps, maps, None, None, None, False, torch.zeros(2, 5, 3), None
    return dualform.selective_scan("", True, *args), args


@pytest.mark.parametrize("wrong", ["shape", "dtype", "count"])
def test_gradients_that_are_not_like_the_outputs_are_refused(wrong):
    (y, state, *kept), args = saved_scan()
    other = {"shape": [y[:, :9]], "dtype": [y.double()], "count": []}[wrong]
    with pytest.raises(ArgumentError, match="selective_scan_backward: gradients and kept outputs are"):
        dualform.selective_scan_backward("", [*other, state], kept, *args)


def test_kept_outputs_that_are_not_like_the_outputs_are_refused():
    a, b, h0 = torch.rand(2, 9, 5), torch.randn(2, 9, 5), torch.zeros(2, 5)
    h, state = dualform.linear_scan("", True, a, b, h0, None, False)
    with pytest.raises(ArgumentError, match=r"kept outputs are .*\(2, 3, 5\)"):
        dualform.linear_scan_backward("", [h, state], [h[:, :3]], a, b, h0, None, False)


@pytest.mark.skipif(OPS["selective_scan"].backends[0].name != "native", reason="there are no CPU kernels")
@pytest.mark.parametrize("wrong", [lambda s: s[:, :1], lambda s: s.double()])
def test_saved_states_that_a_kernel_did_not_save_are_refused(wrong):
    (y, state, saved), args = saved_scan()
    with pytest.raises(ArgumentError, match="selective_scan_backward: the saved states are"):
        dualform.selective_scan_backward("native", [y, state], [wrong(saved)], *args)


def test_an_operator_writes_to_none_of_its_arguments():
    x, state, weight = torch.randn(2, 3), torch.zeros(2, 3, 3), torch.randn(3, 4)
    with pytest.raises(ArgumentError, match="out_state was given") as raised:
        dualform.causal_conv1d_update("", False, x, state, weight, None, False, torch.zeros(1), None, None)
    assert "dualform.ops.causal_conv1d_update" in str(raised.value)


def test_a_state_that_is_no_tensor_is_refused_by_name():
    x, maps = torch.randn(2, 7, 5), torch.randn(2, 7, 1, 3)
    with pytest.raises((ArgumentError, TypeError), match="initial_state"):
        linear_scan(x, x, 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises((ArgumentError, TypeError), match="initial_state"):
        selective_scan(x, x, -torch.rand(5, 3), maps, maps, initial_state=[1])  # pyright: ignore[reportArgumentType]
