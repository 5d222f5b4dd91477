"""Steps of attention, feed-forwards and heads on the CPU kernels, and of models that are made of them."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, bfloat16, float16, float32, float64, nn

from dualform.check.block_steps import (
    attention_block,
    head_block,
    mlp_block,
    one_attention_step,
    one_head_step,
    one_mlp_step,
)
from dualform.core.errors import ArgumentError
from dualform.core.tree import clone, leaves
from dualform.generation.batch import Engine
from dualform.generation.engine import generate
from dualform.generation.options import Sampling
from dualform.layers.attention import Attention, AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.rotary import RotaryConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.quantized import quantize
from dualform.ops import attention_step, backend, mlp_step
from dualform.ops.attention_step import AttentionWeights
from dualform.ops.mamba_step import MATRICES
from dualform.ops.mlp_step import MLPWeights
from dualform.ops.native import library

pytestmark = pytest.mark.skipif(bool(library.missing), reason=library.missing)

TOLERANCE = {float32: 1e-5, float64: 1e-13, bfloat16: 1e-5, float16: 1e-5}


def normal(*shape: int, dtype: torch.dtype = float64) -> Tensor:
    return torch.randn(*shape, dtype=float64).to(dtype)


RING = {"heads": 6, "ring": True, "turned": 5, "interleaved": True, "softcap": 2.0, "factor": 0.7, "magnitude": 1.3}
BLOCKS = {
    "attention": (
        one_attention_step,
        lambda: attention_block(normal, bias=True, sizes=(3, 17, 6, 3, 33, 19, 70)),
        {"heads": 6, "turned": 16},
    ),
    "attention one": (one_attention_step, lambda: attention_block(normal, sizes=(1, 1, 1, 1, 1, 1, 1)), {"heads": 1}),
    "attention ring": (one_attention_step, lambda: attention_block(normal, sizes=(19, 33, 6, 1, 11, 40, 7)), RING),
    "attention long": (
        one_attention_step,
        lambda: attention_block(normal, sizes=(40, 9, 2, 2, 8, 8, 201)),
        {"heads": 2, "turned": 2},
    ),
    "mlp": (one_mlp_step, lambda: mlp_block(normal, bias=True, sizes=(3, 17, 35)), {"activation": "gelu"}),
    "mlp one": (one_mlp_step, lambda: mlp_block(normal, sizes=(1, 1, 1)), {"activation": "relu"}),
    "mlp rows": (
        one_mlp_step,
        lambda: mlp_block(normal, gated=False, bias=True, sizes=(19, 33, 130)),
        {"gated": False, "activation": "gelu_tanh", "factor": 0.5},
    ),
    "mlp silu": (one_mlp_step, lambda: mlp_block(normal, sizes=(7, 64, 40)), {"eps": 0.1}),
    "mlp relu2": (one_mlp_step, lambda: mlp_block(normal, sizes=(2, 20, 3)), {"activation": "relu2"}),
    "head": (one_head_step, lambda: head_block(normal, bias=True, sizes=(3, 17, 35)), {"cap": 2.0, "factor": 0.3}),
    "head rows": (one_head_step, lambda: head_block(normal, sizes=(19, 33, 130)), {}),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("matrix", [float64, float32, bfloat16, float16], ids=str)
@pytest.mark.parametrize("case", BLOCKS)
def test_a_step_is_the_definition(case, matrix, count, instructions, poison, threads):
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
        assert float((a.double() - b).abs().max()) <= TOLERANCE[matrix] * float(b.abs().max())


def attention_arguments(rows: int = 3, slots: int = 5, dtype: torch.dtype = float32) -> dict[str, Any]:
    given = {name: m.to(dtype) for name, m in attention_block(normal, sizes=(rows, 9, 4, 2, 6, 5, slots)).items()}
    x, k, v = (given.pop(name) for name in "xkv")
    weights = AttentionWeights(**given, in_bias=None, out_bias=None, frequencies=torch.ones(2, dtype=float64))
    return {"x": x, "k": k, "v": v, "length": torch.zeros(rows, dtype=torch.int64), "weights": weights, "heads": 4}


@pytest.mark.parametrize("held", [bfloat16, float16], ids=str)
@torch.no_grad()
def test_caches_of_16_bits_stay_what_they_are(held, instructions):
    given: Any = attention_arguments()
    given.update(k=given["k"].to(held), v=given["v"].to(held), length=torch.tensor([0, 4, 2]))
    with backend("native"):
        got = attention_step(**given)
    with backend("reference"):
        want = attention_step(**given)
    assert got[1].dtype == got[2].dtype == held and torch.equal(got[3], torch.tensor([1, 5, 3]))
    for a, b in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype == float32 else 1e-2, atol=1e-5)


@torch.no_grad()
def test_what_a_slot_held_before_it_is_taken_is_not_seen(instructions):
    """Nor does a row that is not finite reach another."""
    given: Any = attention_arguments(slots=70)
    given["length"] = torch.tensor([3, 66, 0])
    want = attention_step(**given)
    for row, length in enumerate(given["length"].tolist()):
        given["k"][row, length:], given["v"][row, length:] = torch.nan, torch.inf
    got = attention_step(**given)
    assert torch.equal(got[0], want[0])
    given["k"][1, 5] = torch.nan
    got = attention_step(**given)
    assert got[0][1].isnan().all() and torch.equal(got[0][[0, 2]], want[0][[0, 2]])


def test_without_a_free_slot_there_is_an_error():
    given: Any = attention_arguments()
    with pytest.raises(
        ArgumentError, match="length goes from 0 to 5, expected 0 or more, and a slot for one more of 5"
    ):
        attention_step(**given | {"length": torch.tensor([0, 5, 1])})
    with pytest.raises(ArgumentError, match="length goes from -1 to 1"):
        attention_step(**given | {"length": torch.tensor([0, -1, 1])})
    attention_step(**given | {"length": torch.tensor([0, 50, 1]), "ring": True})


def test_errors_name_the_tensor():
    given: Any = attention_arguments()
    weights = given["weights"]
    wrong = {
        "heads is 3, expected a multiple of the 2": {"heads": 3},
        "length is torch.int32": {"length": given["length"].int()},
        "v has shape": {"v": given["v"][:, :2]},
        "v is torch.bfloat16, expected torch.float32": {"v": given["v"].bfloat16()},
        "in_weight has shape .* expected 46 on axis 0": {"weights": weights._replace(in_weight=weights.in_weight[1:])},
        "frequencies has shape .* at most 3": {"weights": weights._replace(frequencies=torch.ones(4, dtype=float64))},
        "frequencies is torch.float32": {"weights": weights._replace(frequencies=torch.ones(2))},
        "factor, magnitude and softcap are": {"softcap": float("nan")},
    }
    for words, bad in wrong.items():
        with pytest.raises(ArgumentError, match=f"attention_step: ({words})"):
            attention_step(**given | bad)
    made = {name: m.float() for name, m in mlp_block(normal).items()}
    x, mlp = made.pop("x"), MLPWeights(**made, in_bias=None, out_bias=None)
    with pytest.raises(ArgumentError, match=r"mlp_step: in_weight has shape .* expected 7 on axis 0"):
        mlp_step(x, mlp, gated=False)
    with pytest.raises(ArgumentError, match="mlp_step: activation is 'swish', expected one of silu, gelu"):
        mlp_step(x, mlp, activation="swish")


WRONG = {
    "attention": [
        *({size: -1} for size in ("rows", "features", "heads", "groups", "width", "values", "slots", "turned")),
        *({name: None} for name in ("x", "length", "norm", "in_weight", "out_weight", "y", "k", "v", "next_length")),
        *({"groups": 4}, {"turned": 17}, {"dtype": bfloat16}, {"matrices": float64}, {"caches": float64}),
    ],
    "mlp": [
        *({size: -1} for size in ("rows", "features", "hidden")),
        *({name: None} for name in ("x", "norm", "in_weight", "out_weight", "y")),
        *({"activation": -1}, {"activation": 5}, {"dtype": bfloat16}, {"matrices": float64}),
    ],
    "head": [
        *({size: -1} for size in ("rows", "features", "outputs")),
        *({name: None} for name in ("x", "norm", "out_weight", "y")),
        *({"dtype": bfloat16}, {"matrices": float64}),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_kernels_refuse_what_they_cannot_run(name, monkeypatch):
    made, call = [], library.call
    monkeypatch.setattr(library, "call", lambda *args, **fields: (made.append((*args, fields)), call(*args, **fields)))
    step, make, options = BLOCKS[name]
    with torch.no_grad():
        step(**{k: m.float() for k, m in make().items()}, **options)
    ((function, structure, fields),) = made
    for change in WRONG[name]:
        with pytest.raises(ArgumentError, match=f"{name}_step: the CPU kernel refuses"):
            call(function, structure, **(fields | change))
            pytest.fail(f"{name} runs with {change}")
    if name == "attention":
        assert call(function, structure, **fields) is True
        assert call(function, structure, **(fields | {"slots": 10})) is False  # a row has seen 10


# Models.

V = 50
MLP, MAMBA2 = MLPConfig(d_hidden=29), Mamba2Config(d_state=7, d_head=8, groups=2)
YARN = RotaryConfig(interleaved=True, scaling="yarn", factor=3.0, original=40)
PLAIN = AttentionConfig(heads=2)
PARTS = {
    "M": (MAMBA2,),
    "m": (MambaConfig(d_state=5), MLP),
    "A": (PLAIN, MLP),
    "W": (AttentionConfig(heads=4, kv_heads=2, window=5, bias=True), MLPConfig(activation="gelu", bias=True)),
    "C": (AttentionConfig(heads=4, kv_heads=1, d_head=5, d_value=3, d_rope=4, rope=YARN, softcap=3.0, scale=0.4),),
    "N": (AttentionConfig(heads=3, rope=None), MLPConfig(gated=False, activation="relu2", gate_scale=0.5)),
    "F": (MLPConfig(activation="gelu_tanh"), PLAIN),
    "f": (MLP,),
}


def model(pattern: str, dtype: torch.dtype = float32, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    parts = {letter: PARTS[letter] for letter in set(pattern)}
    return LanguageModel(ModelConfig(V, 24, parts, pattern, **options)).to(dtype).eval()


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    made, call = [], library.call
    monkeypatch.setattr(
        library, "call", lambda name, *args, **fields: (made.append(name), call(name, *args, **fields))[1]
    )
    return made


HEADS = {"tie_embeddings": False, "logit_scale": 0.5, "logit_cap": 3.0, "norm_eps": 1e-3}


@pytest.mark.parametrize("rows", [1, 3, 17, 129])
@pytest.mark.parametrize("options", [{}, HEADS], ids=["tied", "head"])
@pytest.mark.parametrize("pattern", ["MMAM", "mW", "CNF", "fA", "ff"])
@torch.no_grad()
def test_prepared_steps_are_the_whole_sequence(pattern, options, rows, threads, calls):
    """From no room at all, past every window and several times past the room of a cache; one call each in the end."""
    threads(2)
    lm, tokens = model(pattern, **options), torch.randint(V, (14, rows))
    with backend("torch"):
        whole = lm(tokens.T)[0]
    prepared, state = lm.prepare(), lm.init_state(rows)
    for i, token in enumerate(tokens):
        calls.clear()
        logits, state = prepared.step(token, state)
        torch.testing.assert_close(logits, whole[:, i], rtol=1e-4, atol=1e-5)
    assert pattern == "ff" or calls == ["steps"]


@pytest.mark.parametrize("dtype", [bfloat16, float16, float64], ids=str)
@torch.no_grad()
def test_prepared_steps_in_other_dtypes(dtype, calls):
    """No further from exact weights' answer than steps that round in between, and caches are of the weights' dtype."""
    lm, tokens = model("MAW", dtype), torch.randint(V, (8, 2))
    exact = model("MAW", dtype).double()
    prepared, state, plain, want = lm.prepare(), lm.init_state(2), lm.init_state(2), exact.init_state(2)
    errors = torch.zeros(2, dtype=float64)
    for token in tokens:
        calls.clear()
        (a, state), (b, plain), (c, want) = prepared.step(token, state), lm.step(token, plain), exact.step(token, want)
        errors += torch.stack([(m.double() - c).norm() / c.norm() for m in (a, b)])
        assert a.dtype == dtype
    assert errors[0] <= errors[1] + 1e-12 and state[1][0].k.dtype == dtype
    assert "attention_step" not in calls and calls.count("steps") == 1


@torch.inference_mode()
def test_weights_of_8_bits(calls):
    lm, tokens = quantize(model("MAWf")), torch.randint(V, (9, 3))
    want, _ = lm(tokens.T)
    prepared, state = lm.prepare(), lm.init_state(3, max_len=9)
    for i, token in enumerate(tokens):
        calls.clear()
        logits, state = prepared.step(token, state)
        torch.testing.assert_close(logits, want[:, i], rtol=1e-4, atol=1e-5)
    assert calls == ["steps"]


@torch.inference_mode()
def test_one_call_runs_a_hybrid_until_a_cache_is_full(calls):
    lm, tokens = model("MA"), torch.randint(V, (12, 2))
    prepared, state = lm.prepare(), lm.init_state(2, max_len=3)
    alone = ["mamba2_step", "attention_step", "mlp_step", "head_step"]
    rooms = []
    for token in tokens:
        calls.clear()
        _, state = prepared.step(token, state)
        rooms.append(state[1][0].k.shape[1])
        fresh, grown = len(rooms) == 1, len(rooms) > 1 and rooms[-1] > rooms[-2]
        assert calls == (alone if fresh else ["steps"] * 2 + alone if grown else ["steps"])
    assert rooms == [3, 3, 3, 6, 6, 6, 12, 12, 12, 12, 12, 12]


@torch.inference_mode()
def test_rows_that_are_replaced_in_place_are_seen():
    """An engine writes the state of a new row where that of an old one lay, in the midst of steps that go on."""
    lm, tokens = model("MAW"), torch.randint(V, (12, 3))
    prepared, state = lm.prepare(), lm.init_state(3, max_len=20)
    for token in tokens[:6]:
        _, state = prepared.step(token, state)
    for leaf, blank in zip(leaves(state), leaves(lm.init_state(1, max_len=20)), strict=True):
        leaf[1].copy_(blank[0])
    kept = state
    for i, token in enumerate(tokens[6:]):
        logits, state = prepared.step(token, state)
        assert state is kept
        fresh, old = lm(tokens[6 : 7 + i, 1:2].T)[0][:, -1], lm(tokens[: 7 + i, ::2].T)[0][:, -1]
        torch.testing.assert_close(logits[1:2], fresh, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[::2], old, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_copy_of_a_state_goes_on_by_itself():
    lm, tokens = model("MAW"), torch.randint(V, (9, 2))
    prepared, other, state = lm.prepare(), lm.prepare(), lm.init_state(2)
    for token in tokens[:4]:
        _, state = prepared.step(token, state)
    saved, kept = clone(state), clone(state)
    first, state = prepared.step(tokens[4], state)
    assert all(map(torch.equal, leaves(saved), leaves(kept)))
    again, _ = other.step(tokens[4], saved)
    torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", ["MMWM", "mA"])
def test_an_engine_has_the_tokens_of_each_request_alone(pattern):
    """Rows join and leave, free slots go on in between, and caches grow."""
    lm, dice = model(pattern), random.Random(0)
    engine, asked = Engine(lm, rows=5), []
    for _ in range(12):
        prompt = [dice.randrange(V) for _ in range(dice.choice([1, 2, 9]))]
        sampling, count = Sampling(temperature=dice.choice([0.0, 0.8])), dice.choice([1, 7, 25])
        asked.append((engine.admit(prompt, count, sampling=sampling, seed=len(asked)), prompt, count, sampling))
        for _ in range(dice.choice([0, 3, 8])):
            engine.step()
    list(engine)
    for seed, (one, prompt, count, sampling) in enumerate(asked):
        assert one.tokens == list(generate(lm, prompt, count, sampling=sampling, seed=seed))


class Wrapped(nn.Module):
    def __init__(self, base: Any):
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


CHANGES = ["wrapped", "hooked", "mlp wrapped", "mlp hooked", "head hooked", "norm hooked", "reference"]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_prepared_steps_step_aside(change):
    lm, doubled = model("AW", tie_embeddings=False), lambda module, args, y: 2 * y
    block: Any = lm.blocks[1]
    attention, mlp = block.parts
    if change == "wrapped":
        attention.qkv_proj = Wrapped(attention.qkv_proj)
    elif change == "mlp wrapped":
        mlp.down_proj = Wrapped(mlp.down_proj)
    elif change != "reference":
        part = {"hooked": attention.out_proj, "mlp hooked": mlp, "head hooked": lm.head, "norm hooked": lm.norm}[change]
        part.register_forward_hook(doubled)
    tokens = torch.randint(V, (5, 2))
    with backend("reference" if change == "reference" else ""):
        prepared, state, plain = lm.prepare(), lm.init_state(2), lm.init_state(2)
        for token in tokens:
            got, state = prepared.step(token, state)
            want, plain = lm.step(token, plain)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"gate": True}, {"qk_norm": "rms"}, {"d_conv": 3}, {"d_out": 12}])
@torch.no_grad()
def test_attention_without_a_kernel_says_so(options):
    layer = Attention(AttentionConfig(heads=2, **options), 24)
    assert layer.prepare_residual(nn.Identity()) is None
    block = model("A").blocks[0]
    assert layer.prepare_residual(block.norms[0]) is None  # pyright: ignore[reportIndexIssue, reportArgumentType]
    assert block.parts[0].prepare_residual(block.norms[0]) is not None  # pyright: ignore
