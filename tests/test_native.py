"""The CPU kernels, where they have been built: every instruction set is the definition, forward and backward."""

import pytest
import torch

from dualform.check.op_cases import op_cases
from dualform.check.run import compare
from dualform.core.errors import BackendError
from dualform.ops import OPS
from dualform.ops.native import library

pytestmark = pytest.mark.skipif(bool(library.missing), reason="the CPU kernels are not built")
NAMES = [
    case.name for case in op_cases(3) if case.op in ("causal_conv1d", "diagonal_ssm", "linear_scan", "selective_scan")
]


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instructions(request):
    if not library.choose(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.choose()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_the_definition(name, dtype, instructions, poison):
    case = next(c for c in op_cases(67) if c.name == name)
    assert any(b.name == "native" for b in OPS[case.op].backends)
    for backward in (False, True):
        try:
            found, allowed = compare(case, "native", torch.device("cpu"), dtype, backward=backward)
        except BackendError as error:
            assert "complex" in str(error) or "float16" in str(error)
            continue
        assert found.error <= allowed, found
