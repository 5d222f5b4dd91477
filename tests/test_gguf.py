"""Files of GGUF: against recorded logits of transformers, the package gguf's own reader, and what must be refused."""

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dualform as df
from damage import damaged_bytes
from dualform.core.errors import CheckpointError, ConfigError, DualformError
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.quantized import QuantizedLinear, quantized_within
from dualform.models.gguf.write import write_gguf
from dualform.models.saving.model import check_tensors
from dualform.models.tokenizer import load_tokenizer
from dualform.ops import backend
from dualform.ops.native import library
from test_rwkv7_file import BLOCKS, D, N, V
from test_rwkv7_file import file as rwkv7

gguf = pytest.importorskip("gguf")
from gguf_files import Q8_0, convert, finish, write_tensor  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
RECORDED = {"mamba": 1e-5, "mamba2": 1e-5, "jamba": 1e-5, "falcon_h1": 1e-5, "granitemoehybrid": 1e-5, "lfm2": 1e-5}
KINDS = gguf.GGMLQuantizationType


def apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def logits(model: df.LanguageModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens)[0]


def small(part=None, blocks: int = 2, **options) -> df.LanguageModel:
    torch.manual_seed(0)
    config = df.ModelConfig(256, 32, {"M": (part or Mamba2Config(d_state=8, d_head=16),)}, "M" * blocks, **options)
    return df.LanguageModel(config).eval()


def written(model: df.LanguageModel, path: Path) -> Path:
    path.unlink(missing_ok=True)
    write_gguf(model, path, None, [0], "small")
    return path


@pytest.mark.parametrize("name", RECORDED)
def test_a_converted_file_has_the_logits_of_transformers(name, tmp_path):
    convert(GOLDEN / f"lm_{name}", tmp_path / "model.gguf")
    want = load_file(GOLDEN / f"lm_{name}.safetensors")
    assert apart(logits(df.load(tmp_path / "model.gguf"), want["input_ids"]), want["logits"]) <= RECORDED[name]


def test_falcon_mamba_has_one_number_for_all_its_norms(tmp_path):
    convert(GOLDEN / "lm_falcon_mamba", tmp_path / "model.gguf")
    folder = tmp_path / "folder"
    folder.mkdir()
    about = json.loads((GOLDEN / "lm_falcon_mamba" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "mixer_rms_eps": about["layer_norm_epsilon"]}))
    (folder / "model.safetensors").symlink_to(GOLDEN / "lm_falcon_mamba" / "model.safetensors")
    model, want = df.load(tmp_path / "model.gguf"), df.load(folder)
    tokens = torch.randint(97, (1, 20))
    assert model.config == want.config
    assert apart(logits(model, tokens), logits(want, tokens)) <= 1e-6


@pytest.mark.parametrize("unused", [False, True])
def test_rwkv7(unused, tmp_path):
    tensors = rwkv7(torch.float32, unused=True)
    torch.save(tensors, tmp_path / "model.pth")
    out = gguf.GGUFWriter(tmp_path / "model.gguf", "rwkv7")
    out.add_block_count(BLOCKS)
    out.add_embedding_length(D)
    out.add_layer_norm_eps(1e-5)
    out.add_wkv_head_size(N)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.RWKV7, BLOCKS)
    for i in range(BLOCKS):
        mixed = torch.stack([tensors.pop(f"blocks.{i}.att.x_{letter}") for letter in "rwkvag"])
        write_tensor(out, f"blk.{i}.time_mix_lerp_fused.weight", mixed, None, torch.float32)
    for name, t in tensors.items():
        if name.startswith("blocks.0.att.v") and not name.startswith("blocks.0.att.value") and not unused:
            continue
        name = name.replace("blocks.0.ln0", "model.layers.0.pre_norm").replace("ffn", "feed_forward")
        name = name.replace("blocks", "model.layers").replace(".att.", ".attention.")
        name = {"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}.get(name, name)
        there = names.get_name(name.replace("ln_out", "model.ln_out"), try_suffixes=(".weight", ".bias"))
        assert there is not None, name
        t = t.squeeze()
        t = t.t() if name[-2:] in {f"{a}{b}" for a in "wavg" for b in "12"} else t
        t = t.flatten() if name.endswith("r_k") else t
        there += "" if there.endswith((".weight", ".bias")) else ".weight"
        write_tensor(out, there, t, None, torch.float32)
    finish(out)
    model, want = df.load(tmp_path / "model.gguf"), df.load(tmp_path / "model.pth")
    assert model.config == want.config
    tokens = torch.randint(V, (2, 9))
    assert torch.equal(logits(model, tokens), logits(want, tokens))


@pytest.mark.parametrize("name", ["mamba", "falcon_h1", "granitemoehybrid", "lfm2"])
def test_matrices_of_8_bits_stay_as_they_are(name, tmp_path):
    """And stand for what the package gguf says that they stand for."""
    convert(GOLDEN / f"lm_{name}", tmp_path / "model.gguf", Q8_0)
    model = df.load(tmp_path / "model.gguf")
    whole = {n: m for n, m in quantized_within(model).items() if isinstance(m, QuantizedLinear)}
    assert model.quantization is not None and model.quantization.group == 32 and whole
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    table = read["token_embd.weight"]
    values = torch.from_numpy(gguf.quants.dequantize(table.data, table.tensor_type))
    assert torch.equal(model.embed(torch.arange(97)), values)

    plain = tmp_path / "plain.gguf"  # the same numbers in float32
    copy = gguf.GGUFWriter(plain, "x")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    for key, found in reader.fields.items():
        if key.startswith(("GGUF.", "general.architecture")):
            continue
        kind, value = found.types[0], found.contents()
        if kind == gguf.GGUFValueType.ARRAY:
            copy.add_array(key, value)
        else:
            copy.add_key_value(key, value, kind)
    copy.add_string("general.architecture", str(reader.fields["general.architecture"].contents()))
    for t in reader.tensors:
        copy.add_tensor(t.name, gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]))
    finish(copy)
    tokens = torch.randint(97, (1, 20))
    assert apart(logits(model, tokens), logits(df.load(plain), tokens)) <= 1e-5


@pytest.mark.skipif(bool(library.missing), reason=library.missing)
@torch.inference_mode()
def test_a_token_is_one_call_where_a_map_of_few_columns_has_floats(tmp_path, monkeypatch):
    convert(GOLDEN / "lm_mamba", tmp_path / "model.gguf", Q8_0)
    model, tokens, made, call = df.load(tmp_path / "model.gguf"), torch.randint(97, (5,)), list[str](), library.call
    with backend("torch"):
        want = model(tokens[None])[0][0]
    monkeypatch.setattr(library, "call", lambda name, *args, **fields: (made.append(name), call(name, *args, **fields)))
    prepared, state = model.prepare(), model.init_state(1)
    for i, token in enumerate(tokens):
        made.clear()
        logits, state = prepared.step(token[None], state)
        torch.testing.assert_close(logits[0], want[i], rtol=1e-4, atol=1e-5)
    assert made == ["steps"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "BF16"])
def test_other_blocks_are_unpacked(kind, tmp_path):
    convert(GOLDEN / "lm_mamba2", tmp_path / "model.gguf", KINDS[kind] if kind[0] == "Q" else None, torch.bfloat16)
    model = df.load(tmp_path / "model.gguf", dtype="float32")
    assert model.quantization is None
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    want = torch.from_numpy(
        gguf.quants.dequantize(read["output.weight"].data, read["output.weight"].tensor_type).copy()
    )
    assert torch.equal(model.head.weight, want)


def test_a_file_of_several_dtypes_becomes_a_model_of_one(tmp_path):
    convert(GOLDEN / "lm_mamba", tmp_path / "half.gguf", dtype=torch.float16)
    assert {p.dtype for p in df.load(tmp_path / "half.gguf").parameters()} == {torch.float16}
    assert {p.dtype for p in df.load(tmp_path / "half.gguf", dtype="float32").parameters()} == {torch.float32}


PARTS = {
    "mamba": MambaConfig(d_state=8),
    "a mamba with norms of its maps": MambaConfig(d_state=8, norm_maps=1e-5),
    "mamba2": Mamba2Config(d_state=8, d_head=16, groups=2),
    "mamba2 of one group": Mamba2Config(d_state=8, d_head=16),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_written_is_read(part, tied, tmp_path):
    model = small(PARTS[part], tie_embeddings=tied)
    again = df.load(written(model, tmp_path / "model.gguf"))
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-6 if "A_log" in name else 0, atol=0)


def test_the_package_reads_what_is_written(tmp_path):
    model = small(tie_embeddings=False).bfloat16()
    reader = gguf.GGUFReader(written(model, tmp_path / "model.gguf"))
    read = {t.name: t for t in reader.tensors}
    assert reader.fields["mamba2.ssm.inner_size"].contents() == 64
    assert reader.fields["tokenizer.ggml.tokens"].contents()[65] == "A"
    assert read["blk.1.ssm_in.weight"].tensor_type == KINDS.BF16
    assert read["blk.1.ssm_a"].tensor_type == KINDS.F32 and [*read["blk.1.ssm_a"].shape] == [1, 4]
    rate = torch.from_numpy(read["blk.1.ssm_a"].data.copy()).flatten()
    torch.testing.assert_close(rate, -model.blocks[1].parts[0].A_log.float().exp())


def test_a_model_that_was_read_in_8_bits_is_saved_and_written_as_it_is(tmp_path):
    convert(GOLDEN / "lm_mamba", tmp_path / "model.gguf", Q8_0)  # whose maps of 5 columns are float32
    model = df.load(tmp_path / "model.gguf")
    assert model.quantization.kept == tuple(f"blocks.{i}.parts.0.dt_proj" for i in range(3))
    df.save(model, tmp_path / "folder")
    again, tokens = df.load(tmp_path / "folder"), torch.randint(97, (1, 20))
    assert again.quantization == model.quantization
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    third = df.load(written(model, tmp_path / "again.gguf"))
    assert third.quantization == model.quantization
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(third.state_dict()[name], tensor, rtol=1e-6 if "A_log" in name else 0, atol=0)


def test_scales_that_the_file_cannot_have_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no numbers of 16 bits"):
        written(df.quantize(small(), group=32), tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="in groups of 64"):
        written(df.quantize(small(), group=64), tmp_path / "model.gguf")


def test_a_model_that_is_not_written_is_refused(tmp_path):
    from dualform.layers.rglru import RGLRUConfig

    with pytest.raises(ConfigError, match="written for Mamba and Mamba-2"):
        written(small(RGLRUConfig(heads=4)), tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="96 channels beside a width of 32"):
        written(small(MambaConfig(expand=3)), tmp_path / "model.gguf")


def test_bytes_are_read_as_text(tmp_path):
    tokenizer = load_tokenizer(written(small(), tmp_path / "model.gguf"), 256)
    text = "it's Rudolf Kálmán, 1960: <|endoftext|>\n\n  \u20ac"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def changed(path: Path, **keys) -> Path:
    """The file of a small model with other keys; None leaves one out."""
    written(small(), path)
    reader, new = gguf.GGUFReader(path), path.with_name("changed.gguf")
    out = gguf.GGUFWriter(new, keys.pop("architecture", "mamba2"))
    for key, found in reader.fields.items():
        name = key.removeprefix("mamba2.").replace(".", "_")
        value = keys.get(name, found.contents())
        if key.startswith(("GGUF.", "general.architecture", "tokenizer")) or value is None:
            continue
        out.add_key_value(key, value, found.types[0])
    for t in reader.tensors:
        out.add_tensor(keys.get(t.name.replace(".", "_"), t.name), t.data)
    finish(out)
    return new


def test_what_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match="architecture 'qwen2', which is not in the tables") as caught:
        df.load(changed(path, architecture="qwen2"))
    assert "mamba2" in str(caught.value)
    with pytest.raises(ConfigError, match=r"the key mamba2.ssm.state_size is missing"):
        df.load(changed(path, ssm_state_size=None))
    with pytest.raises(CheckpointError, match=r"1 missing, first 'blk.1.ssm_a'; 1 too many, first 'blk.1.other'"):
        df.load(changed(path, blk_1_ssm_a="blk.1.other"))
    with pytest.raises(ConfigError, match=r"embedding_length is 33, and token_embd.weight is 32 wide"):
        df.load(changed(path, embedding_length=33))
    with pytest.raises(CheckpointError, match="no such"):
        df.load(tmp_path / "other.gguf")
    data = written(small(), path).read_bytes()
    for cut, match in (
        (3, "it ends after 3 bytes"),
        (1000, "middle of its header|more than fit"),
        (-1, "ends at byte"),
    ):
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=match):
            df.load(path)
    path.write_bytes(b"GGML" + data[4:])
    with pytest.raises(CheckpointError, match="does not begin with those letters"):
        df.load(path)
    path.write_bytes(data[:4] + struct.pack(">I", 3) + data[8:])
    with pytest.raises(CheckpointError, match="the other order of bytes"):
        df.load(path)
    name = b"blk.1.ssm_in.weight"
    at = data.index(name) + len(name) + 4 + 16
    path.write_bytes(data[:at] + struct.pack("<I", 77) + data[at + 4 :])
    with pytest.raises(CheckpointError, match="has the type 77, which is not known"):
        df.load(path)


def test_a_kind_that_no_package_unpacks_is_refused(tmp_path, monkeypatch):
    import sys

    convert(GOLDEN / "lm_mamba2", tmp_path / "model.gguf", KINDS.Q4_0)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="has the type Q4_0, which the package gguf unpacks"):
        df.load(tmp_path / "model.gguf")


def test_damage_is_found_or_harmless(tmp_path):
    """A sentence, or a model: never another error, and never memory that the file does not have."""
    rng, path = random.Random(0), tmp_path / "model.gguf"
    data = written(small(blocks=1), path).read_bytes()
    head, rest = data[:9000], data[9000:]
    for _ in range(60):
        path.write_bytes(damaged_bytes(head, rng) + rest)
        try:
            check_tensors(path)
            load_tokenizer(path, 256)
            df.load(path)
        except DualformError as error:
            assert len(str(error)) < 2000
