"""The Triton kernels: the definition, forward and backward, on a GPU or in Triton's interpreter.

Whether kernels are interpreted is decided when they are imported. So where there is no GPU, one test runs this file
again, in a process in which they are. That they compile is in ``test_triton_compile.py``.
"""

import os
import subprocess
import sys

import pytest
import torch

from containment import check_contained
from dualform.check.op_cases import OpCase
from dualform.check.run import compare
from dualform.core.errors import BackendError
from dualform.core.packing import from_lengths
from dualform.ops import (
    OPS,
    add_norm,
    backend,
    causal_conv1d,
    causal_conv1d_update,
    diagonal_ssm,
    gated_norm,
    linear_scan,
    selective_scan,
    selective_state_update,
    ssd,
)
from dualform.ops.op import Op
from dualform.ops.triton.support import INTERPRETED, missing
from test_ssd import DECAYS, as_exact_as_a_loop, stays_in_its_run

pytestmark = pytest.mark.skipif(bool(missing()), reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="test_in_the_interpreter runs it")
PACKED = [0, 3, 0, 61, 1, 30, 0]


def normal(*shape: int, complex: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex128 if complex else torch.float64)


def conv(batch, length, width, taps, activation="silu", bias=True, packed=None):
    rows = len(packed) if packed else batch
    tensors = {
        "x": normal(batch, length, width),
        "weight": normal(width, taps),
        **({"bias": normal(width)} if bias else {}),
        "initial_state": normal(rows, width, taps - 1),
    }
    return case("causal_conv1d", causal_conv1d, tensors, packed, activation=activation)


def line(batch, length, *width, packed=None, complex=False, real_decay=False, expand=False, reverse=False):
    a = torch.rand(1 if expand else batch, 1 if expand else length, *width, dtype=torch.float64)
    a = 2 * a - 1 if real_decay or not complex else torch.polar(a, 3 * a)
    rows = len(packed) if packed else batch
    tensors = {
        "a": a.expand(batch, length, *width),
        "b": normal(batch, length, *width, complex=complex),
        "initial_state": normal(rows, *width, complex=complex),
    }
    return case("linear_scan", linear_scan, tensors, packed, reverse=reverse)


def selective(batch, length, width, states, groups=(1, 1), packed=None, plain=False):
    tensors = {
        "u": normal(batch, length, width),
        "delta": normal(batch, length, width) - 1,
        "A": -torch.rand(width, states, dtype=torch.float64) - 0.1,
        "B": normal(batch, length, groups[0], states),
        "C": normal(batch, length, groups[1], states),
        "initial_state": normal(len(packed) if packed else batch, width, states),
    }
    if plain:
        tensors["delta"] = tensors["delta"].abs()
        return case("selective_scan", selective_scan, tensors, packed)
    more = {"D": normal(width), "z": normal(batch, length, width), "delta_bias": normal(width)}
    return case("selective_scan", selective_scan, {**tensors, **more}, packed, delta_softplus=True)


def diagonal(batch, length, width, modes, packed=None):
    tensors = {
        "u": normal(batch, length, width),
        "Abar": torch.exp(torch.complex(-torch.rand(width, modes).double(), normal(width, modes))),
        "CB": normal(width, modes, complex=True),
        "initial_state": normal(len(packed) if packed else batch, width, modes, complex=True),
    }
    return case("diagonal_ssm", diagonal_ssm, tensors, packed)


def dual(batch, length, heads, width, states, groups=1, packed=None, skip="heads", gated=True, ids=None):
    tensors = {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads),
        "A": -torch.rand(heads, dtype=torch.float64) - 0.1,
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "initial_state": normal(len(packed) if packed else batch, heads, width, states),
    }
    if skip:
        tensors["D"] = normal(heads) if skip == "heads" else normal(heads, width)
    if gated:
        tensors["z"] = normal(batch, length, heads, width)
    marks = {} if ids is None else {"seq_idx": torch.tensor(ids, dtype=torch.int32)}
    return case("ssd", ssd, tensors, packed, dt_softplus=True, **marks)


def summed(*shape, bias=True, **options):
    streams = {"x": normal(*shape), "residual": normal(*shape), "weight": normal(shape[-1])}
    more = {"bias": normal(shape[-1])} if bias else {}
    return case("add_norm", add_norm, {**streams, **more}, None, **options)


def gated(*shape, bias=True, gate=True, **options):
    tensors = {"x": normal(*shape), "weight": normal(shape[-1])}
    more = {"bias": normal(shape[-1])} if bias else {}
    beside = {"z": normal(*shape)} if gate else {}
    return case("gated_norm", gated_norm, {**tensors, **more, **beside}, None, eps=0.1, **options)


def case(op, function, tensors, packed, **options):
    if packed:
        options["cu_seqlens"] = from_lengths(torch.tensor(packed)).to(torch.int32)
    return OpCase(op, op, function, tensors, options)


CASES = {
    "conv": lambda: conv(2, 63, 17, 4),
    "conv width 1": lambda: conv(3, 2, 1, 3, None),
    "conv one tap": lambda: conv(1, 65, 3, 1, bias=False),
    "conv wide": lambda: conv(1, 1, 130, 2),
    "conv wider": lambda: conv(1, 5, 300, 7, None),
    "conv several segments": lambda: conv(1, 135, 3, 4),
    "conv packed": lambda: conv(1, sum(PACKED), 5, 4, packed=PACKED),
    "conv packed long": lambda: conv(1, 140, 3, 4, packed=[70, 0, 2, 1, 67]),
    "scan": lambda: line(1, 63, 17),
    "scan reverse": lambda: line(3, 2, 1, reverse=True),
    "scan one step": lambda: line(1, 1, 130),
    "scan of matrices": lambda: line(1, 65, 1, 3, expand=True),
    "scan chunked": lambda: line(1, 70, 3),
    "scan complex": lambda: line(1, 70, 2, complex=True, reverse=True),
    "scan complex, real decay": lambda: line(2, 17, 5, complex=True, real_decay=True),
    "scan packed": lambda: line(1, sum(PACKED), 5, packed=PACKED),
    "scan packed complex": lambda: line(1, 70, 1, packed=[0, 3, 66, 1], complex=True, reverse=True),
    "selective": lambda: selective(2, 5, 3, 5),
    "selective groups": lambda: selective(1, 2, 6, 3, groups=(2, 3)),
    "selective chunked": lambda: selective(1, 19, 17, 3),
    "selective wide": lambda: selective(1, 1, 130, 1, plain=True),
    "selective packed": lambda: selective(1, 25, 2, 3, packed=[0, 3, 0, 11, 1, 10, 0]),
    "dual": lambda: dual(2, 37, 4, 5, 3, 2),
    "dual one": lambda: dual(1, 1, 1, 1, 1, skip="", gated=False),
    "dual wide": lambda: dual(1, 70, 2, 17, 70, skip="channels"),
    "dual packed": lambda: dual(1, 55, 2, 3, 4, packed=[0, 3, 0, 41, 1, 10, 0], skip="channels", gated=False),
    "dual packed, gated": lambda: dual(1, 30, 3, 3, 4, packed=[0, 12, 0, 17, 1], skip=""),
    "dual runs": lambda: dual(2, 35, 2, 3, 4, ids=[[0] * 9 + [1, -1, 0] + [1] * 23, [2] * 16 + [0] * 19]),
    "diagonal": lambda: diagonal(2, 5, 3, 6),
    "diagonal chunked": lambda: diagonal(1, 19, 17, 3),
    "diagonal wide": lambda: diagonal(1, 1, 130, 1),
    "diagonal packed": lambda: diagonal(1, 25, 2, 3, packed=[0, 3, 0, 11, 1, 10, 0]),
    "add": lambda: summed(2, 5, 17),
    "add centered": lambda: summed(3, 130, bias=False, center=True),
    "add one": lambda: summed(1, 3, 1, eps=0.1),
    "add many rows": lambda: summed(1, 18, 520),
    "gate": lambda: gated(2, 3, 51, groups=3),
    "gate centered": lambda: gated(7, 34, groups=2, center=True),
    "gate behind": lambda: gated(2, 9, 17, norm_before_gate=True),
    "gate behind, centered": lambda: gated(1, 2, 66, groups=2, bias=False, center=True, norm_before_gate=True),
    "no gate": lambda: gated(5, 100, bias=False, gate=False),
    "scan packed wide": lambda: line(1, 9, 35, packed=[2, 0, 7], reverse=True),
}
EMPTY = {
    "conv": lambda: conv(2, 0, 3, 4),
    "scan": lambda: line(2, 0, 3),
    "selective": lambda: selective(2, 0, 3, 5),
    "dual": lambda: dual(2, 0, 3, 5, 4),
    "diagonal": lambda: diagonal(2, 0, 3, 5),
}
STRIDED = {
    "add": ("x", "residual"),
    "gate": ("x", "z"),
    "conv": ("x",),
    "scan": ("a", "b"),
    "selective": ("u", "delta", "z", "B", "C"),
    "dual": ("x", "dt", "B", "C", "z"),
    "diagonal": ("u",),
}
CONVERTED = ("add", "gate", "conv", "conv packed", "scan", "scan packed", "selective", "diagonal")
# In the interpreter float64 shows the mathematics, and bfloat16, in some cases, the conversions.
DTYPES = {
    torch.float64: CASES,
    torch.float32: CASES if GPU else (),
    torch.bfloat16: CASES if GPU else CONVERTED,
    torch.float16: [name for name in CASES if name.startswith("dual")] if GPU else ("dual packed, gated",),
}


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Segments of a few steps, so that short sequences cross several."""
    for op in ("diagonal_ssm", "selective_scan"):
        monkeypatch.setattr(sys.modules[f"dualform.ops.triton.{op}"], "_SAVE_EVERY", 8)
    monkeypatch.setattr(sys.modules["dualform.ops.triton.ssd"], "_CHUNK", 16)


@runs
@pytest.mark.parametrize(("dtype", "name"), [(d, n) for d, names in DTYPES.items() for n in names], ids=str)
def test_kernels_are_the_definition(name, dtype, poison):
    given = CASES[name]()
    if GPU and given.op == "ssd" and dtype.itemsize > 2:
        pytest.skip("its products are those of tensor cores")
    for backward in (False, True):
        found, allowed = compare(given, "triton", DEVICE, dtype, backward=backward)
        assert found.error <= allowed, found


@pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it")
def test_gradients_of_decays_are_as_exact_as_a_loop(monkeypatch):
    monkeypatch.setattr(sys.modules["dualform.ops.triton.ssd"], "_CHUNK", 64)
    as_exact_as_a_loop("triton", DECAYS["mixed"], 0)
    as_exact_as_a_loop("triton", DECAYS["mixed"], 0, torch.float16, ("A", "dt"))


LARGE = {
    "rows": lambda: dual(2, 300, 8, 64, 128, groups=2),
    "skip by channel": lambda: dual(1, 300, 4, 64, 128, skip="channels"),
    "wide, skip only": lambda: dual(1, 200, 4, 128, 128, gated=False),
    "gate only": lambda: dual(1, 200, 4, 64, 64, skip=""),
    "packed": lambda: dual(1, 300, 8, 64, 128, groups=2, packed=[0, 1, 63, 64, 65, 0, 107], skip="channels"),
    "odd": lambda: dual(2, 77, 6, 24, 40, groups=3),
    "one chunk": lambda: dual(2, 50, 8, 64, 128, groups=2),
    "one step": lambda: dual(2, 1, 4, 64, 128),
}


@pytest.mark.gpu
@pytest.mark.parametrize("states", [1, 5, 16, 24, 40, 64, 100])
@pytest.mark.parametrize("width", [5, 16, 20, 33, 64])
def test_small_heads_of_mamba2_are_the_definition(width, states, poison, monkeypatch):
    """As they are called: Triton can be wrong at one size of its matrix products and right at the next."""
    monkeypatch.setattr(sys.modules["dualform.ops.triton.ssd"], "_CHUNK", 64)
    for given in (dual(1, 1, 2, width, states), dual(1, 70, 2, width, states)):
        for backward in (False, True):
            found, allowed = compare(given, "triton", DEVICE, torch.float16, backward=backward)
            assert found.error <= allowed, found


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_the_gated_scan_of_mamba2_in_bfloat16(name, poison, monkeypatch):
    """Everything is rounded once: the outputs, and what the products within and between chunks are given."""
    monkeypatch.setattr(sys.modules["dualform.ops.triton.ssd"], "_CHUNK", 64)
    given = LARGE[name]()
    rounded = given.cast(DEVICE, torch.bfloat16)

    def run(tensors, name):
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        torch.manual_seed(1)
        with backend(name):
            y, final = given.call(leaves)
        weights = [torch.randn_like(m, dtype=torch.float32) for m in (y, final)]
        weights = [weights[0].to(torch.bfloat16).to(y.dtype), weights[1].to(final.dtype)]
        grads = torch.autograd.grad((y, final), list(leaves.values()), weights)
        return {"y": y.detach(), "final": final.detach(), **dict(zip(leaves, grads, strict=True))}

    got = run(rounded, "triton")
    want = run({k: v.double() for k, v in rounded.items()}, "reference")
    for k, exact in want.items():
        error = float((got[k].double() - exact).norm() / exact.norm())
        allowed = {"y": 4e-3, "A": 3e-2}.get(k, 1e-2)  # the gradient of A is a sum over all steps
        assert error <= allowed, f"{k}: {error:.2g}"


# Packed, the sequence in which something is planted ends within a span, and the next one lies in the next span, too.
CONTAINED = {
    "conv": lambda: conv(2, 13, 3, 4),
    "conv packed": lambda: conv(1, 72, 3, 4, packed=[5, 0, 60, 2, 5]),
    "scan": lambda: line(2, 37, 3),
    "scan packed": lambda: line(1, 75, 3, packed=[2, 40, 0, 30, 3]),
    "scan packed complex": lambda: line(1, 75, 2, packed=[3, 30, 0, 40, 2], complex=True, reverse=True),
    "selective": lambda: selective(2, 10, 3, 4),
    "selective packed": lambda: selective(1, 12, 3, 4, packed=[1, 0, 6, 5]),
    "dual": lambda: dual(2, 34, 1, 3, 4),
    "dual packed": lambda: dual(1, 25, 1, 3, 4, packed=[2, 0, 20, 3], skip="channels"),
    "diagonal": lambda: diagonal(2, 10, 3, 4),
    "diagonal packed": lambda: diagonal(1, 12, 3, 4, packed=[1, 0, 6, 5]),
}


@runs
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets
@pytest.mark.parametrize("name", [name for name in CONTAINED if GPU or "packed" in name or name in ("conv", "scan")])
def test_what_is_not_finite_stays_in_its_sequence(name):
    given = CONTAINED[name]()
    dual = given.op == "ssd"  # within a chunk all steps see each other, through the zeros of a masked product
    a = record_of(given, torch.bfloat16 if dual and GPU else torch.float32 if GPU else torch.float64, DEVICE)
    found, elementwise = triton_backend(OPS[given.op]), given.op in ("causal_conv1d", "linear_scan", "diagonal_ssm")
    values = (float("nan"), float("inf")) if GPU else (float("nan"),)  # interpreted, each takes seconds
    chunk = 16 if dual else 1
    check_contained(OPS[given.op], a, found.forward, found.backward, chunk=chunk, channels=elementwise, values=values)


@pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it, in float64")
def test_what_is_not_finite_stays_in_its_run():
    stays_in_its_run("triton", float("nan"), ("x", "dt", "B", "C", "z"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_runs_take_no_synchronisation(name):
    given = dual(1, 128, 4, 64, 128, ids=[[0] * 50 + [1] * 78])
    tensors = {k: v.requires_grad_() for k, v in given.cast(DEVICE, torch.bfloat16).items()}
    ids = given.options["seq_idx"].to(DEVICE)

    def run():
        with backend(name):
            y, final = ssd(**tensors, seq_idx=ids)
        torch.autograd.grad(y.float().mean() + final.mean(), list(tensors.values()))

    run()  # compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@runs
@pytest.mark.parametrize("name", EMPTY)
def test_no_time_passes_the_state_on(name, poison):
    given = EMPTY[name]()
    dtype = torch.bfloat16 if GPU else torch.float64
    tensors = {k: v.requires_grad_() for k, v in given.cast(DEVICE, dtype).items()}
    with backend("triton"):
        y, final = given.call(tensors)
        found = dict(zip(tensors, torch.autograd.grad(3 * final.real.sum(), list(tensors.values())), strict=True))
    assert y.shape[:2] == (2, 0) and torch.equal(final, tensors["initial_state"])
    assert all(torch.equal(g, torch.full_like(g, 3 * (k == "initial_state"))) for k, g in found.items())


@runs
@pytest.mark.parametrize("name", STRIDED)
def test_slices_of_a_projection_are_read_in_place(name):
    given = CASES[name]()
    whole = given.cast(DEVICE, torch.bfloat16 if GPU and given.op == "ssd" else torch.float32)
    sliced = {k: slice_of(v) if v.dim() > 2 and k in STRIDED[name] else v for k, v in whole.items()}
    with backend("triton"):
        for got, want in zip(given.call(sliced), given.call(whole), strict=True):
            torch.testing.assert_close(got, want)  # unaligned, sums may run in another order


def slice_of(x: torch.Tensor) -> torch.Tensor:
    """The same values inside of wider rows of NaN."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 6), float("nan"))
    wide[..., 2:-4] = x
    return wide[..., 2:-4]


@pytest.mark.gpu
def test_a_step_size_that_is_nan_stays_nan():
    """GPUs take the lesser of 20 and NaN to be 20."""
    given = selective(1, 9, 3, 4)
    tensors = given.cast(DEVICE, torch.float32)
    tensors["delta"][0, 4, 1] = float("nan")
    with backend("triton"):
        y, final = given.call(tensors)
        steps = step_tensors("channels", DEVICE, torch.float32)
        one = step("channels", {**steps, "dt": torch.full_like(steps["dt"], float("nan"))})
    assert y[0, 4:, 1].isnan().all() and y[0, :4].isfinite().all() and y[..., 0].isfinite().all()
    assert final[0, 1].isnan().all() and one[0].isnan().all() and one[1].isnan().all()


STEPS = {
    "conv": (causal_conv1d_update, {"x": (2, 5), "state": (2, 5, 3), "weight": (5, 4), "bias": (5,)}, "silu"),
    "conv one tap": (causal_conv1d_update, {"x": (1, 3), "state": (1, 3, 0), "weight": (3, 1)}, None),
    "channels": (
        selective_state_update,
        {"state": (2, 6, 5), "x": (2, 6), "dt": (2, 6), "A": (6, 5), "B": (2, 3, 5), "C": (2, 2, 5), "z": (2, 6)},
        None,
    ),
    "heads": (
        selective_state_update,
        {
            "state": (2, 4, 3, 7),
            "x": (2, 4, 3),
            "dt": (2, 4, 1),
            "A": (4, 1, 1),
            "B": (2, 2, 7),
            "C": (2, 1, 7),
            "D": (4, 1),
            "dt_bias": (4, 1),
        },
        None,
    ),
    "ring rows": (
        causal_conv1d_update,
        {"x": (3, 2, 5), "state": (4, 5, 4), "weight": (5, 4), "rows": (3,), "cache_seqlens": (3,)},
        "silu",
    ),
    "channels rows": (
        selective_state_update,
        {"state": (4, 6, 5), "x": (3, 6), "dt": (3, 6), "A": (6, 5), "B": (3, 3, 5), "C": (3, 2, 5), "rows": (3,)},
        None,
    ),
}
INDICES = {"rows": [2, -1, 0], "cache_seqlens": [3, 1, 9]}


def step_tensors(name, device, dtype):
    _, shapes, _ = STEPS[name]
    generator = torch.Generator().manual_seed(0)
    tensors = {k: torch.randn(shape, generator=generator).to(device, dtype) for k, shape in shapes.items()}
    tensors |= {k: torch.tensor(v, device=device) for k, v in INDICES.items() if k in shapes}
    if dtype == torch.bfloat16:
        tensors |= {k: v.float() for k, v in tensors.items() if k in ("state", "A")}
    return tensors


def step(name, tensors, **more):
    function, shapes, activation = STEPS[name]
    return function(**tensors, **({"activation": activation} if "weight" in shapes else {"dt_softplus": True}), **more)


def step_record(name, device, dtype):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Op, "__call__", lambda op, a: seen.append((a, op)) or op.reference(a))
        step(name, step_tensors(name, device, dtype))
    return seen[0]


@runs
@pytest.mark.parametrize("name", STEPS)
def test_steps_are_the_definition(name, poison):
    tensors = step_tensors(name, DEVICE, torch.float64)
    with backend("reference"):
        want = step(name, tensors)
    with backend("triton"):
        got = step(name, tensors)
    torch.testing.assert_close(got, want)


@runs
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in STEPS if "rows" not in name])
def test_steps_write_their_state_in_place(name, state, poison):
    """In the memory that is given, which may be that of the state or lie in a wider table; rounded once."""
    tensors = step_tensors(name, DEVICE, torch.float32)
    tensors["state"] = tensors["state"].to(state)
    with backend("reference"):
        y, after = step(name, tensors)
    table = tensors["state"].new_full((2 * len(after), *after.shape[1:]), 7.0)
    table[::2] = tensors["state"]
    tensors["state"] = table[::2]
    for given in (torch.full_like(after, 7.0, dtype=state), table[::2]):
        with backend("triton"):
            got, found = step(name, tensors, out_state=given)
        assert found is given
        torch.testing.assert_close(got, y)
        torch.testing.assert_close(found, after.to(state), rtol=2**-7 if state == torch.bfloat16 else 1.3e-6, atol=1e-5)
    assert (table[1::2] == 7).all()


@runs
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ring rows", "channels rows"])
def test_steps_write_rows_of_a_table(name, state, poison):
    """In place; rows that nothing names keep their bits, and an index beyond the table gives NaN and writes nothing."""
    tensors = step_tensors(name, DEVICE, torch.float32)
    table = tensors["state"].to(state)
    want, got = (torch.cat([table, torch.full_like(table[:1], 7.0)])[: len(table)] for _ in range(2))
    with backend("reference"):
        y, _ = step(name, tensors | {"state": want}, out_state=want)
    with backend("triton"):
        found, _ = step(name, tensors | {"state": got}, out_state=got)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(got, want, rtol=2**-7 if state == torch.bfloat16 else 1.3e-6, atol=1e-5)
    assert torch.equal(got[[1, 3]], table[[1, 3]]) and not found[1].any()
    a, op = step_record(name, DEVICE, torch.float32)
    beyond, kept = a.rows.clone(), got[2].clone()
    beyond[0] = 4
    found, _ = triton_backend(op).forward(a._replace(state=got, out_state=got, rows=beyond))
    assert found[0].isnan().all() and found[2].isfinite().all() and torch.equal(got[2], kept)
    found, after = triton_backend(op).forward(a._replace(rows=beyond))
    assert found[0].isnan().all() and after[0].isnan().all() and not after[1].any() and after[2].isfinite().all()


@runs
def test_steps_that_no_kernel_was_written_for_are_refused():
    tensors = step_tensors("heads", DEVICE, torch.float32)
    wide = {**tensors, "dt": tensors["dt"].expand(2, 4, 3)}
    with backend("triton"):
        with pytest.raises(BackendError, match=r"A is \(4, 1, 1\) and dt \(2, 4, 3\)"):
            step("heads", wide)
        with pytest.raises(BackendError, match=r"dt is \(2, 4, 1\) but dt_bias \(4, 3\)"):
            step("heads", {**tensors, "dt_bias": torch.zeros(4, 3, device=DEVICE)})


@pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it")
@pytest.mark.parametrize("name", ["dual", "dual packed"])
def test_the_interpreter_refuses_products_of_bfloat16(name):
    """It would multiply the numbers' bits, and be wrong by many orders of magnitude without a word."""
    given = CASES[name]()
    with backend("triton"), pytest.raises(BackendError, match="interpreter takes products of the bits"):
        given.call(given.cast("cpu", torch.bfloat16))


@pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it")
@pytest.mark.parametrize("name", ["conv", "scan", "selective", "diagonal"])
def test_the_interpreter_refuses_to_round_float64_to_bfloat16(name):
    given = CASES[name]()
    wide = [k for k, v in given.tensors.items() if k == "initial_state" or v.is_complex()]
    tensors = {k: v if k in wide else v.to(torch.bfloat16) for k, v in given.tensors.items()}
    with backend("triton"), pytest.raises(BackendError, match="cannot round float64 to bfloat16"):
        given.call(tensors)


def compile_forward(given: OpCase, dtype: torch.dtype = torch.bfloat16):
    a, op = record_of(given, dtype), OPS[given.op]
    found = triton_backend(op)
    return a, op, found, found.forward(a)


def compile_both_directions(given: OpCase, dtype: torch.dtype = torch.bfloat16) -> None:
    a, op, found, results = compile_forward(given, dtype)
    kept = [results[i] for i in op.keeps] + results[op.outputs :]
    found.backward([torch.empty_like(y) for y in results[: op.outputs]], kept, a)


def record_of(given: OpCase, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"):
    """What the operator is given by a call."""
    seen = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Op, "__call__", lambda op, a: seen.append(a) or op.reference(a))
        given.call(given.cast(device, dtype))
    return seen[0]


def triton_backend(op: Op):
    return next(b for b in op.backends if b.name == "triton")


def test_a_convolution_of_many_taps_is_left_to_others():
    """Its kernels unroll them, and Triton would compile for minutes."""
    few, many = (conv(1, 4, 3, taps) for taps in (8, 9))
    refuses = triton_backend(OPS["causal_conv1d"]).refuses
    assert refuses(record_of(few, torch.float32)) is None
    assert refuses(record_of(many, torch.float32)) == "a width of 9, more than 8"


def test_triton_is_imported_by_the_first_launch():
    if INTERPRETED:
        pytest.skip("it is the same where kernels are interpreted")
    code = "import sys, dualform.ops; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def passes_interpreted(file: str, seconds: int = 900) -> None:
    """Run a file of tests again, in a process in which kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests of this file run as they are")
def test_in_the_interpreter():
    passes_interpreted(__file__)
