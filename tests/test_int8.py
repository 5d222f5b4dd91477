"""Matrices of 8 bits: how near they are, the kernels that read them, and models that are made of them."""

import json
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, bfloat16, float16, float32, float64, nn

from dualform.check.block_steps import mamba2_block, mamba_block, one_mamba2_step, one_mamba_step
from dualform.core.errors import ArgumentError, CheckpointError, ConfigError
from dualform.core.int8 import dequantize, quantize
from dualform.core.tree import leaves
from dualform.generation.batch import generate_batch
from dualform.generation.engine import generate
from dualform.generation.options import Sampling
from dualform.layers.attention import AttentionConfig
from dualform.layers.hyena import HyenaConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mla import MLAConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.quantized import QuantizedEmbedding, QuantizedLinear, quantized_within
from dualform.layers.rwkv7 import RWKV7Config
from dualform.models.adapters import adapt
from dualform.models.config import ModelConfig
from dualform.models.heads import SequenceClassifier
from dualform.models.lm import LanguageModel
from dualform.models.quantized import quantize as quantize_model
from dualform.models.saving.model import load, save
from dualform.ops import backend, quantized_linear
from dualform.ops.mamba_step import MATRICES
from dualform.ops.native import library
from dualform.train.recipe import Recipe
from dualform.train.setup import build_model

WHOLE = 2**20  # a group wider than every row
kernels = pytest.mark.skipif(bool(library.missing), reason=library.missing)


def normal(*shape: int, dtype: torch.dtype = float64) -> Tensor:
    return torch.randn(*shape, dtype=float64).to(dtype)


def off(got: Tensor, want: Tensor) -> float:
    """The largest error, relative to the largest number."""
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("group", [32, 64, WHOLE])
def test_every_number_is_within_half_a_step(group):
    weight = normal(7, 75)
    weight[3], weight[:, 64:70] = 0, 0
    whole, scales = quantize(weight, group)
    near = dequantize(whole, scales, group, float64)
    steps = dequantize(torch.ones_like(whole), scales, group, float64)
    assert whole.dtype == torch.int8 and scales.shape == (7, -(-75 // group)) and scales.dtype == float32
    assert ((near - weight).abs() <= 0.5 * steps * (1 + 1e-5)).all() and not near[3].any()
    for row, parts in zip(weight, near, strict=True):
        for a, b in zip(row.split(min(group, 75)), parts.split(min(group, 75)), strict=True):
            torch.testing.assert_close(b.abs().max(), a.abs().max(), rtol=1e-6, atol=0)
    again, same = quantize(near, group)
    assert torch.equal(again, whole) and off(same, scales.double()) <= 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_cannot_be_quantised_is_named(bad):
    weight = normal(3, 40)
    for group in (0, -1, 33, 1.5, 2**62):
        with pytest.raises(ArgumentError, match=r"quantize: group is .*, expected a multiple of 32"):
            quantize(weight, group)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError, match="int64 of shape"):
        quantize(torch.ones(3, 4, dtype=torch.int64), 32)
    weight[1, 2] = bad
    with pytest.raises(ArgumentError, match="NaN or infinity"):
        quantize(weight, 32)


TOLERANCE = {float32: 2e-6, float64: 1e-14, bfloat16: 5e-3, float16: 7e-4}
# Widths beside and across chunks and groups, outputs beside four, rows beside what is summed at once.
SIZES = [(1, 1, 1), (2, 3, 5), (1, 63, 33), (5, 33, 3), (7, 97, 9), (1, 200, 6), (16, 65, 6), (19, 130, 41)]


@kernels
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_product_is_the_definition(dtype, count, instructions, poison, threads):
    threads(count)
    for (rows, width, outputs), bias, group in product(SIZES, (False, True), (32, 64, WHOLE)):
        x, (weight, scales) = normal(rows, width, dtype=dtype), quantize(normal(outputs, width), group)
        weight[0, 0] = -128  # which quantize never makes, but a file may hold
        b = normal(outputs, dtype=dtype) if bias else None
        with backend("native"):
            y = quantized_linear(x, weight, scales, b, group=group)
        exact = dequantize(weight, scales, group, float64)
        want = F.linear(x.double(), exact, None if b is None else b.double())
        assert y.dtype == dtype and off(y, want) <= TOLERANCE[dtype], (rows, width, outputs, group)


@kernels
def test_strides_and_many_tasks_and_no_width(instructions, threads):
    threads(2)
    x, (weight, scales) = normal(3, 80, dtype=float32)[:, 9:], quantize(normal(2000, 71), 32)
    weight, scales = weight.T.contiguous().T, scales.T.contiguous().T
    with backend("native"):
        want = F.linear(x.double(), dequantize(weight, scales, 32, float64))
        assert off(quantized_linear(x, weight, scales, group=32), want) <= 2e-6
        assert not quantized_linear(x[:, :0], weight[:, :0], scales[:, :0], group=32).any()


@kernels
def test_a_row_does_not_depend_on_the_others(instructions):
    x, (weight, scales) = normal(16, 75, dtype=float32), quantize(normal(50, 75), 32)
    x[4] = torch.nan
    with backend("native"):
        y = quantized_linear(x, weight, scales, group=32)
        for few in (2, 3, 5, 7, 16):
            some = quantized_linear(x[:few], weight, scales, group=32)
            assert torch.equal(some.nan_to_num(nan=0.5), y[:few].nan_to_num(nan=0.5))
        assert off(quantized_linear(x[:1], weight, scales, group=32), y[:1].double()) <= 2e-6
    assert y[4].isnan().all() and y[torch.arange(16) != 4].isfinite().all()


def test_errors_name_the_tensor():
    x, (weight, scales) = normal(3, 40, dtype=float32), quantize(normal(5, 40), 32)
    wrong = {
        "weight is torch.float32, expected torch.int8": (x, weight.float(), scales, None, 32),
        "scales of weight are torch.float64": (x, weight, scales.double(), None, 32),
        r"of shape \(5, 2\), expected torch.float32 of shape \(5, 1\)": (x, weight, scales, None, 64),
        "group is 33": (x, weight, scales, None, 33),
        "bias is torch.float64, but x is torch.float32": (x, weight, scales, normal(5), 32),
        "weight has shape": (x[:, 1:], weight, scales, None, 32),
    }
    for words, (*tensors, group) in wrong.items():
        with pytest.raises(ArgumentError, match=f"quantized_linear: .*{words}"):
            quantized_linear(*tensors, group=group)
        with pytest.raises(ArgumentError, match=words):
            torch.ops.dualform.quantized_linear("", False, *tensors, group)
    given = {name: m.float() for name, m in mamba_block(normal, bias=True).items()}
    with pytest.raises(ArgumentError, match="mamba_step: the scales of in_weight are None"):
        one_mamba_step(**{name: m.to(torch.int8) if name in MATRICES else m for name, m in given.items()}, group=32)
    with pytest.raises(ArgumentError, match=r"mamba_step: in_scales is given, and in_weight is torch.float32"):
        one_mamba_step(**given, in_scales=torch.ones(14, 1), group=32)


BLOCKS = {
    "mamba": (one_mamba_step, lambda: mamba_block(normal, bias=True, sizes=(3, 17, 33, 5, 3, 4)), {}),
    "mamba row": (one_mamba_step, lambda: mamba_block(normal, bias=False, sizes=(1, 100, 200, 16, 40, 4)), {}),
    "mamba with floats": (one_mamba_step, lambda: mamba_block(normal, bias=True, sizes=(1, 40, 70, 16, 6, 4)), {}),
    "mamba2": (one_mamba2_step, lambda: mamba2_block(normal, 3, bias=True, sizes=(3, 17, 6, 5, 7, 4)), {"groups": 3}),
    "mamba2 rows": (one_mamba2_step, lambda: mamba2_block(normal, 2, sizes=(16, 130, 4, 31, 33, 3)), {"groups": 2}),
}


def eight_bits(tensors: dict[str, Tensor], group: int, kept: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A step's tensors with quantised matrices but some, and their scales."""
    found = {name: m.float() for name, m in tensors.items()}
    for name in (found.keys() & MATRICES.keys()).difference(kept):
        found[name], found[MATRICES[name]] = quantize(tensors[name], group)
    return found


@kernels
@pytest.mark.parametrize("group", [32, 64, WHOLE])
@pytest.mark.parametrize("case", BLOCKS)
def test_a_step_of_a_block_is_the_step_of_what_its_matrices_stand_for(case, group, instructions, poison, threads):
    threads(2)
    step, make, options = BLOCKS[case]
    given = eight_bits(make(), group, ("steps", "out_weight") if "floats" in case else ())
    exact = {name: m.double() for name, m in given.items() if name not in MATRICES.values()}
    for name in (name for name, of in MATRICES.items() if of in given):
        exact[name] = dequantize(given[name], given[MATRICES[name]], group, float64)
    with torch.no_grad():
        with backend("reference"):
            want = step(**exact, **options)
            defined = step(**given, **options, group=group)
        with backend("native"):
            got = step(**given, **options, group=group)
    for a, b, c in zip(got, defined, want, strict=True):
        assert a.dtype == float32 and off(a, c) <= 1e-5 and off(b, c) <= 1e-5


@kernels
@pytest.mark.parametrize("name", ["linear", "mamba_step", "mamba2_step"])
def test_kernels_refuse_what_they_cannot_run(name, monkeypatch):
    made, call = [], library.call
    monkeypatch.setattr(library, "call", lambda *args, **fields: (made.append((*args, fields)), call(*args, **fields)))
    with torch.no_grad():
        if name == "linear":
            quantized_linear(normal(2, 70, dtype=float32), *quantize(normal(4, 70), 32), group=32)
        else:
            step, make, options = BLOCKS["mamba row" if name == "mamba_step" else "mamba2 rows"]
            step(**eight_bits(make(), 32), **options, group=32)
    ((_, structure, fields),) = made
    scales = [field for field in fields if field.endswith("scales")]
    changes = [{"group": value} for value in (0, -32, 33)] + [{scales[0]: None}] + [{"dtype": float64}]
    assert len(scales) == {"linear": 1, "mamba_step": 4, "mamba2_step": 2}[name]
    for change in changes:
        with pytest.raises(ArgumentError, match=f"{name}: the CPU kernel refuses"):
            call(name, structure, **(fields | change))


def model(*parts, pattern: str = "AB", **config) -> LanguageModel:
    torch.manual_seed(0)
    letters = {letter: part if isinstance(part, tuple) else (part,) for letter, part in zip("AB", parts, strict=False)}
    return LanguageModel(ModelConfig(50, 24, letters, pattern, **config)).eval()


MAMBA, MAMBA2 = MambaConfig(d_state=5, dt_rank=3), Mamba2Config(d_state=7, d_head=8, groups=2)
MLA = MLAConfig(heads=2, d_head=4, d_value=4, d_latent=6, d_rope=2)
HYBRID = (MLPConfig(d_hidden=32), MAMBA2, MAMBA), AttentionConfig(heads=2)
MODELS = {
    "mamba": lambda: model(MAMBA, pattern="AAA"),
    "both": lambda: model(MAMBA, MAMBA2, tie_embeddings=False),
    "biases": lambda: model(MambaConfig(bias=True), Mamba2Config(d_head=8, bias=True, norm=False), logit_cap=5.0),
    "hybrid": lambda: model(*HYBRID, pattern="ABA"),
    "shared": lambda: model(MAMBA, MLA, pattern="ABAB", shared="B"),
    "heads": lambda: model(MambaConfig(heads=2), RWKV7Config(d_head=8), head_bias=True, tie_embeddings=False),
    "filters": lambda: model(HyenaConfig(), MAMBA),
}


def spelled_out(lm: LanguageModel) -> LanguageModel:
    """The same model with the numbers that quantised ones stand for."""
    plain = LanguageModel(lm.config).eval()
    tensors = dict(lm.state_dict())
    for name, m in lm.named_modules(remove_duplicate=False):  # a shared one under all of its names
        if isinstance(m, QuantizedLinear | QuantizedEmbedding):
            del tensors[f"{name}.scales"]
            tensors[f"{name}.weight"] = dequantize(m.weight, m.scales, m.group, float32)
    plain.load_state_dict(tensors, strict=False)
    return plain


@pytest.mark.parametrize("group", [32, WHOLE])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_is_the_one_that_its_numbers_stand_for(name, group, threads):
    """In forward, loss, step and prepared steps, for rows that kernels take and for more."""
    threads(2)
    before = MODELS[name]()
    count, kinds = before.parameter_count(), {type(m) for m in before.modules()}
    lm = quantize_model(MODELS[name](), group=group)
    assert (lm.parameter_count() == count and not any(type(m) is nn.Linear for m in lm.modules())) or name == "filters"
    assert not any(type(m) is nn.Embedding for m in lm.modules()) and nn.Linear in kinds
    plain, tokens = spelled_out(lm), torch.randint(50, (17, 6))
    want, _ = plain(tokens)
    torch.testing.assert_close(lm(tokens)[0], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lm.loss(tokens), plain.loss(tokens), rtol=1e-5, atol=0)
    for rows in (1, 3, 17):
        prepared, state, other = lm.prepare(), lm.init_state(rows), lm.init_state(rows)
        for t in range(6):
            logits, state = prepared.step(tokens[:rows, t], state)
            stepped, other = lm.step(tokens[:rows, t], other)
            torch.testing.assert_close(logits, want[:rows, t], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stepped, want[:rows, t], rtol=1e-4, atol=1e-5)
        assert all(m.dtype == float32 for m in leaves(state) if m.is_floating_point())


@torch.no_grad()
def test_it_is_near_to_what_it_was():
    lm, tokens = MODELS["both"](), torch.randint(50, (3, 40))
    before = lm(tokens)[0]
    assert 1e-4 < float((quantize_model(lm)(tokens)[0] - before).norm() / before.norm()) < 0.03


def test_generation_draws_what_the_spelled_out_model_draws():
    """By the decoder of one row, and by the engine."""
    lm = quantize_model(MODELS["hybrid"]())
    plain, greedy = spelled_out(lm), Sampling(temperature=0.0)
    assert list(generate(lm, [3, 4], 20, sampling=greedy)) == list(generate(plain, [3, 4], 20, sampling=greedy))
    prompts = [[1, 2, 3], [4], [5, 6]]
    both = [generate_batch(m, prompts, 9, sampling=greedy) for m in (lm, plain)]
    assert both[0] == both[1]


@kernels
@torch.inference_mode()
def test_one_call_runs_a_whole_model(monkeypatch):
    lm, token, made, call = quantize_model(model(MAMBA, MAMBA2, pattern="ABAB")), torch.tensor([3]), [], library.call
    monkeypatch.setattr(library, "call", lambda name, *args, **fields: (made.append(name), call(name, *args, **fields)))
    prepared = lm.prepare()
    _, state = prepared.step(token, lm.init_state(1))
    made.clear()
    for _ in range(3):
        _, state = prepared.step(token, state)
    assert made == ["steps"] * 3


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path):
    lm = quantize_model(MODELS["both"](), group=32)
    lm.save(tmp_path / "a")
    about = json.loads((tmp_path / "a" / "config.json").read_text())
    assert about["quantization"] == {"kind": "int8", "group": 32}
    got, tokens = load(tmp_path / "a", verify=True), torch.randint(50, (2, 9))
    assert all(map(torch.equal, got.state_dict().values(), lm.state_dict().values()))
    assert torch.equal(got(tokens)[0], lm(tokens)[0]) and got.quantization == lm.quantization and not got.training
    half = load(tmp_path / "a", dtype="bfloat16")
    assert half.norm.weight.dtype == bfloat16 and half(tokens)[0].dtype == bfloat16
    for made in (half, lm.to(bfloat16)):
        found = quantized_within(made)
        assert all(torch.equal(m.scales, found[name].scales) for name, m in quantized_within(got).items())
    assert load(tmp_path / "a", quantize="int8").quantization == lm.quantization


@torch.no_grad()
def test_a_model_is_quantised_as_it_is_loaded(tmp_path):
    lm, tokens = MODELS["both"](), torch.randint(50, (2, 9))
    lm.to(bfloat16).save(tmp_path / "a")
    got = load(tmp_path / "a", quantize="int8")
    assert {p.dtype for p in got.parameters()} == {float32} and got.quantization is not None
    assert torch.equal(got(tokens)[0], quantize_model(load(tmp_path / "a"))(tokens)[0])
    with pytest.raises(ArgumentError, match="load: quantize is 'int4', expected 'int8'"):
        load(tmp_path / "a", quantize="int4")


@torch.no_grad()
def test_classifiers_are_quantised_too(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(0, 24, {"A": (MAMBA,)}, "AA")
    lm, x = SequenceClassifier(config, ["yes", "no"], inputs=3).eval(), normal(2, 9, 3, dtype=float32)
    before = lm(x)[0]
    save(quantize_model(lm), tmp_path / "a")
    got = load(tmp_path / "a", kind=SequenceClassifier)
    assert torch.equal(got(x)[0], lm(x)[0]) and type(got.head) is QuantizedLinear
    torch.testing.assert_close(lm(x)[0], before, rtol=0.1, atol=0.02)


WRONG = {
    "kind": ({"kind": "int4", "group": 32}, "expected {'kind': 'int8'"),
    "key": ({"kind": "int8", "group": 32, "zero": 0}, "expected {'kind': 'int8'"),
    "word": ("int8", "expected {'kind': 'int8'"),
    "group": ({"kind": "int8", "group": 33}, "group is 33, expected a multiple of 32"),
    "other group": ({"kind": "int8", "group": 64}, r"scales has shape \(.*\), expected"),
    "none": (None, "too many, first '.*scales'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_says_otherwise_is_refused(case, tmp_path):
    quantize_model(model(Mamba2Config(d_state=7, d_head=8, d_inner=40), pattern="A"), group=32).save(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    about = json.loads(path.read_text())
    given, words = WRONG[case]
    (tmp_path / "a" / "manifest.json").unlink()
    del about["quantization"]
    path.write_text(json.dumps(about if given is None else about | {"quantization": given}))
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path / "a")


def test_weights_of_other_whole_numbers_are_refused(tmp_path):
    lm = quantize_model(MODELS["mamba"]())
    lm.embed.weight = lm.embed.weight.int()
    lm.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"embed\.weight is I32, expected torch.int8"):
        load(tmp_path / "a")


def test_it_is_not_trained(tmp_path):
    lm = quantize_model(MODELS["mamba"]())
    lm.save(tmp_path / "a")
    with pytest.raises(ArgumentError, match="LanguageModel: a quantised model is not trained"):
        lm.train()
    assert not any(p.requires_grad for p in lm.parameters()) and not lm(torch.tensor([[1]]))[0].requires_grad
    lm.norm.requires_grad_(True)
    with pytest.raises(ArgumentError, match="QuantizedEmbedding: weights of 8 bits have no gradient"):
        lm.loss(torch.tensor([[1, 2]]))
    with pytest.raises(ConfigError, match="a quantised model is not trained"):
        build_model(Recipe(model=str(tmp_path / "a"), steps=1))


def test_what_is_not_quantised_is_named(tmp_path):
    lm = quantize_model(MODELS["mamba"]())
    with pytest.raises(ArgumentError, match="quantised already, in groups of 64"):
        quantize_model(lm)
    with pytest.raises(ArgumentError, match="model is Linear, expected a model"):
        quantize_model(nn.Linear(3, 4))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError, match="group is 33"):
        quantize_model(MODELS["mamba"](), group=33)
    with pytest.raises(ConfigError, match="a quantised model as 'hf'"):
        save(lm, tmp_path / "a", layout="hf")
    pytest.importorskip("peft")
    adapted = MODELS["mamba"]()
    adapted.save(tmp_path / "base")
    adapted.adaptation = adapt(adapted, tmp_path / "base", {}, rank=2, alpha=1.0)
    with pytest.raises(ArgumentError, match="the model has adapters"):
        quantize_model(adapted)


def test_a_model_that_cannot_be_quantised_is_as_it_was():
    for spoil, words in (
        (lambda m: m.register_forward_hook(lambda module, args, y: 2 * y), "has a hook"),
        (lambda m: m.weight.data[0, 0].fill_(torch.inf), r"weight holds NaN or infinity"),
    ):
        lm = MODELS["mamba"]()
        spoil(lm.blocks[1].parts[0].in_proj)  # pyright: ignore
        with pytest.raises(ArgumentError, match=rf"quantize: blocks\.1\.parts\.0\.in_proj.*{words}"):
            quantize_model(lm)
        assert not quantized_within(lm) and lm.norm.weight.requires_grad
