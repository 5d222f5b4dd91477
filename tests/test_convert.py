"""``dualform convert``, and what the other commands say of folders of other libraries."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from dualform.cli.convert import To
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.saving import model
from dualform.models.saving.model import load
from dualform.models.tables.registry import LAYOUTS

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def folder(tmp_path) -> Path:
    """With a tokenizer whose tokens are single letters."""
    place = tmp_path / "there"
    shutil.copytree(GOLDEN / "lm_mamba", place)
    Tokenizer(models.WordLevel({chr(32 + i): i for i in range(97)}, " ")).save(str(place / "tokenizer.json"))
    return place


def test_the_layouts_are_those_of_the_tables():
    assert tuple(To) == (*LAYOUTS, "onnx")


def test_there_and_back(dualform, folder, tmp_path):
    for source, target, to in (("there", "own", "dualform"), ("own", "ssm", "mamba_ssm"), ("ssm", "hf", "hf")):
        code, out, err = dualform("convert", tmp_path / source, tmp_path / target, "--to", to)
        assert (code, err) == (0, "") and "29,536 parameters" in out and f"layout of {to}" in out
    got, want = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "there"))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes()
    assert dualform("verify", tmp_path / "hf")[0] == 0


def test_a_file_of_gguf_there_and_back(dualform, tmp_path):
    config = ModelConfig(256, 16, {"M": (MambaConfig(d_state=4),)}, "MM")
    LanguageModel(config).save(tmp_path / "own")
    code, out, err = dualform("convert", tmp_path / "own", tmp_path / "a.gguf", "--to", "gguf", "--dtype", "bfloat16")
    assert (code, err) == (0, "") and "layout of gguf" in out
    assert "gguf" in dualform("info", tmp_path / "a.gguf")[1]
    assert dualform("generate", tmp_path / "a.gguf", "ab", "--max-tokens", "3", "--seed", "1")[0] == 0
    assert dualform("convert", tmp_path / "a.gguf", tmp_path / "back", "--dtype", "float32")[0] == 0
    assert load(tmp_path / "back").config == config
    vocabulary = json.loads((tmp_path / "back" / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) == 256
    for args, words in (
        ((tmp_path / "own", tmp_path / "b", "--to", "gguf"), "ends in .gguf"),
        ((tmp_path / "own", tmp_path / "b.gguf", "--to", "gguf", "--dtype", "float64"), "weights of torch.float64"),
    ):
        code, out, err = dualform("convert", *args)
        assert code == 2 and words in err and sorted(path.name for path in tmp_path.glob("b*")) == ["back"], err


def test_another_dtype(dualform, folder, tmp_path):
    assert dualform("convert", folder, tmp_path / "half", "--to", "hf", "--dtype", "bfloat16")[0] == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in load(tmp_path / "half").parameters()} == {torch.bfloat16}


def test_what_is_refused_leaves_nothing(dualform, folder, tmp_path):
    LanguageModel(ModelConfig(7, 8, {"L": (LSTMConfig(hidden=3),)}, "L")).save(tmp_path / "lstm")
    before = sorted(path.name for path in tmp_path.iterdir())
    for args, sentence in (
        ((folder, folder), "is there already"),
        ((folder, tmp_path / "a", "--dtype", "int8"), "dtype"),
        ((tmp_path / "lstm", tmp_path / "a", "--to", "hf"), "blocks of LSTM, which"),
        ((tmp_path / "nowhere", tmp_path / "a"), "nowhere: no such folder"),
    ):
        code, out, err = dualform("convert", *args)
        assert (code, out) == (2, "") and sentence in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_of_two_that_write_to_one_place_the_second_is_told(dualform, folder, tmp_path, monkeypatch):
    """Also where the other one ends after this one has begun."""
    plain = model.write

    def beaten(*args, **kwargs):
        plain(*args, **kwargs)
        shutil.copytree(folder, tmp_path / "a")

    monkeypatch.setattr(model, "write", beaten)
    code, _, err = dualform("convert", folder, tmp_path / "a")
    assert code == 2 and "a: is there already\n" in err and "free some space" not in err
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "there"]


def test_a_target_that_cannot_be_a_folder_is_told(dualform, folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "broken").symlink_to("nothing")
    for target, named in (("file/x", "file"), ("broken", "broken")):
        code, _, err = dualform("convert", folder, tmp_path / target)
        assert code == 2 and f"{tmp_path / named}: is there already\n" in err
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "broken").is_symlink()


def test_other_commands_know_the_folder(dualform, folder):
    code, out, _ = dualform("info", folder)
    assert code == 0 and "mamba of transformers" in out and "29,536" in out
    code, out, _ = dualform("info", folder, "--json")
    size = (folder / "model.safetensors").stat().st_size
    weights = {"path": str(folder / "model.safetensors"), "bytes": size, "layout": "mamba of transformers"}
    assert json.loads(out)["weights"] == weights
    code, out, _ = dualform("generate", folder, "a", "-n", "3", "-t", "0")
    assert code == 0 and out
    code, out, _ = dualform("verify", folder)
    assert code == 0 and "3 no digest" in out


def test_a_missing_shard_is_named(dualform, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    places = {**dict.fromkeys(tensors, "a.safetensors"), "lm_head.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    code, out, _ = dualform("verify", folder)
    assert code == 2 and "b.safetensors  missing" in out
    assert dualform("info", folder, "--json")[1].count('"bytes": null') == 1


def test_quantising_says_what_it_costs(dualform, tmp_path):
    torch.manual_seed(0)
    LanguageModel(ModelConfig(256, 24, {"M": (MambaConfig(d_state=4),)}, "MM")).save(tmp_path / "a")
    text = tmp_path / "text.txt"
    text.write_text("some words to read\n" * 40)
    code, out, err = dualform("convert", tmp_path / "a", tmp_path / "b", "--quantize", "int8", "--text", text)
    assert (code, err) == (0, "") and f"bits per byte of {text}" in out and "over 760 tokens" in out
    assert "logits moved by" in out and load(tmp_path / "b").quantization.group == 64
    assert dualform("verify", tmp_path / "b")[0] == 0 and "int8" in dualform("info", tmp_path / "b")[1]
    a, b, c = (tmp_path / name for name in "abc")
    for args, words in (
        ((a, c, "--quantize", "int8", "--to", "hf"), "'hf' has no matrices of 8 bits"),
        ((a, c, "--text", text), "add --quantize int8"),
        ((b, c, "--quantize", "int8"), "is quantised already"),
        ((b, c, "--to", "hf"), "a quantised model as 'hf'"),
        ((b, c, "--to", "onnx"), "a quantised model as ONNX"),
    ):
        code, out, err = dualform("convert", *args)
        assert code == 2 and words in err and not c.exists(), args


def test_quantising_without_a_tokenizer_says_that_nothing_was_measured(dualform, tmp_path):
    LanguageModel(ModelConfig(50, 24, {"M": (MambaConfig(d_state=4),)}, "MM")).save(tmp_path / "a")
    code, out, _ = dualform("convert", tmp_path / "a", tmp_path / "b", "--quantize", "int8")
    assert code == 0 and "the loss is not measured: " in out and load(tmp_path / "b").quantization.group == 64
