"""Folders of other libraries as they come: shards, dtypes, memory, and what is damaged."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dualform as df
from dualform.core.errors import CheckpointError, ConfigError, DualformError
from dualform.models.saving.model import check_tensors, shape
from dualform.models.saving.weights import INDEX_FILE, PYTORCH_FILE, PYTORCH_INDEX_FILE

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(GOLDEN / "lm_mamba2", tmp_path / "a")
    return tmp_path / "a"


def halves(folder: Path, suffix: str = "safetensors") -> dict[str, str]:
    """The weights in two files with an index; where each is."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index, write = INDEX_FILE, save_file
    if suffix == "bin":
        index, write = PYTORCH_INDEX_FILE, torch.save
    places = {}
    for i in (0, 1):
        name = f"part-{i}.{suffix}"
        half = {key: tensors[key].clone() for key in sorted(tensors)[i::2]}
        write(half, folder / name)
        places |= dict.fromkeys(half, name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def edit(folder: Path, name: str = "config.json", **change: Any) -> None:
    about = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**about, **change}))


def refused(folder: Path, sentence: str, error: type[DualformError] = CheckpointError) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(error, match=sentence):
        df.load(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_several_files(folder, suffix):
    halves(folder, suffix)
    got, want = df.load(folder).state_dict(), df.load(GOLDEN / "lm_mamba2").state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    check_tensors(folder)


def test_one_file_comes_before_several_and_safetensors_before_pickles(folder):
    (folder / INDEX_FILE).write_text("{")
    (folder / PYTORCH_FILE).write_bytes(b"no pickle")
    df.load(folder)


def test_dtypes(folder):
    save_file({name: t.bfloat16() for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert {p.dtype for p in df.load(folder).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in df.load(folder, dtype="float64").parameters()} == {torch.float64}


def test_the_model_does_not_depend_on_the_file(folder):
    model = df.load(folder)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    (folder / WEIGHTS).write_bytes(b"\xff" * (folder / WEIGHTS).stat().st_size)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_another_name_of_the_activation(folder):
    edit(folder, hidden_act="swish")
    assert shape(folder).config == shape(GOLDEN / "lm_mamba2").config


def test_infinity_in_a_config(folder):
    for infinite in ({"__float__": "Infinity"}, float("inf")):
        edit(folder, time_step_limit=[0.0, infinite])
        assert df.load(folder).config.parts["M"][0].dt_limit == (0.0, float("inf"))


MEASURE = """
import sys, torch, dualform as df
from pathlib import Path
from dualform.models.saving import model as saving, weights
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
peak, plain, weights.SPAN = [0], saving.each_tensor, 2**20
def watched(places):
    for pair in plain(places):
        yield pair
        del pair
        peak[0] = max(peak[0], resident())
saving.each_tensor = watched
df.load(sys.argv[1])
kept = []
for folder, file in zip(sys.argv[2::2], sys.argv[3::2]):
    before, peak[0] = resident(), 0
    kept.append(df.load(folder))
    print((max(peak[0], resident()) - before) / Path(folder, file).stat().st_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_that_of_the_weights(folder, tmp_path):
    """Not twice that, as of a file that stays mapped, or of a model that is built first."""
    big, other = tmp_path / "big", tmp_path / "other"
    config = df.ModelConfig(64, 384, {"M": (df.layers.MambaConfig(d_state=4),)}, "M" * 12)
    with torch.device("meta"):
        model = df.LanguageModel(config)
    df.save(model.to_empty(device="cpu"), big, layout="mamba_ssm")
    shutil.copytree(big, other)
    torch.save(load_file(big / WEIGHTS), other / PYTORCH_FILE)
    for name in (WEIGHTS, "manifest.json"):
        (other / name).unlink()
    command = [sys.executable, "-c", MEASURE, folder, big, WEIGHTS, other, PYTORCH_FILE]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(0.9 < float(share) < 1.15 for share in done.stdout.split()), done.stdout


def test_a_model_is_built_whatever_lies_in_its_memory(monkeypatch, tmp_path):
    """Where a start is drawn again until it is within bounds, values that nobody draws would never be."""
    df.save(df.LanguageModel(df.ModelConfig(16, 8, {"S": (df.layers.S5Config(d_state=8),)}, "S")), tmp_path / "model")
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *of, make=make, **options: make(*of, **options).fill_(100))
    assert df.load(tmp_path / "model").parameter_count() > 0


# --- damage ---


def test_an_architecture_that_is_in_no_table(folder):
    edit(folder, model_type="gemma9")
    refused(folder, r"config.json: model_type is 'gemma9', .*\n.*mamba, mamba2.* of mamba-ssm")
    edit(folder, model_type=None)
    refused(folder, "config.json: model_type is None")
    (folder / "config.json").write_text("{}")
    refused(folder, r"config.json: not a config of this library, nor of another.*\n.*can be read")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which the layers here do not have"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"hidden_size": "x"}, "hidden_size is 'x', expected a whole number"),
        ({"hidden_size": -8}, "hidden_size is -8, expected a positive number"),
        ({"hidden_size": 2**70}, "hidden_size is 1180591620717411303424, expected a positive number of 64 bits"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1,000,000,000,000, expected 1 to 10,000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon is None"),
        ({"expand": 0.001}, "expand is 0.001"),
        ({"expand": float("inf")}, "expand is inf"),
        ({"num_heads": 7}, r"num_heads \* head_dim is 7 \* 8, expected expand \* hidden_size = 64"),
        ({"n_groups": 3}, "8 heads cannot be shared out over 3 groups"),
        ({"time_step_limit": [0.0]}, "time_step_limit is"),
    ],
)
def test_an_impossible_config(folder, change, sentence):
    edit(folder, **change)
    refused(folder, f"config.json: .*{sentence}", ConfigError)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n_layer": 0}, "n_layer is 0"),
        ({"ssm_cfg": 3}, "ssm_cfg is 3, expected an object"),
        ({"ssm_cfg": {"layer": ["Mamba2"]}}, "layer"),
        ({"ssm_cfg": {"expand": "2"}}, "expand = '2'"),
        ({"attn_layer_idx": [7]}, "attn_layer_idx has 7, expected 0 to 1"),
        ({"attn_layer_idx": ["a"]}, "attn_layer_idx is"),
        ({"attn_layer_idx": [0]}, "num_heads is None"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0"),
    ],
)
def test_an_impossible_config_of_mamba_ssm(tmp_path, change, sentence):
    about = {"d_model": 8, "n_layer": 2, "vocab_size": 13, **change}
    (tmp_path / "config.json").write_text(json.dumps(about))
    refused(tmp_path, f"config.json: .*{sentence}", ConfigError)


def changed(**tensors: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        held = {**load_file(folder / WEIGHTS), **{name.replace("__", "."): t for name, t in tensors.items()}}
        save_file({name: t for name, t in held.items() if t is not None}, folder / WEIGHTS)

    return change


def cut(name: str, keep: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (changed(lm_head__weight=None), r"1 missing, first 'lm_head.weight'\n.*another model"),
        (changed(more=torch.zeros(1)), "1 too many, first 'more'"),
        (changed(backbone__norm_f__weight=torch.ones(3)), r"norm_f.weight has shape \(3,\), expected \(32,\)"),
        (changed(lm_head__weight=torch.ones(97, 32).long()), "lm_head.weight is I64, expected torch.float32"),
        (cut(WEIGHTS, 5000), "model.safetensors: cannot be read"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"no weights: no {WEIGHTS}, {INDEX_FILE} or {PYTORCH_FILE}"),
    ],
)
def test_damaged_weights(folder, change, sentence):
    change(folder)
    refused(folder, sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: (f / "part-1.safetensors").unlink(), "part-1.safetensors: missing, but .* names it"),
        (cut("part-1.safetensors", 5000), "part-1.safetensors: cannot be read"),
        (
            lambda f: edit(f, INDEX_FILE, weight_map={"a": "../a.safetensors"}),
            "index.json: weight_map has '../a.safetensors' for 'a'",
        ),
        (lambda f: edit(f, INDEX_FILE, weight_map={"a": 3}), "index.json: weight_map has 3 for 'a'"),
        (lambda f: edit(f, INDEX_FILE, weight_map=[]), r"index.json: weight_map is \[\], expected an object"),
        (lambda f: (f / INDEX_FILE).write_text("{}"), "index.json: the key 'weight_map' is missing"),
        (lambda f: (f / INDEX_FILE).write_text("{"), "index.json: cannot be read as JSON"),
        (
            lambda f: save_file(load_file(f / "part-0.safetensors"), f / "part-1.safetensors"),
            "part-1.safetensors: has '.*', and so has part-0.safetensors",
        ),
    ],
)
def test_damage_of_several_files(folder, change, sentence):
    halves(folder)
    change(folder)
    refused(folder, sentence)


def test_an_index_that_names_an_absent_tensor(folder):
    places = halves(folder)
    edit(folder, INDEX_FILE, weight_map={**places, "lm_tail.weight": "part-0.safetensors"})
    refused(folder, "index.json: lists 'lm_tail.weight' in part-0.safetensors, which does not have it")


class Code:
    def __reduce__(self):
        return print, ("code has run",)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"a": Code()}, r"bin: cannot be read: it holds more than tensors.*\n.*safetensors"),
        ([1], "bin: cannot be read: holds 'list', expected tensors by their names"),
        ({"a": 1}, "bin: cannot be read: holds 'int', expected tensors"),
        (b"", "bin: cannot be read"),
        (b"PK\x03\x04no archive", "bin: cannot be read"),
    ],
)
def test_a_pickle_that_is_more_or_less_than_tensors(folder, capsys, content, sentence):
    (folder / WEIGHTS).unlink()
    if isinstance(content, bytes):
        (folder / PYTORCH_FILE).write_bytes(content)
    else:
        torch.save(content, folder / PYTORCH_FILE)
    refused(folder, sentence)
    assert "code has run" not in capsys.readouterr().out


def test_a_model_without_its_weights(folder):
    (folder / WEIGHTS).unlink()
    assert shape(folder).parameter_count() == 33864
