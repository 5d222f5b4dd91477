"""RWKV-7's recurrence in Triton: the definition, on a GPU or in Triton's interpreter; and its kernels compile.

As in ``test_triton.py``, where there is no GPU one test runs this file again, in a process that interprets kernels.
"""

import math

import pytest
import torch

from containment import check_contained
from dualform.check.op_cases import OpCase
from dualform.check.run import compare
from dualform.core.errors import BackendError
from dualform.core.packing import from_lengths
from dualform.ops import OPS, backend, wkv7
from dualform.ops.triton.support import INTERPRETED, missing
from test_triton import compile_both_directions, normal, passes_interpreted, record_of, triton_backend

pytestmark = pytest.mark.skipif(bool(missing()), reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="test_in_the_interpreter runs it")
WEAK, MIXED = (0.02, 0.6), (1e-3, 300.0)  # the second needs more than one border in a chunk


def case(batch, length, heads, states, width, packed=None, decays=WEAK) -> OpCase:
    key = torch.nn.functional.normalize(normal(batch, length, heads, states), dim=-1)
    low, high = map(math.log, decays)
    tensors = {
        "r": normal(batch, length, heads, states),
        "log_decay": -torch.exp(low + (high - low) * torch.rand(key.shape, dtype=torch.float64)),
        "k": normal(batch, length, heads, states),
        "v": normal(batch, length, heads, width),
        "a": -key,
        "b": key * torch.rand(key.shape, dtype=torch.float64),
        "initial_state": normal(len(packed) if packed else batch, heads, states, width),
    }
    options = {"cu_seqlens": from_lengths(torch.tensor(packed)).to(torch.int32)} if packed else {}
    return OpCase("wkv7", "wkv7", wkv7, tensors, options)


CASES = {
    "one step": lambda: case(2, 1, 1, 1, 1),
    "odd": lambda: case(2, 3, 2, 17, 3),
    "wide": lambda: case(1, 3, 1, 37, 35),
    "packed": lambda: case(1, 20, 1, 3, 7, packed=[0, 2, 0, 17, 1, 0]),
    "strong and weak decays": lambda: case(1, 17, 1, 5, 3, decays=MIXED),
}


@pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it, in float64")
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_definition(name, poison):
    for backward in (False, True):
        found, allowed = compare(CASES[name](), "triton", DEVICE, torch.float64, backward=backward)
        assert found.error <= allowed, found


LARGE = {
    "rows": lambda: case(2, 300, 4, 64, 64),
    "packed": lambda: case(1, 300, 4, 64, 64, packed=[0, 1, 63, 64, 65, 0, 107]),
    "odd": lambda: case(2, 77, 3, 24, 40),
    "strong and weak decays": lambda: case(1, 200, 2, 64, 64, decays=MIXED),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_kernels_on_tensor_cores(name, dtype, poison):
    """Everything is rounded once: the outputs, and what the products within and between chunks are given."""
    given = LARGE[name]()
    rounded = given.cast(DEVICE, dtype)

    def run(tensors, name):
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        torch.manual_seed(1)
        with backend(name):
            y, final = given.call(leaves)
        weights = [torch.randn_like(m, dtype=torch.float32) for m in (y, final)]
        weights = [weights[0].to(dtype).to(y.dtype), weights[1].to(final.dtype)]
        grads = torch.autograd.grad((y, final), list(leaves.values()), weights)
        return {"y": y.detach(), "final": final.detach(), **dict(zip(leaves, grads, strict=True))}

    got = run(rounded, "triton")
    want = run({k: v.double() for k, v in rounded.items()}, "reference")
    for k, exact in want.items():
        error = float((got[k].double() - exact).norm() / exact.norm())
        allowed = 3e-2 if k == "log_decay" else 1e-2  # a difference of sums
        assert error <= allowed, f"{k}: {error:.2g}"


@runs
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets
def test_what_is_not_finite_stays_in_its_sequence():
    given = case(1, 5, 1, 3, 4, packed=[1, 0, 3, 1])
    a = record_of(given, torch.bfloat16 if GPU else torch.float64, DEVICE)
    found = triton_backend(OPS["wkv7"])
    check_contained(OPS["wkv7"], a, found.forward, found.backward, chunk=16, values=(float("nan"),))


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("target", ["NVIDIA Hopper", "AMD MI300"])
def test_kernels_compile_for(target):
    from triton_targets import TARGETS, compiled, resources

    with compiled(TARGETS[target]) as kernels:
        size = 64 if target == "NVIDIA Hopper" else 16
        compile_both_directions(case(1, 70, 2, size, size, packed=[64, 6]))
    assert {name for name, _ in kernels} == {"prepare", "states", "outputs", "read_gradients", "gradients"}
    for name, kernel in kernels:
        used = resources(kernel)
        print(target, name, used)  # seen with pytest -s
        assert used["spilled"] <= 64 or target != "NVIDIA Hopper", f"{name} puts registers into memory: {used}"


@pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it")
def test_what_no_kernel_was_written_for_is_refused():
    with backend("triton"):
        with pytest.raises(BackendError, match="N x P is 65 x 3, expected at most 64 x 64"):
            given = case(1, 2, 1, 65, 3)
            given.call(given.cast("cpu", torch.float32))
        with pytest.raises(BackendError, match="interpreter takes products of the bits"):
            given = CASES["one step"]()
            given.call(given.cast("cpu", torch.bfloat16))


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests of this file run as they are")
def test_in_the_interpreter():
    passes_interpreted(__file__)
