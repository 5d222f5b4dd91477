"""Compiled whole, without a graph break, every mixer is the same function: outputs, final state and gradients."""

import pytest
import torch

from dualform.check.cases import CASES, Case
from dualform.core.forms import whole
from dualform.core.laws import compare_gradients, gradients
from dualform.layers.registry import MIXERS

ONE_OF_EACH = {case.kind: case for case in CASES.values() if case.kind in MIXERS and case.name.endswith("d=3")}
ONE_OF_EACH["lm"] = CASES["lm mamba2 + shared attention"]

pytestmark = [  # while it traces, the compiler trips over warnings of its own library
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


@pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=list(ONE_OF_EACH))
@torch._dynamo.config.patch(allow_rnn=True)  # torch.nn.LSTM, off by default
def test_compiled_equals_eager(case: Case):
    torch.compiler.reset()
    trial = case.trial(5)
    compiled = torch.compile(trial.f.forward, fullgraph=True, backend="aot_eager", dynamic=False)
    got = gradients(trial, lambda f, x, state: compiled(x, state), "both")
    found = compare_gradients(got, gradients(trial, whole, "both"), "compiled")
    assert found.error <= 1e-9, found


def test_every_mixer_is_compiled():
    assert set(ONE_OF_EACH) == {*MIXERS, "lm"}
