"""Steps of whole blocks in Triton, as ``test_triton.py`` has the kernels of other operators."""

from typing import Any

import pytest
import torch

from dualform.check.block_steps import mamba2_block, mamba_block, one_mamba2_step, one_mamba_step
from dualform.core.errors import BackendError
from dualform.ops import OPS, backend, linear
from dualform.ops.mamba2_step import Mamba2Weights, mamba2_step
from dualform.ops.mamba_step import MATRICES, MambaWeights, mamba_step
from dualform.ops.triton.draw import largest
from dualform.ops.triton.support import INTERPRETED, missing
from test_triton import DEVICE, GPU, normal, passes_interpreted, runs, triton_backend

pytestmark = pytest.mark.skipif(bool(missing()), reason="Triton is not installed")

# Rows that are few, that are more, and that are more than a tile has; widths beside powers of two.
CASES: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any]]] = {
    "mamba": (mamba_block, {"bias": True}, one_mamba_step, {}),
    "mamba one": (mamba_block, {"bias": False, "sizes": (1, 1, 1, 1, 1, 4)}, one_mamba_step, {}),
    "mamba rows": (mamba_block, {"bias": True, "sizes": (6, 17, 33, 5, 3, 2)}, one_mamba_step, {"eps": 0.1}),
    "mamba many": (mamba_block, {"bias": False, "sizes": (35, 17, 40, 16, 3, 4)}, one_mamba_step, {}),
    "mamba two": (mamba_block, {"bias": True, "sizes": (2, 17, 33, 5, 3, 4)}, one_mamba_step, {}),
    "mamba2": (mamba2_block, {"bias": True}, one_mamba2_step, {}),
    "mamba2 one": (mamba2_block, {"bias": True, "sizes": (1, 17, 3, 5, 7, 4)}, one_mamba2_step, {"gate_eps": 0.1}),
    "mamba2 two": (mamba2_block, {"bias": True, "sizes": (2, 17, 3, 5, 7, 4)}, one_mamba2_step, {"gate_eps": 0.1}),
    "mamba2 many": (mamba2_block, {"sizes": (35, 17, 3, 5, 7, 4)}, one_mamba2_step, {"dt_limit": (0.1, 0.5)}),
    "mamba2 groups": (mamba2_block, {"groups": 2}, one_mamba2_step, {"groups": 2, "dt_limit": (0.1, 0.5)}),
    "mamba2 rows": (
        mamba2_block,
        {"groups": 3, "bias": True, "sizes": (5, 17, 3, 5, 7, 2)},
        one_mamba2_step,
        {"groups": 3, "norm_before_gate": True, "gate_eps": 0.1},
    ),
    "mamba2 one tap": (mamba2_block, {"sizes": (2, 9, 2, 3, 3, 1)}, one_mamba2_step, {}),
}


def given(name, dtype=torch.float64):
    make, options, run, more = CASES[name]
    torch.manual_seed(0)
    tensors = {k: m.to(DEVICE, dtype) for k, m in make(normal, **options).items()}
    return tensors, lambda tensors, **also: run(**tensors, **more, **also)


@runs
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_definition(name, poison):
    """Beside the states, and where they lie."""
    tensors, run = given(name)
    with backend("reference"):
        want = run(tensors)
    with backend("triton"):
        torch.testing.assert_close(run(tensors), want)
        kept = {k: m.clone() for k, m in tensors.items()}
        found = run(tensors, in_place=True)
    torch.testing.assert_close(found, want)
    assert found[1].data_ptr() == tensors["conv"].data_ptr() and found[2].data_ptr() == tensors["h"].data_ptr()
    assert all(torch.equal(kept[k], m) for k, m in tensors.items() if k not in ("conv", "h"))


@runs
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("mamba one", "mamba2 one tap")])
def test_matrices_of_16_bits_beside_a_stream_of_32(name, poison):
    tensors, run = given(name, torch.float32)
    tensors |= {k: m.half() for k, m in tensors.items() if k in MATRICES}
    with backend("reference"):
        want = run({k: m.double() for k, m in tensors.items()})
    with backend("triton"):
        found = run(tensors)
    for got, exact in zip(found, want, strict=True):
        assert got.dtype == torch.float32
        assert (got - exact).abs().max() < 2e-3 * exact.abs().max()


@runs
def test_rows_do_not_see_each_other(poison):
    tensors, run = given("mamba2 rows")
    with backend("triton"):
        want = run(tensors)
        tensors["x"][1], tensors["h"][1], tensors["conv"][1] = torch.nan, torch.nan, torch.nan
        found = run(tensors)
    others = [0, 2, 3, 4]
    assert all(torch.equal(got[others], had[others]) for got, had in zip(found, want, strict=True))
    assert found[0][1].isnan().all()


@runs
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (9, 65, 33)], ids=str)
def test_the_product_is_the_definition(shape, poison):
    rows, inputs, outputs = shape
    x, weight, bias = (normal(*s).to(DEVICE) for s in ((rows, inputs), (outputs, inputs), (outputs,)))
    with backend("triton"):
        torch.testing.assert_close(linear(x, weight, bias), x @ weight.mT + bias)
        torch.testing.assert_close(linear(x, weight), x @ weight.mT)


@runs
def test_what_no_kernel_was_written_for_is_refused():
    tensors = {k: m.to(DEVICE) for k, m in mamba_block(normal, bias=False, sizes=(1, 3, 2, 300, 1, 2)).items()}
    with backend("triton"), pytest.raises(BackendError, match="N is 300, expected at most 256"):
        one_mamba_step(**tensors)


def test_past_the_dispatcher_alone_states_are_written_in_place():
    """The operator itself writes to none of its arguments, whatever it is told."""
    tensors = {k: m.to(DEVICE) for k, m in mamba_block(normal, bias=True).items()}
    h = tensors["h"].clone()
    weights = MambaWeights(**{k: tensors.get(k) for k in MambaWeights._fields})
    torch.ops.dualform.mamba_step("", False, tensors["x"], tensors["conv"], tensors["h"], *weights, 1e-5, 0, True)
    compiled = torch.compile(mamba_step, fullgraph=True, backend="eager")
    compiled(tensors["x"], tensors["conv"], tensors["h"], weights, in_place=True)
    assert torch.equal(tensors["h"], h)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mamba", "mamba rows", "mamba2 groups", "mamba2 rows"])
def test_states_of_16_bits_beside_a_stream_of_32(name, dtype, poison):
    """They are read, and rounded once."""
    tensors, _ = given(name, torch.float32)
    *_, run, more = CASES[name]
    step, kind = (mamba_step, MambaWeights) if run is one_mamba_step else (mamba2_step, Mamba2Weights)
    weights = kind(*(tensors.get(field) for field in kind._fields))
    states = [tensors[name].to(dtype) for name in ("conv", "h")]
    with backend("reference"):
        want = step(tensors["x"], *states, weights, **more)
    assert [m.dtype for m in want] == [torch.float32, dtype, dtype]
    with backend("triton"):
        torch.testing.assert_close(step(tensors["x"], *states, weights, **more), want)
        found = step(tensors["x"], *states, weights, **more, in_place=True)
    torch.testing.assert_close(found, want)
    assert [m.data_ptr() for m in found[1:]] == [m.data_ptr() for m in states]


@runs
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 5), (2, 1024), (5, 2500)])
def test_the_largest_of_each_row(rows, width):
    """The first of equals; a NaN before all numbers; and whether it is finite."""
    x, inf, nan = normal(rows, width).to(DEVICE), float("inf"), float("nan")
    if rows > 2:
        x[0, 2:4], x[1, 2], x[1, 4], x[2, 1] = 9.0, nan, inf, inf
    if rows > 3:
        x[3], x[4, 1:] = -inf, -inf
    found = torch.full((2, rows), -7, device=DEVICE)
    largest(x, found)
    value, place = x.max(-1)
    assert torch.equal(found, torch.stack((place, value.isfinite().long())))


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("target", ["NVIDIA Hopper", "AMD MI300"])
def test_kernels_compile_for(target):
    """Of the sizes of models, and of sizes of one, of which Triton makes constants."""
    from triton_targets import TARGETS, compiled, resources

    made = [
        ("mamba_step", mamba_block(torch.randn, bias=False, sizes=(1, 768, 1536, 16, 48, 4))),
        ("mamba_step", mamba_block(torch.randn, bias=True, sizes=(1, 1, 1, 1, 1, 1))),
        ("mamba2_step", mamba2_block(torch.randn, bias=False, sizes=(4, 2048, 64, 64, 128, 4))),
        ("mamba2_step", mamba2_block(torch.randn, bias=False, sizes=(64, 768, 24, 64, 128, 4))),
    ]
    with compiled(TARGETS[target]) as kernels:
        largest(torch.randn(64, 50288), torch.zeros(2, 64, dtype=torch.int64))
        for op, tensors in made:
            tensors |= {k: m.bfloat16() for k, m in tensors.items() if k in MATRICES}
            numbers = {"eps": 1e-5, "group": 0, "in_place": True}
            if op == "mamba2_step":
                numbers |= {"groups": 1, "gate_eps": 1e-5, "norm_before_gate": False, "low": 0.0, "high": float("inf")}
            fields = {field: tensors.get(field) for field in OPS[op].fields if field not in numbers}
            triton_backend(OPS[op]).forward(OPS[op].arguments(**fields, **numbers))
    steps = {"project", "selective_state_update", "mamba2_update", "project_tiles", "causal_conv1d_update", "add"}
    assert {name for name, _ in kernels} == steps | {"forward", "parts", "whole"}
    early = {name for name, kernel in kernels if "griddepcontrol.wait" in kernel.asm.get("ptx", "")}
    assert early == (steps | {"forward", "parts", "whole"} if target == "NVIDIA Hopper" else set())
    for name, kernel in kernels:
        used = resources(kernel)
        print(target, name, used)  # seen with pytest -s
        assert used["spilled"] <= 64, f"{name} puts registers into memory: {used}"


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests of this file run as they are")
def test_in_the_interpreter():
    passes_interpreted(__file__, seconds=500)
