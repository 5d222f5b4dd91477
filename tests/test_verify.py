"""``dualform verify``: a line for each file of a model, a run or a state, and exit code 2 for damage."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

from dualform.cli import main as cli
from dualform.layers.lstm import LSTMConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.saving.state import save_state
from dualform.models.tokenizer import ByteTokenizer
from dualform.train.checkpoint import Position, save_checkpoint
from dualform.train.data import prepare
from dualform.train.optim import build_optimizer
from dualform.train.recipe import Data, Recipe

MODEL = ModelConfig(256, 4, {"L": (LSTMConfig(hidden=2),)}, "L")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run as training writes it, and a state."""
    root = tmp_path_factory.mktemp("made")
    (root / "text.txt").write_text("some words here\n" * 100)
    run, recipe = root / "run", Recipe(model=MODEL.to_dict(), steps=9, data=Data(path=str(root / "text.txt"), length=8))
    prepare(recipe.data, ByteTokenizer(), run / "data")
    torch.manual_seed(0)
    model = LanguageModel(MODEL)
    optimizer = build_optimizer(model, recipe.optim)
    model.loss(torch.randint(256, (2, 9))).backward()
    optimizer.step()
    for step in (5, 9):
        save_checkpoint(run / "checkpoints", recipe, Position(step), model, optimizer, ByteTokenizer())
    model.save(run / "model")
    (run / "recipe.json").write_text("{}")
    save_state(model.init_state(1), root / "a.state")
    return root


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture
def verify(monkeypatch, capsys):
    """The exit code, the lines of standard output, and standard error."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["dualform", "verify", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out.splitlines(), err

    return run


def flip(path, at=-3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_run_has_a_line_for_each_file(root, verify):
    code, lines, err = verify(root / "run")
    assert (code, err) == (0, "") and lines[-1] == "16 ok"
    names = [line.split("  ")[-2].strip().removeprefix(f"{root}/run/") for line in lines[:-1]]
    data = ["about.json", "held_out.ids", "held_out.nbytes", "held_out.starts", "train.ids", "train.starts"]
    model = ["model/config.json", "model/model.safetensors"]
    steps = [
        f"checkpoints/step-0000000{i}/{name}" for i in (5, 9) for name in ("optimizer.safetensors", "run.json", *model)
    ]
    assert names == [*(f"data/{name}" for name in data), *steps, *model]
    assert all(line.startswith("ok ") and line.endswith(" bytes") for line in lines[:-1])


@pytest.mark.parametrize(
    "name",
    [
        "data/train.ids",
        "data/about.json",
        "checkpoints/step-00000005/optimizer.safetensors",
        "checkpoints/step-00000009/run.json",
        "checkpoints/step-00000009/model/config.json",
        "model/model.safetensors",
    ],
)
def test_a_flipped_byte_is_found(root, verify, name):
    flip(root / "run" / name)
    code, lines, _ = verify(root / "run")
    (damaged,) = [line for line in lines if line.startswith("damaged ")]
    assert code == 2 and name in damaged and "its digest is" in damaged and lines[-1] == "15 ok, 1 damaged"
    assert verify((root / "run" / name).parent)[0] == 2 and verify(root / "run" / name)[0] == 2


def test_a_missing_file_and_a_damaged_manifest_are_found(root, verify):
    (root / "run" / "model" / "model.safetensors").unlink()
    code, lines, _ = verify(root / "run" / "model")
    assert code == 2 and "model.safetensors  missing, but listed" in lines[1]
    (root / "run" / "model" / "manifest.json").write_text("{}")
    code, lines, _ = verify(root / "run" / "model")
    assert code == 2 and "manifest.json" in lines[0] and "'format' is missing" in lines[0]


def test_folders_without_a_manifest_say_so_and_are_still_looked_into(root, verify):
    for path in (root / "run").rglob("manifest.json"):
        path.unlink()
    code, lines, _ = verify(root / "run")
    assert code == 0 and lines[-1] == "16 no digest"
    assert all(line.startswith("no digest  ") and "no manifest.json beside it" in line for line in lines[:-1])
    with (root / "run" / "data" / "held_out.ids").open("ab") as file:
        file.write(b"x")
    save_file({"a": torch.ones(1)}, root / "run" / "model" / "model.safetensors")
    (root / "run" / "checkpoints" / "step-00000005" / "run.json").write_text("{}")
    (root / "run" / "checkpoints" / "step-00000009" / "optimizer.safetensors").write_bytes(b"")
    code, lines, _ = verify(root / "run")
    assert code == 2 and lines[-1] == "4 damaged, 16 no digest"


def test_states(root, verify):
    assert verify(root / "a.state")[1][0].startswith("ok ")
    save_file({"state": torch.ones(2)}, root / "old.state", metadata={"dualform_state": "1"})
    code, lines, _ = verify(root / "a.state", root / "old.state")
    assert code == 0 and lines[1].startswith("no digest") and lines[-1] == "1 ok, 1 no digest"
    flip(root / "a.state")
    code, lines, _ = verify(root / "a.state")
    assert code == 2 and "damaged: its digest is" in lines[0]


def test_json_is_one_document(root, verify):
    flip(root / "run" / "data" / "train.ids")
    code, lines, _ = verify(root / "run", "--json")
    found = json.loads("\n".join(lines))
    assert code == 2 and found["ok"] is False and found["counts"] == {"ok": 15, "damaged": 1, "no digest": 0}
    (damaged,) = [file for file in found["files"] if file["status"] == "damaged"]
    assert damaged["path"] == str(root / "run" / "data" / "train.ids") and "digest" in damaged["detail"]


def test_nothing_to_verify_is_an_error(root, verify, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, said in (("empty", "no model, checkpoint or prepared data"), ("nowhere", "no such file or folder")):
        code, lines, err = verify(tmp_path / path)
        assert code == 2 and not lines and err.startswith("error: ") and said in err
    (tmp_path / "notes.txt").write_text("mine")
    code, lines, _ = verify(tmp_path / "notes.txt")
    assert code == 2 and "cannot be read" in lines[0]
