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


def test_faults_of_compilers_are_found():
    """In extracts of what Triton 3.6 and NVIDIA's assembler 12.8 made, which gave wrong numbers on a GPU."""
    from triton_targets import overwritten, read_before_written

    program = """
    %state = ttg.local_alloc : () -> !ttg.memdesc<2x128x32xf16, #shared, #smem, mutable>
    %new = ttg.local_alloc : () -> !ttg.memdesc<3x64x32xf16, #shared, #smem, mutable>
    %first = ttg.memdesc_index %state[%c0] : !ttg.memdesc<2x128x32xf16> -> !ttg.memdesc<128x32xf16>
    %second = ttg.memdesc_index %new[%c0] : !ttg.memdesc<3x64x32xf16> -> !ttg.memdesc<64x32xf16>
    %turned = ttg.memdesc_trans %first {order = array<i32: 1, 0>} : !ttg.memdesc<128x32xf16> -> !ttg.memdesc<32x128xf16>
    %3:3 = ttng.warp_group_dot_wait %product, %turned, %second {pendings = 1 : i32} : tensor<64x128xf32>
    """
    for name in ("%first", "%second") * 3:
        program += (
            f"%copy = ttg.async_copy_global_to_local %at, {name} mask %there : tensor<32x!tt.ptr<f16>> -> <32xf16>\n"
        )
    assert overwritten(program) == ["overwritten while 1 products run: {'%state': 2}"]
    assert overwritten(program.replace("<2x", "<3x")) == []
    assert overwritten(program.replace("pendings = 1", "pendings = 0")) == []

    instructions = """
        /*0010*/                   ULDC.64 UR6, c[0x0][0x210] ;
        /*0020*/              @!P0 UIADD3 UR14, UP0, UR7, 0x40, URZ ;
        /*0030*/                   UIADD3.X UR15, UR8, -0x7fffffe0, URZ, UP0, !UPT ;
        /*0040*/                   HGMMA.64x32x16.F32 R24, R40, gdesc[UR12].tnspB, R24 ;
    """
    found = ["UR8 is read before it is written: UIADD3.X UR15, UR8, -0x7fffffe0, URZ, UP0, !UPT"]
    assert read_before_written(instructions) == found
    assert read_before_written(instructions.replace("UR8", "UR6")) == []
    assert read_before_written(instructions.replace("UR8", "UR6").replace("R40, ", "")) == [
        "UR12 is read before it is written: HGMMA.64x32x16.F32 R24, gdesc[UR12].tnspB, R24"
    ]
