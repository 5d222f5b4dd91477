"""Checkpoints: exact names, sorted by number; nothing else is resumed from or removed; damage is named."""

import json
import math
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualform.core.errors import CheckpointError
from dualform.layers.lstm import LSTMConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.saving import model as saving
from dualform.models.tokenizer import ByteTokenizer
from dualform.train import checkpoint
from dualform.train.checkpoint import Position, checkpoints, read_position, restore_checkpoint, save_checkpoint
from dualform.train.optim import build_optimizer
from dualform.train.recipe import Recipe

MODEL = ModelConfig(256, 4, {"L": (LSTMConfig(hidden=2),)}, "L")
RECIPE = Recipe(model=MODEL.to_dict(), steps=100, keep=2)


def trained(steps=1):
    torch.manual_seed(0)
    model = LanguageModel(MODEL)
    optimizer = build_optimizer(model, RECIPE.optim)
    for _ in range(steps):
        model.loss(torch.randint(256, (2, 9))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture(scope="module")
def run():
    return trained()


def write(folder, run, *steps, recipe=RECIPE):
    for step in steps:
        place = save_checkpoint(folder, recipe, Position(step, 1.5, 2.5, 1), *run, ByteTokenizer())
    return place


def names(folder):
    return [path.name for path in checkpoints(folder)]


def test_a_round_trip(tmp_path, run):
    place = write(tmp_path, run, 1)
    assert sorted(os.listdir(place)) == ["manifest.json", "model", "optimizer.safetensors", "run.json"]
    model, optimizer = trained(0)
    assert restore_checkpoint(place, RECIPE, model, optimizer) == (Position(1, 1.5, 2.5, 1), [])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), run[0].parameters(), strict=True))
    for a, b in zip(model.parameters(), run[0].parameters(), strict=True):
        assert all(torch.equal(optimizer.state[a][key], run[1].state[b][key]) for key in ("step", "exp_avg"))


def test_checkpoints_are_sorted_by_their_number(tmp_path, run):
    write(tmp_path, run, 99_999_999, 100_000_000, 7)
    assert names(tmp_path) == ["step-99999999", "step-100000000"]  # 7 was the oldest, and two are kept
    assert read_position(tmp_path / "step-100000000")[0].step == 100_000_000


def test_other_names_are_no_checkpoints_and_are_never_removed(tmp_path, run):
    write(tmp_path, run, 40)
    strange = ["step-00000040.bak", "step-40", "step-000000041", "step-0000004x", "step-", "steps", "my step-00000050"]
    for name in strange:
        shutil.copytree(tmp_path / "step-00000040", tmp_path / name)
    (tmp_path / "step-99999990").write_text("a file")
    assert names(tmp_path) == ["step-00000040"]
    write(tmp_path, run, 50, 60, 70)
    assert names(tmp_path) == ["step-00000060", "step-00000070"]
    assert {*os.listdir(tmp_path)} == {*strange, "step-99999990", "step-00000060", "step-00000070"}
    model, optimizer = trained(0)
    assert restore_checkpoint(tmp_path / "step-00000040.bak", RECIPE, model, optimizer)[0].step == 40


def test_a_checkpoint_with_a_file_of_somebody_else_or_that_is_a_link_stays(tmp_path, run):
    folder = tmp_path / "checkpoints"
    write(folder, run, 1, 2)
    (folder / "step-00000001" / "notes.txt").write_text("the best one")
    (folder / "step-00000002").rename(tmp_path / "elsewhere")
    (folder / "step-00000002").symlink_to(tmp_path / "elsewhere")
    write(folder, run, 3, 4, 5)
    assert names(folder) == [f"step-0000000{i}" for i in (1, 2, 4, 5)]
    assert (tmp_path / "elsewhere" / "run.json").exists()


def test_what_killed_saves_left_behind_is_removed(tmp_path, run):
    left = [tmp_path / ".step-00000003.incoming", tmp_path / ".step-00000009.incoming"]
    for path in (*left, tmp_path / ".step-best.incoming"):
        path.mkdir(parents=True)
    write(tmp_path, run, 10)
    assert sorted(os.listdir(tmp_path)) == [".step-best.incoming", "step-00000010"]


def test_a_full_disk_is_named_by_the_place_of_the_checkpoint(tmp_path, run, monkeypatch):
    for module, part in ((saving, "/model"), (checkpoint, "")):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as error:
            patch.setattr(module, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
            write(tmp_path, run, 1)
        assert str(error.value).startswith(f"{tmp_path / 'step-00000001'}{part}: cannot save: No space left")
        assert str(error.value).count("hint: ") == 1 and not os.listdir(tmp_path)


def damage(place, file, change):
    path = place / file
    if file.endswith(".json"):
        about = json.loads(path.read_text())
        change(about)
        path.write_text(json.dumps(about))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


def refused(place, said):
    model, optimizer = trained(0)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError) as error:
        restore_checkpoint(place, RECIPE, model, optimizer)
    assert said in str(error.value) and str(place) in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) and not optimizer.state


@pytest.mark.parametrize("file", ["optimizer.safetensors", "run.json", "model/model.safetensors", "model/config.json"])
def test_a_flipped_byte_is_found(tmp_path, run, file):
    place = write(tmp_path, run, 1)
    data = bytearray((place / file).read_bytes())
    data[-20] ^= 1
    (place / file).write_bytes(data)
    refused(place, f"{file}: damaged: its digest is")
    refused(place, f"remove {place}, and the run resumes from an earlier checkpoint")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda a: a.pop("format"), "'format' is missing"),
        (lambda a: a.update(format=2), "format 2, expected 1"),
        (lambda a: a.update(format=[]), "format is []"),
        (lambda a: a.pop("position"), "'position' is missing"),
        (lambda a: a["position"].pop("step"), "'step' is missing"),
        (lambda a: a["position"].update(step=2), "of step 2, expected step-00000001"),
        (lambda a: a["position"].update(step=-1), "position.step is -1, expected 0 or more"),
        (lambda a: a["position"].update(elapsed="1"), "elapsed is '1'"),
        (lambda a: a["position"].update(elapsed=-1.0), "position.elapsed is -1.0"),
        (lambda a: a["position"].update(loss_sum=math.nan), "NaN"),
        (lambda a: a["position"].update(loss_count=10**30), "loss_count"),
        (lambda a: a.update(position=[]), "position is []"),
        (lambda a: a.pop("recipe"), "'recipe' is missing"),
        (lambda a: a.update(recipe=3), "recipe is 3"),
        (lambda a: a["recipe"].update(setps=3), "unknown key 'setps'"),
        (lambda a: a["recipe"]["optim"].update(lr="fast"), "lr"),
        (lambda a: a.clear(), "'format' is missing"),
    ],
)
def test_what_is_wrong_in_run_json_is_named(tmp_path, run, change, said):
    place = write(tmp_path, run, 1)
    (place / "manifest.json").unlink()
    damage(place, "run.json", change)
    refused(place, said)


NAME = "embed.weight"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop(f"{NAME}.exp_avg"), f"the moments of {NAME} are missing"),
        (
            lambda t: t.update({f"{NAME}.exp_avg_sq": torch.zeros(3)}),
            f"the moments of {NAME} are missing or of another",
        ),
        (lambda t: t.update({f"{NAME}.step": torch.ones(1)}), f"the moments of {NAME} are missing or of another"),
        (lambda t: t.update({f"{NAME}.exp_avg": torch.zeros(256, 4).int()}), f"the moments of {NAME} are not all"),
        (lambda t: t.update({f"{NAME}.step": torch.tensor(-1.0)}), f"{NAME} has had -1.0 steps"),
        (lambda t: t.update({f"{NAME}.step": torch.tensor(math.nan)}), f"{NAME} has had nan steps"),
        (lambda t: t.update(other=torch.zeros(1)), "holds 'other', of no parameter"),
        (lambda t: t.clear(), "are missing"),
    ],
)
def test_what_is_wrong_in_the_moments_is_named(tmp_path, run, change, said):
    place = write(tmp_path, run, 1)
    (place / "manifest.json").unlink()
    damage(place, "optimizer.safetensors", change)
    refused(place, said)


def test_a_checkpoint_of_an_older_version_without_manifests_resumes(tmp_path, run):
    place = write(tmp_path, run, 1)
    (place / "manifest.json").unlink()
    (place / "model" / "manifest.json").unlink()
    model, optimizer = trained(0)
    assert restore_checkpoint(place, replace(RECIPE, steps=200), model, optimizer)[1] == ["steps: 100, now 200"]
