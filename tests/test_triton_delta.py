"""The Triton kernels of the gated delta rule, as ``test_triton.py`` has those of other operators."""

import sys

import pytest
import torch
from torch import Tensor

from containment import check_contained
from dualform.check.op_cases import OpCase
from dualform.check.run import compare
from dualform.core.errors import BackendError
from dualform.ops import OPS, backend, gated_delta_rule, gated_delta_rule_update
from dualform.ops.gated_delta_rule import GatedDeltaRuleUpdate
from dualform.ops.triton.support import INTERPRETED, missing
from test_triton import (
    DEVICE,
    GPU,
    case,
    compile_both_directions,
    normal,
    passes_interpreted,
    record_of,
    runs,
    slice_of,
    triton_backend,
)

pytestmark = pytest.mark.skipif(bool(missing()), reason="Triton is not installed")


def delta(batch, length, heads, groups, keys, width, packed=None, decays=True, scale=0.6):
    tensors = {
        "q": normal(batch, length, groups, keys),
        "k": torch.nn.functional.normalize(normal(batch, length, groups, keys), dim=-1),
        "v": normal(batch, length, heads, width),
        "beta": 1.5 * torch.rand(batch, length, heads, dtype=torch.float64),
        "initial_state": normal(len(packed) if packed else batch, heads, keys, width),
    }
    if decays:
        tensors["log_decay"] = -torch.rand(batch, length, heads, dtype=torch.float64).square()
    return case("gated_delta_rule", gated_delta_rule, tensors, packed, scale=scale)


CASES = {
    "rows": lambda: delta(1, 35, 2, 1, 5, 3),
    "one": lambda: delta(1, 1, 1, 1, 1, 1, decays=False),
    "wide": lambda: delta(1, 33, 1, 1, 17, 20),
    "packed": lambda: delta(1, 38, 1, 1, 3, 4, packed=[0, 3, 0, 34, 1]),
}
SMALL = [(n, p) for n in (1, 5, 16, 24, 40, 64, 100) for p in (5, 16, 20, 32, 33, 64)]
LARGE = {
    "rows": lambda: delta(2, 300, 8, 4, 128, 128, scale=128**-0.5),
    "no decay": lambda: delta(1, 300, 4, 4, 64, 128, decays=False),
    "packed": lambda: delta(1, 300, 8, 8, 128, 128, packed=[0, 1, 63, 64, 65, 0, 107]),
    "odd": lambda: delta(2, 77, 6, 3, 24, 200),
    "one chunk": lambda: delta(2, 50, 4, 2, 128, 128),
    "one step": lambda: delta(2, 1, 4, 4, 64, 64),
}


@pytest.fixture(autouse=True)
def few_columns(monkeypatch):
    """Blocks of a few columns, so that small sizes cross several."""
    module = sys.modules["dualform.ops.triton.gated_delta_rule"]
    monkeypatch.setattr(module, "_COLUMNS", dict.fromkeys(module._COLUMNS, 16))


@pytest.fixture
def as_they_are(monkeypatch, few_columns):
    monkeypatch.undo()


@runs
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_definition(name, poison):
    """In the interpreter float64 shows the mathematics."""
    dtypes = (torch.bfloat16, torch.float16) if GPU else (torch.float64,)
    for dtype in dtypes:
        for backward in (False, True):
            found, allowed = compare(CASES[name](), "triton", DEVICE, dtype, backward=backward)
            assert found.error <= allowed, found


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "p"), SMALL)
def test_small_heads_are_the_definition(n, p, poison, as_they_are):
    """As they are called: Triton can be wrong at one size of its matrix products and right at the next."""
    for given in (delta(1, 1, 2, 1, n, p, decays=False), delta(1, 70, 2, 2, n, p)):
        for backward in (False, True):
            found, allowed = compare(given, "triton", DEVICE, torch.float16, backward=backward)
            assert found.error <= allowed, found


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_heads_of_models_in_bfloat16(name, poison, as_they_are):
    """All is rounded once, but for what the products within and between chunks are given."""
    given = LARGE[name]()
    rounded = given.cast(DEVICE, torch.bfloat16)
    for key in ("beta", "log_decay"):
        if key in rounded:
            rounded[key] = given.tensors[key].to(DEVICE, torch.float32)

    def run(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        torch.manual_seed(1)
        with backend(name):
            y, final = given.call(leaves)
        weights = [torch.randn_like(m, dtype=torch.float32).to(torch.bfloat16).to(m.dtype) for m in (y, final)]
        grads = torch.autograd.grad((y, final), list(leaves.values()), weights)
        return {"y": y.detach(), "final": final.detach(), **dict(zip(leaves, grads, strict=True))}

    got, again = run(rounded, "triton"), run(rounded, "triton")
    assert all(torch.equal(got[k], again[k]) for k in got), "a race"
    want = run({k: v.double() for k, v in rounded.items()}, "reference")
    errors = {k: float((got[k].double() - exact).norm() / exact.norm()) for k, exact in want.items()}
    assert all(error <= 1e-2 for error in errors.values()), errors


@pytest.mark.gpu
def test_the_same_key_again_and_again_loses_nothing(as_they_are):
    """The inverse of a chunk is then as large as it can be, and rounded writes undo each other."""
    q, k, v = (torch.randn(1, 200, 1, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    k = torch.zeros_like(k)
    k[..., 3] = 1
    with backend("triton"):
        y, final = gated_delta_rule(q, k, v, torch.ones(1, 200, 1, device=DEVICE))
    for got, want in ((y, q[..., 3:4] * v), (final[0, 0, 3], v[0, -1, 0])):
        assert (got.float() - want.float()).norm() <= 3e-2 * want.float().norm()


@runs
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets
def test_what_is_not_finite_stays_in_its_sequence():
    given = delta(1, 39, 1, 1, 3, 4, packed=[2, 0, 34, 3])
    a = record_of(given, torch.bfloat16 if GPU else torch.float64, DEVICE)
    found = triton_backend(OPS[given.op])
    check_contained(OPS[given.op], a, found.forward, found.backward, chunk=32, values=(float("nan"),))


@runs
def test_no_time_passes_the_state_on(poison):
    given = delta(2, 0, 2, 1, 3, 5)
    tensors = {k: v.requires_grad_() for k, v in given.cast(DEVICE, torch.float16).items()}
    with backend("triton"):
        y, final = given.call(tensors)
        found = dict(zip(tensors, torch.autograd.grad(3 * final.sum(), list(tensors.values())), strict=True))
    assert y.shape == (2, 0, 2, 5) and torch.equal(final, tensors["initial_state"])
    assert all(torch.equal(g, torch.full_like(g, 3 * (k == "initial_state"))) for k, g in found.items())


@runs
def test_slices_of_a_projection_are_read_in_place():
    given = CASES["rows"]()
    whole = given.cast(DEVICE, torch.bfloat16 if GPU else torch.float32)
    sliced = {k: v if k == "initial_state" else slice_of(v) for k, v in whole.items()}
    with backend("triton"):
        for got, want in zip(given.call(sliced), given.call(whole), strict=True):
            torch.testing.assert_close(got, want)


NAMES = {"inverses", "states", "outputs", "adjoint", "gradients", "gated_delta_rule_update"}
STEPS: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "no decay": ((), torch.float32),
    "heads": ((3, 4), torch.float32),
    "channels": ((3, 4, 5), torch.bfloat16),
}


@runs
@pytest.mark.parametrize("rows", [None, [2, -1, 0]], ids=["batch", "rows"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_definition(name, rows, poison):
    """Also in place, in the memory of a table; and an index beyond it gives NaN and writes nothing."""
    shape, dtype = STEPS[name]
    state = torch.randn(3 if rows is None else 4, 4, 5, 35).to(DEVICE, dtype)
    q, k, v, beta = (torch.randn(3, *s, device=DEVICE) for s in ((2, 5), (2, 5), (4, 35), (4,)))
    given = [q, k, v, beta, -torch.rand(shape, device=DEVICE) if shape else None]
    index = {} if rows is None else {"rows": torch.tensor(rows, device=DEVICE)}
    options = {**index, "scale": 0.5}
    with backend("reference"):
        y, after = gated_delta_rule_update(state, *given, **options)
    with backend("triton"):
        found, fresh = gated_delta_rule_update(state, *given, **options)
        table = state.clone()
        again, written = gated_delta_rule_update(table, *given, out_state=table, **options)
    assert written is table
    for got, want in ((found, y), (fresh, after), (again, y)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    places = [0, 1, 2] if rows is None else [2, 0]
    kept = after if rows is None else after[[0, 2]]
    torch.testing.assert_close(table[places], kept.to(dtype), rtol=2**-7, atol=1e-5)
    if rows is not None:
        assert torch.equal(table[[1, 3]], state[[1, 3]]) and not found[1].any()
        a = GatedDeltaRuleUpdate(table, *given, 0.5, table, torch.tensor([4, -1, 0], device=DEVICE))
        before = table.clone()
        found, _ = triton_backend(OPS["gated_delta_rule_update"]).forward(a)
        assert found[0].isnan().all() and found[2].isfinite().all() and torch.equal(table[1:], before[1:])


@runs
def test_what_no_kernel_was_written_for_is_refused():
    given = CASES["rows"]().cast(DEVICE, torch.float16)
    given["log_decay"] = given["log_decay"][..., None].expand(1, 35, 2, 5)
    with backend("triton"), pytest.raises(BackendError, match="its kernels have one for each head"):
        gated_delta_rule(**given)
    with backend("triton"), pytest.raises(BackendError, match=r"N x P is 200 x 3, expected at most 128 x 512"):
        case = delta(1, 2, 1, 1, 200, 3)
        case.call(case.cast(DEVICE, torch.float16))


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("target", ["NVIDIA Hopper", "AMD MI300"])
def test_kernels_compile_for(target, as_they_are):
    from triton_targets import TARGETS, compiled, resources

    given: tuple[OpCase, ...] = (delta(1, 150, 2, 1, 64, 64, packed=[100, 50]),)
    if target == "NVIDIA Hopper":
        given = (delta(2, 128, 2, 2, 128, 128), delta(1, 1, 1, 1, 1, 1), delta(1, 70, 2, 1, 40, 20))
    with compiled(TARGETS[target]) as kernels:
        for one in given:
            compile_both_directions(one)
        q, v = torch.zeros(2, 2, 128, dtype=torch.bfloat16), torch.zeros(2, 4, 128, dtype=torch.bfloat16)
        state, beta = torch.zeros(2, 4, 128, 128), torch.zeros(2, 4)
        step = GatedDeltaRuleUpdate(state, q, q, v, beta, beta, 0.1, state, torch.zeros(2, dtype=torch.int64))
        triton_backend(OPS["gated_delta_rule_update"]).forward(step)
    assert {name for name, _ in kernels} == NAMES
    for name, kernel in kernels:
        used = resources(kernel)
        print(target, name, used, kernel.metadata.shared)  # seen with pytest -s
        assert used["spilled"] <= 64, f"{name} puts registers into memory: {used}"


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests of this file run as they are")
def test_in_the_interpreter():
    passes_interpreted(__file__)
