"""Steps on the CPU kernels: products with few rows, whole blocks and models in one call, and when modules run."""

import operator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, bfloat16, float16, float32, float64, nn

from dualform.check.block_steps import (
    lti_block,
    mamba2_block,
    mamba_block,
    one_lti_step,
    one_mamba2_step,
    one_mamba_step,
)
from dualform.core.errors import ArgumentError
from dualform.core.tree import clone, leaves, take
from dualform.layers import projection, stream_step
from dualform.layers.attention import AttentionConfig
from dualform.layers.dss import DSSConfig
from dualform.layers.lru import LRUConfig
from dualform.layers.mamba import Mamba, MambaConfig
from dualform.layers.mamba2 import Mamba2, Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.projection import project, project_by
from dualform.layers.s4 import S4Config
from dualform.layers.s4d import S4D, S4DConfig
from dualform.layers.s5 import S5, S5Config
from dualform.models.config import ModelConfig
from dualform.models.heads import SequenceClassifier, StepRegressor
from dualform.models.lm import LanguageModel
from dualform.ops import backend, linear, mamba_step
from dualform.ops.mamba_step import MATRICES, MambaWeights
from dualform.ops.native import library

pytestmark = pytest.mark.skipif(bool(library.missing), reason=library.missing)

TOLERANCE = {float32: 2e-6, float64: 1e-14, bfloat16: 5e-3, float16: 7e-4}


def normal(*shape: int, dtype: torch.dtype = float64) -> Tensor:
    return torch.randn(*shape, dtype=float64).to(dtype)


def off(got: Tensor, want: Tensor) -> float:
    """The largest error, relative to the largest number."""
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The kernels that are called, also for a single row of the small matrices of tests."""
    monkeypatch.setattr(projection, "_least", lambda rows, dtype: 0)
    made, call = [], library.call
    monkeypatch.setattr(library, "call", lambda name, *args, **fields: (made.append(name), call(name, *args, **fields)))
    return made


@pytest.mark.parametrize(
    "dtype, rows, numbers",
    [(float32, 1, 2**19), (float32, 2, 2**17), (float32, 16, 2**17), (bfloat16, 1, 2**14), (bfloat16, 4, 2**13)],
)
@torch.inference_mode()
def test_a_small_matrix_is_left_to_pytorch(dtype, rows, numbers, monkeypatch):
    """Where the call would take longer than reading the matrix."""
    made, call = [], library.call
    monkeypatch.setattr(library, "call", lambda name, *args, **fields: (made.append(name), call(name, *args, **fields)))
    for outputs, kernels in ((numbers // 64 - 1, []), (numbers // 64, ["linear"])):
        made.clear()
        project(nn.Linear(64, outputs, dtype=dtype), torch.randn(rows, 64, dtype=dtype))
        assert made == kernels


@torch.inference_mode()
def test_several_rows_do_not_wait_for_the_threads_of_pytorch(monkeypatch, threads):
    made, call = [], library.call
    monkeypatch.setattr(library, "call", lambda name, *args, **fields: (made.append(name), call(name, *args, **fields)))
    threads(2)
    for rows, kernels in ((1, []), (2, ["linear"])):
        made.clear()
        project(nn.Linear(64, 3), torch.randn(rows, 64))
        assert made == kernels


# Widths beside and across the lanes of every vector, outputs beside four, rows beside what is summed at once.
SIZES = [(1, 1, 1), (2, 3, 5), (5, 17, 3), (7, 63, 33), (16, 65, 6), (19, 130, 41)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_product_is_the_definition(dtype, count, instructions, poison, threads):
    threads(count)
    for (rows, width, outputs), bias in product(SIZES, (False, True)):
        x, weight = normal(rows, width, dtype=dtype), normal(outputs, width, dtype=dtype)
        b = normal(outputs, dtype=dtype) if bias else None
        with backend("native"):
            y = linear(x, weight, b)
        want = F.linear(x.double(), weight.double(), None if b is None else b.double())
        assert y.dtype == dtype and off(y, want) <= TOLERANCE[dtype], (rows, width, outputs)


def test_a_product_over_many_tasks_and_from_strided_rows(instructions, threads):
    threads(2)
    x, weight = normal(3, 80, dtype=float32)[:, 9:], normal(2000, 90, dtype=float32)[:, 19:]
    with backend("native"):
        assert off(linear(x, weight), F.linear(x.double(), weight.double())) <= TOLERANCE[float32]
        assert not linear(x[:, :0], weight[:, :0]).any()


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype, instructions):
    """Nor on how many they are, except that a single row is summed in another order."""
    x, weight = normal(16, 75, dtype=dtype), normal(50, 75, dtype=dtype)
    x[4] = torch.nan
    with backend("native"):
        y = linear(x, weight)
        for few in (2, 3, 5, 7, 16):
            assert torch.equal(linear(x[:few], weight).nan_to_num(nan=0.5), y[:few].nan_to_num(nan=0.5))
        assert off(linear(x[:1], weight), y[:1].double()) <= TOLERANCE[dtype]
    assert y[4].isnan().all() and y[torch.arange(16) != 4].isfinite().all()


def test_every_number_of_16_bits_is_read(instructions):
    for dtype in (float16, bfloat16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 1)
        with backend("native"):
            y = linear(torch.ones(1, 1, dtype=dtype), every)[0]
        assert torch.equal(y.isnan(), every[:, 0].isnan())
        normals = every[:, 0].abs() >= torch.finfo(dtype).tiny
        assert torch.equal(y[normals], every[normals, 0])


BLOCKS = {
    "mamba": (one_mamba_step, lambda: mamba_block(normal, bias=True, sizes=(3, 17, 33, 5, 3, 4)), {}),
    "mamba one": (one_mamba_step, lambda: mamba_block(normal, bias=False, sizes=(1, 1, 1, 1, 1, 1)), {}),
    "mamba rows": (one_mamba_step, lambda: mamba_block(normal, bias=False, sizes=(16, 130, 130, 16, 8, 2)), {}),
    "mamba2": (one_mamba2_step, lambda: mamba2_block(normal, 3, bias=True, sizes=(3, 17, 6, 5, 7, 4)), {"groups": 3}),
    "mamba2 one": (one_mamba2_step, lambda: mamba2_block(normal, sizes=(1, 1, 1, 1, 1, 1)), {}),
    "mamba2 rows": (
        one_mamba2_step,
        lambda: mamba2_block(normal, 2, bias=True, sizes=(16, 130, 4, 31, 33, 3)),
        {"groups": 2, "norm_before_gate": True, "dt_limit": (0.1, 0.5)},
    ),
    "mamba tiles": (one_mamba_step, lambda: mamba_block(normal, bias=True, sizes=(75, 17, 33, 5, 3, 4)), {}),
    "mamba2 tiles": (
        one_mamba2_step,
        lambda: mamba2_block(normal, 3, bias=True, sizes=(75, 17, 6, 5, 7, 3)),
        {"groups": 3, "dt_limit": (0.1, 0.5)},
    ),
    "lti": (one_lti_step, lambda: lti_block(normal, shared=False, gate=False, sizes=(3, 17, 5)), {}),
    "lti one": (one_lti_step, lambda: lti_block(normal, shared=False, gate=True, sizes=(1, 1, 1)), {}),
    "lti rows": (one_lti_step, lambda: lti_block(normal, shared=False, gate=True, bias=False, sizes=(19, 33, 16)), {}),
    "lti shared": (one_lti_step, lambda: lti_block(normal, shared=True, gate=True, sizes=(3, 17, 5)), {"eps": 0.1}),
    "lti shared rows": (
        one_lti_step,
        lambda: lti_block(normal, shared=True, gate=False, bias=False, sizes=(19, 33, 16)),
        {},
    ),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("matrix", [float64, float32, bfloat16, float16], ids=str)
@pytest.mark.parametrize("case", BLOCKS)
def test_a_step_of_a_block_is_the_definition(case, matrix, count, instructions, poison, threads):
    """Nothing is rounded to the dtype of the matrices."""
    threads(count)
    step, make, options = BLOCKS[case]
    real = float64 if matrix == float64 else float32
    given = {name: m.to(matrix if name in MATRICES else real) for name, m in make().items()}
    with torch.no_grad():
        with backend("native"):
            got = step(**given, **options)
        with backend("reference"):
            want = step(**{name: m.double() for name, m in given.items()}, **options)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == real
        assert not b.numel() or off(a, b) <= 5 * TOLERANCE[real]


def test_rows_of_a_block_do_not_see_each_other(instructions):
    given = {name: m.float() for name, m in mamba2_block(normal, sizes=(5, 17, 4, 6, 7, 4)).items()}
    given["h"][2] = torch.inf
    with torch.no_grad():
        whole = one_mamba2_step(**given)
        for rows in ([0, 1], [2, 4, 3], [4, 0]):
            few = one_mamba2_step(**{k: m[rows] if k in ("x", "conv", "h") else m for k, m in given.items()})
            for a, b in zip(few, whole, strict=True):
                assert torch.equal(a.nan_to_num(nan=0.5), b[rows].nan_to_num(nan=0.5))


@pytest.mark.parametrize("make", [one_mamba_step, one_mamba2_step, one_lti_step], ids=lambda make: make.__name__)
def test_a_row_of_many_does_not_depend_on_its_place_or_the_others(make, instructions, threads):
    """To the last bit, where there are tiles of rows."""
    threads(2)
    made = {
        one_mamba_step: lambda: mamba_block(normal, bias=True, sizes=(75, 17, 33, 5, 3, 4)),
        one_mamba2_step: lambda: mamba2_block(normal, bias=True, sizes=(75, 17, 4, 6, 7, 4)),
        one_lti_step: lambda: lti_block(normal, shared=True, gate=False, sizes=(75, 17, 5)),
    }[make]()
    given = {name: m.float() for name, m in made.items()}
    given["h"][40] = torch.nan
    order = torch.randperm(75)
    turned = {k: m[order] if k in ("x", "conv", "h") else m for k, m in given.items()}
    with torch.no_grad(), backend("native"):
        whole, other = make(**given), make(**turned)
    for a, b in zip(whole, other, strict=True):
        assert torch.equal(a[order].nan_to_num(nan=0.5), b.nan_to_num(nan=0.5))
    assert whole[0].isfinite().all(1).sum() == 74


def model(*parts: Any, pattern: str = "AB", dtype: torch.dtype = float32) -> LanguageModel:
    torch.manual_seed(0)
    letters = {letter: part if isinstance(part, tuple) else (part,) for letter, part in zip("AB", parts, strict=False)}
    return LanguageModel(ModelConfig(50, 24, letters, pattern)).to(dtype).eval()


MAMBA, MAMBA2 = MambaConfig(d_state=5, dt_rank=3), Mamba2Config(d_state=7, d_head=8, groups=2)
HYBRID = (MLPConfig(d_hidden=32), MAMBA2, MAMBA), AttentionConfig(heads=2)
MODELS = {
    "mamba": lambda: model(MAMBA, pattern="AAA"),
    "both": lambda: model(MAMBA, MAMBA2),
    "biases": lambda: model(MambaConfig(bias=True), Mamba2Config(d_head=8, bias=True, norm=False)),
    "order": lambda: model(Mamba2Config(d_head=8, norm_before_gate=True, dt_limit=(0.01, 0.2)), pattern="AA"),
    "hybrid": lambda: model(*HYBRID, pattern="ABA"),
    "runs": lambda: model(MAMBA2, AttentionConfig(heads=2, gate=True), pattern="AABA"),  # the gate has no kernel
    "norms of maps": lambda: model(MambaConfig(norm_maps=1e-5), MAMBA2),
    "heads": lambda: model(MambaConfig(heads=2), MAMBA2),
    "scaled": lambda: model(Mamba2Config(d_head=8, scales=(0.5, 1.0, 2.0, 1.0, 1.5)), MAMBA),
    "s4d": lambda: model(S4DConfig(d_state=6), pattern="AA"),
    "s5 and lru": lambda: model(S5Config(d_state=6), LRUConfig(d_state=5)),
    "s5 without pairs": lambda: model(S5Config(d_state=6, conj_pairs=False), DSSConfig(d_state=4)),
    "dss and mamba": lambda: model(DSSConfig(d_state=6, kernel="softmax", length=20), MAMBA),
    "s4": lambda: model(S4Config(d_state=6), S4DConfig(d_state=4)),  # S4 has no kernel
}


@pytest.mark.parametrize("rows", [1, 3, 17, 129])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_prepared_steps_are_the_steps(name, rows, threads):
    """Whether kernels take whole models, blocks, products of a few rows, or nothing, as for 129."""
    threads(2)
    lm, tokens = MODELS[name](), torch.randint(50, (6, rows))
    prepared, state, start = lm.prepare(), lm.init_state(rows), lm.init_state(rows)
    with backend("torch"):
        whole = lm(tokens.T, start)[0]
    for i, token in enumerate(tokens):
        logits, state = prepared.step(token, state)
        torch.testing.assert_close(logits, whole[:, i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [bfloat16, float16, float64], ids=str)
@torch.no_grad()
def test_prepared_steps_in_other_dtypes(dtype):
    """No further from exact weights' answer than steps that round in between."""
    lm = MODELS["both"]().to(dtype)
    exact, tokens = MODELS["both"]().to(dtype).double(), torch.randint(50, (6, 2))
    prepared, state, plain, want = lm.prepare(), lm.init_state(2), lm.init_state(2), exact.init_state(2)
    errors = torch.zeros(2, dtype=float64)
    for token in tokens:
        (a, state), (b, plain), (c, want) = prepared.step(token, state), lm.step(token, plain), exact.step(token, want)
        errors += torch.stack([(m.double() - c).norm() / c.norm() for m in (a, b)])
    assert errors[0] <= errors[1] + 1e-12 and all(m.dtype == float64 or dtype != float64 for m in leaves(state))


@torch.inference_mode()
def test_one_call_runs_a_whole_model(calls):
    lm, token = model(MAMBA, MAMBA2, pattern="ABAB"), torch.tensor([3])
    prepared = lm.prepare()
    _, state = prepared.step(token, lm.init_state(1))
    assert calls == ["mamba_step", "mamba2_step"] * 2 + ["head_step"]
    calls.clear()
    for _ in range(3):
        _, state = prepared.step(token, state)
    assert calls == ["steps"] * 3


@pytest.mark.parametrize("kind", [StepRegressor, SequenceClassifier])
@pytest.mark.parametrize("options", [{}, {"standardise": True, "missing": "carried"}], ids=["plain", "carried"])
@torch.inference_mode()
def test_a_step_of_a_model_of_sensors_is_one_call(kind, options, calls):
    config = ModelConfig(0, 8, {"S": (S4DConfig(d_state=6),), "L": (S5Config(d_state=6),)}, "SLS")
    torch.manual_seed(0)
    made, x = kind(config, 2, inputs=3, **options).eval(), normal(40, 4, 3, dtype=float32)
    if options:
        x[3:7, 1, 2] = torch.nan
    y, _ = made(x.transpose(0, 1))
    prepared, state = made.prepare(), made.init_state(4)
    calls.clear()
    for one in x:
        got, state = prepared.step(one, state)
    pooled = kind is SequenceClassifier  # over time, between the norm and the head
    assert calls == ["lti_step"] * 3 + ["head_step"] * (not pooled) + ["steps"] * 39
    torch.testing.assert_close(got, y if pooled else y[:, -1], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_large_layer_of_many_rows_runs_by_the_products_of_pytorch(calls, monkeypatch):
    lm, tokens = MODELS["s4d"](), torch.randint(50, (3, 129))
    want, _ = lm(tokens.T)
    for size, kernels in ((2**21, ["lti_step", "lti_step", "head_step", "steps", "steps"]), (0, [])):
        monkeypatch.setattr(stream_step, "_SMALL", size)
        calls.clear()
        prepared, state = lm.prepare(), lm.init_state(129)
        for i, token in enumerate(tokens):
            logits, state = prepared.step(token, state)
            torch.testing.assert_close(logits, want[:, i], rtol=1e-4, atol=1e-5)
        assert calls == kernels


@torch.inference_mode()
def test_one_call_runs_the_blocks_between_others(calls):
    """Of each run of blocks with kernels; their states come back in place, those between them as they are."""
    lm, tokens = MODELS["runs"](), torch.randint(50, (5, 2))
    prepared, other = lm.prepare(), lm.prepare()
    _, state = prepared.step(tokens[0], lm.init_state(2))
    assert calls == ["mamba2_step", "mamba2_step", "linear", "linear", "mamba2_step", "linear"]
    kept, plain = state, clone(state)
    for token in tokens[1:]:
        calls.clear()
        got, state = prepared.step(token, state)
        assert calls == ["steps", "linear", "linear", "steps", "linear"]
        want, plain = other.step(token, clone(plain))
        assert torch.equal(got, want)
    assert [a is b for a, b in zip(state, kept, strict=True)] == [True, True, False, True]
    fork = clone(state)
    (first, _), (again, _) = prepared.step(tokens[0], state), prepared.step(tokens[0], fork)
    assert torch.equal(first, again)


@torch.no_grad()
def test_only_a_state_that_comes_back_is_written_in_place():
    """What a caller made or keeps a copy of stays; forks, other rows and threads are right."""
    lm, (a, b) = model(MAMBA, MAMBA2), torch.tensor([[3, 4], [5, 6]])
    prepared, other = lm.prepare(), lm.prepare()
    start = lm.init_state(2)
    kept = clone(start)
    _, state = prepared.step(a, start)
    assert all(map(torch.equal, leaves(start), leaves(kept)))
    saved = clone(state)
    first, again = prepared.step(b, state)
    assert all(map(operator.is_, again, state)) and not torch.equal(saved[0][0].h, state[0][0].h)
    forked, fork = prepared.step(b, saved)
    assert torch.equal(first, forked) and all(map(torch.equal, leaves(fork), leaves(state)))
    want, _ = other.step(a, clone(fork))
    alone, _ = other.step(a[:1], take(fork, torch.tensor([0])))
    got, _ = prepared.step(a, fork)
    assert torch.equal(got, want) and off(alone, got[:1].double()) <= 1e-5


@torch.no_grad()
def test_a_number_of_threads_that_changes_in_between(threads):
    lm, tokens = model(MAMBA, MAMBA2), torch.randint(50, (6, 1))
    prepared, other, state, plain = lm.prepare(), lm.prepare(), lm.init_state(1), lm.init_state(1)
    for i, token in enumerate(tokens):
        threads(1 + i // 2 % 2)
        got, state = prepared.step(token, state)
        want, plain = other.step(token, clone(plain))
        assert torch.equal(got, want)


@torch.inference_mode()
def test_prepared_steps_of_inference_mode_go_on_outside_of_it():
    lm, token = model(MAMBA, MAMBA2), torch.tensor([3])
    prepared = lm.prepare()
    _, state = prepared.step(token, lm.init_state(1))
    _, state = prepared.step(token, state)
    before = clone(state)
    with torch.inference_mode(False), torch.no_grad():
        prepared.step(token.clone(), state)
    assert all(map(torch.equal, leaves(before), leaves(state)))


class Wrapped(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


def test_a_module_that_is_more_than_a_linear_map_is_called(calls):
    x, plain = normal(1, 8, dtype=float32), nn.Linear(8, 4)
    with torch.no_grad():
        torch.testing.assert_close(project(plain, x), plain(x))
        torch.testing.assert_close(project(plain, x[None].expand(2, 3, 8)), plain(x[None].expand(2, 3, 8)))
        torch.testing.assert_close(project_by(x, plain.weight), F.linear(x, plain.weight))
        assert calls == ["linear"] * 3
        project(plain, x.expand(17, 8)), project(plain, x[:0])
        with backend("torch"):
            project(plain, x)
        torch.testing.assert_close(project(Wrapped(plain), x), 2 * plain(x))
    assert project(plain, x).requires_grad and len(calls) == 3
    plain.register_forward_hook(lambda module, args, y: 3 * y)
    with torch.no_grad():
        torch.testing.assert_close(project(plain, x), 3 * F.linear(x, plain.weight, plain.bias))
    assert len(calls) == 3


@pytest.mark.parametrize("layer", [Mamba, Mamba2, S4D, S5])
@pytest.mark.parametrize("change", ["wrapped", "hooked", "norm hooked", "reference", "parametrized"])
@torch.no_grad()
def test_prepared_steps_step_aside(layer, change):
    lm = model({Mamba: MAMBA, Mamba2: MAMBA2, S4D: S4DConfig(d_state=6), S5: S5Config(d_state=6)}[layer], pattern="AA")
    block: Any = lm.blocks[1]
    part, token = block.parts[0], torch.tensor([3])
    doubled = lambda module, args, y: 2 * y  # noqa: E731
    name = {Mamba: "in_proj", Mamba2: "in_proj", S4D: "out_proj", S5: "gate"}[layer]
    if change == "wrapped":
        setattr(part, name, Wrapped(getattr(part, name)))
    elif change == "hooked":
        getattr(part, name).register_forward_hook(doubled)
    elif change == "norm hooked":
        block.norms[0].register_forward_hook(doubled)
    elif change == "parametrized":
        nn.utils.parametrizations.weight_norm(getattr(part, name))
        getattr(part, name).parametrizations.weight.original0.mul_(2)
    with backend("reference" if change == "reference" else ""):
        assert part.prepare_residual(block.norms[0]) is None
        prepared, state, plain = lm.prepare(), lm.init_state(1), lm.init_state(1)
        for _ in range(3):
            got, state = prepared.step(token, state)
            want, plain = lm.step(token, plain)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


WRONG = {
    "linear": [{"dtype": bfloat16}, {"rows": -1}, {"inputs": -1}, {"outputs": -1}, {"x": None}, {"weight": None}],
    "mamba_step": [{size: -1} for size in ("rows", "features", "width", "states", "rank", "taps")],
    "mamba2_step": [{"groups": value} for value in (0, -1, 3)],
    "lti_step": [{"dtype": bfloat16}, {"matrices": float64}, *({size: -1} for size in ("rows", "features", "states"))],
}
WRONG["lti_step"] += [
    {pointer: None} for pointer in ("x", "h", "norm", "a", "b", "c", "d", "out_weight", "y", "next_h")
]
for _name in ("mamba_step", "mamba2_step"):
    _pointers = ("x", "conv", "h", "norm", "in_weight", "conv_weight", "dt_bias", "a", "d", "out_weight", "y", "next_h")
    WRONG[_name] += [{pointer: None} for pointer in _pointers]
    WRONG[_name] += [{"dtype": bfloat16}, {"matrices": float64}, {"next_conv": None}]


@pytest.mark.parametrize("name", WRONG)
def test_kernels_refuse_what_they_cannot_run(name, monkeypatch):
    made, call = [], library.call
    monkeypatch.setattr(library, "call", lambda *args, **fields: (made.append((*args, fields)), call(*args, **fields)))
    with torch.no_grad():
        if name == "linear":
            linear(normal(2, 3, dtype=float32), normal(4, 3, dtype=float32))
        else:
            step, make, options = BLOCKS[name.removesuffix("_step")]
            step(**{k: m.float() for k, m in make().items()}, **options)
    ((_, structure, fields),) = made
    for change in WRONG[name]:
        if name == "mamba2_step" and change == {"groups": 3}:
            change = {"groups": 4}  # of 6 heads
        with pytest.raises(ArgumentError, match=f"{name}: the CPU kernel refuses"):
            call(name, structure, **(fields | change))
            pytest.fail(f"{name} runs with {change}")


def test_errors_of_an_lti_step_name_the_tensor():
    given = {name: m.float() for name, m in lti_block(normal, shared=True, gate=False).items()}
    wrong = {
        "C has shape .* expected \\(M, N\\)": {"C": given["C"][:, 1:]},
        "b has shape": {"b": given["b"].transpose(0, 1)},
        "out_weight has shape .* expected 10 on axis 0, or 5 for a gate": {
            "out_weight": given["out_weight"][:7],
            "out_bias": given["out_bias"][:7],
        },
        "out_bias has shape": {"out_bias": given["out_bias"][:5]},
        "h is torch.complex128, expected torch.complex64": {"h": given["h"].double()},
        "D is torch.float64, expected torch.float32": {"D": given["D"].double()},
        "x is torch.float64|out_weight is torch.float32": {"x": given["x"].double()},
    }
    for words, bad in wrong.items():
        with pytest.raises(ArgumentError, match=f"lti_step: ({words})"):
            one_lti_step(**{**given, **bad})


def test_errors_of_a_step_name_the_tensor():
    given = {name: m.float() for name, m in mamba_block(normal, bias=True).items()}
    x, conv, h = (given.pop(name) for name in ("x", "conv", "h"))
    weights = MambaWeights(**given)
    wrong = {
        "in_weight has shape .* expected 14 on axis 0": weights._replace(in_weight=weights.in_weight[:-1]),
        "maps is torch.bfloat16, expected torch.float32": weights._replace(maps=weights.maps.bfloat16()),
        "A is torch.float64, expected torch.float32": weights._replace(A=weights.A.double()),
        "dt_bias has shape": weights._replace(dt_bias=weights.dt_bias[1:]),
    }
    for words, bad in wrong.items():
        with pytest.raises(ArgumentError, match=f"mamba_step: {words}"):
            mamba_step(x, conv, h, bad)
    with pytest.raises(ArgumentError, match="mamba_step: conv has shape"):
        mamba_step(x, conv[..., 1:], h, weights)
    with pytest.raises(ArgumentError, match=r"x is torch\.bfloat16, expected float32 or float64"):
        mamba_step(x.bfloat16(), conv, h, weights)
