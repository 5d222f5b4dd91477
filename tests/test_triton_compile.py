"""The Triton kernels compile for processors that need not be here, and keep their numbers in registers."""

import sys

import pytest
import torch

from dualform.ops.triton.support import INTERPRETED, missing
from test_triton import (
    PACKED,
    STEPS,
    compile_both_directions,
    conv,
    diagonal,
    dual,
    gated,
    line,
    selective,
    short_segments,  # noqa: F401  # a fixture
    step_record,
    summed,
    triton_backend,
)

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled"),
]
# In the sizes that kernels are made for, and packed.
COMPILED = {
    "conv": lambda: conv(2, 256, 256, 4),
    "conv packed": lambda: conv(1, sum(PACKED), 256, 4, packed=PACKED),
    "scan": lambda: line(2, 64, 128),
    "scan complex": lambda: line(2, 64, 128, complex=True, expand=True),
    "scan chunked, packed": lambda: line(1, 195, 16, packed=[100, 0, 95], reverse=True),
    "selective": lambda: selective(4, 64, 128, 16),
    "selective chunked, packed": lambda: selective(1, 39, 32, 16, packed=[30, 9]),
    "dual": lambda: dual(4, 128, 8, 64, 128),
    "dual chunked, packed": lambda: dual(1, 200, 2, 64, 128, packed=[150, 50], skip="channels", gated=False),
    "dual runs": lambda: dual(1, 128, 4, 64, 128, ids=[[0] * 50 + [1] * 78]),
    "diagonal": lambda: diagonal(4, 64, 64, 32),
    "add": lambda: summed(4, 128, 768),
    "add centered": lambda: summed(4, 128, 2048, center=True),
    "gate": lambda: gated(4, 128, 1536, bias=False),
    "gate groups": lambda: gated(4, 128, 4096, groups=8, norm_before_gate=True),
    "diagonal chunked, packed": lambda: diagonal(1, 39, 16, 32, packed=[30, 9]),
}
# Masks of sequences are the same ones at every size, and half of what an AMD compiler takes is for these two.
SMALLER = {
    "dual chunked, packed": lambda: dual(1, 200, 2, 16, 32, packed=[150, 50], skip="channels", gated=False),
    "dual runs": lambda: dual(1, 128, 4, 16, 32, ids=[[0] * 50 + [1] * 78]),
}
CASES = {"NVIDIA Hopper": COMPILED, "AMD MI300": {**COMPILED, **SMALLER}}


@pytest.mark.parametrize("target", CASES)
def test_kernels_compile_for(target, monkeypatch):
    from triton_targets import TARGETS, compiled, resources

    monkeypatch.setattr(sys.modules["dualform.ops.triton.ssd"], "_CHUNK", 64)
    with compiled(TARGETS[target]) as kernels:
        for name in STEPS:
            a, op = step_record(name, "cpu", torch.bfloat16)
            triton_backend(op).forward(a)
        for make in CASES[target].values():
            compile_both_directions(make())
    names = {name for name, _ in kernels}
    assert names >= {
        "forward",
        "backward",
        "summarize",
        "adjoint",
        "enter",
        "gather",
        *(f.__name__ for f, *_ in STEPS.values()),
    }
    for name, kernel in kernels:
        used = resources(kernel)
        print(target, name, used)  # seen with pytest -s
        assert used["spilled"] <= 64, f"{name} puts registers into memory: {used}"


def test_kernels_compile_for_sizes_of_one():
    """Triton makes a constant of an argument that is 1, and a constant has no methods."""
    from triton_targets import TARGETS, compiled

    smallest = (
        conv(1, 1, 1, 2), line(1, 1, 1), line(1, 1, 1, complex=True), selective(1, 1, 1, 1), diagonal(1, 1, 1, 1),
        dual(1, 1, 1, 1, 1), dual(1, 1, 1, 1, 1, packed=[1]), summed(1, 1, bias=False), gated(1, 1),
        gated(1, 1, norm_before_gate=True),
    )  # fmt: skip
    with compiled(TARGETS["NVIDIA Hopper"]) as kernels:
        for given in smallest:
            compile_both_directions(given)
    assert {name for name, _ in kernels} >= {"forward", "backward"}
