"""What is read while another process saves is of one save, or a sentence."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from dualform.cli import main as cli
from dualform.cli.folders import load_model
from dualform.compat.hf import load_state_dict_hf
from dualform.core.errors import CheckpointError
from dualform.generation.engine import generate
from dualform.generation.session import Session
from dualform.layers.lstm import LSTMConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.saving import model as saving
from dualform.models.saving import state as states
from dualform.models.saving import undisturbed, weights
from dualform.models.saving.model import load, shape
from dualform.models.saving.state import load_state, save_state
from dualform.models.tokenizer import ByteTokenizer, SubwordTokenizer
from dualform.train.checkpoint import Position, save_checkpoint
from dualform.train.optim import build_optimizer
from dualform.train.recipe import Data, Recipe
from dualform.train.setup import build_model


def filled(value, width=4, vocab=256):
    model = LanguageModel(ModelConfig(vocab, width, {"L": (LSTMConfig(hidden=2),)}, "LL"))
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def values(tensors):
    return {value for tensor in tensors for value in tensor.flatten().tolist()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With a model of zeros, in a file that is opened anew for each tensor."""
    monkeypatch.setattr(weights, "SPAN", 1)
    monkeypatch.setattr(weights, "SHARE", 0)
    monkeypatch.setattr(undisturbed, "_PAUSES", (0.0,) * 5)
    filled(0.0).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def during(monkeypatch):
    """Call a function once, when another one, named by its module, is called for the time ``after``; or every time."""

    def plan(module, name, act, after=1, always=False):
        plain, calls = getattr(module, name), []

        def watched(*args, **kwargs):
            calls.append(name)
            if always or len(calls) == after:
                act()
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    return plan


@pytest.mark.parametrize("width", [4, 3])
@pytest.mark.parametrize("after", [1, 2, 3, 5])
@pytest.mark.parametrize("verify", [False, True])
def test_a_model_that_is_replaced_while_it_is_read_is_the_new_one(folder, during, width, after, verify):
    during(weights, "_opened", lambda: filled(1.0, width).save(folder), after)
    model = load(folder, verify=verify)
    assert values(model.parameters()) == {1.0} and model.config.d_model == width


def test_a_model_that_is_replaced_all_the_time_is_said(folder, during):
    during(weights, "_opened", lambda: filled(1.0).save(folder), always=True)
    with pytest.raises(CheckpointError, match="model: another process replaced it each of the 5 times"):
        load(folder)


def test_an_error_of_files_that_stay_is_that_error(folder):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)


def test_a_move_that_another_process_finishes_is_no_damage(folder, during):
    """What is in ``.committed`` moves to its place between a look and a read."""
    filled(1.0).save(folder.with_name("new"))
    shutil.move(folder.with_name("new"), folder / ".committed")

    def finish():
        if (folder / ".committed").exists():
            filled(1.0).save(folder)

    during(saving, "described", finish)
    assert values(load(folder).parameters()) == {1.0}


def test_a_checkpoint_that_is_dropped_while_it_is_read_gives_way_to_a_newer_one(folder, during, tmp_path):
    steps = tmp_path / "run" / "checkpoints"
    filled(0.0).save(steps / "step-00000001" / "model")

    def go_on():
        filled(1.0).save(steps / "step-00000002" / "model")
        shutil.rmtree(steps / "step-00000001")

    during(weights, "_opened", go_on, after=3)
    assert values(load(tmp_path / "run").parameters()) == {1.0}


def words(count):
    return SubwordTokenizer(Tokenizer(models.WordLevel({chr(97 + i): i for i in range(count)}, "a")))


@pytest.mark.parametrize("read", [load_model, lambda given: build_model(Recipe(model=given, steps=1))])
def test_a_model_comes_with_its_own_tokenizer(folder, monkeypatch, read):
    filled(0.0, vocab=5).save(folder, words(5))
    plain, calls = load, []

    def then_replaced(*args, **kwargs):
        model = plain(*args, **kwargs)
        if not calls:
            calls.append(filled(1.0, vocab=5).save(folder, words(4)))
        return model

    for module in ("dualform.models.saving.model", "dualform.train.setup"):
        monkeypatch.setattr(f"{module}.load", then_replaced)
    model, tokenizer = read(str(folder))
    assert values(model.parameters()) == {1.0} and tokenizer.vocab_size == 4


def test_other_readers_of_a_folder(folder, during):
    during(saving, "described", lambda: filled(1.0, 3).save(folder))
    assert shape(folder).config.d_model == 3
    during(weights, "_opened", lambda: filled(2.0, 3).save(folder), after=4)
    assert values(load_state_dict_hf(folder).values()) == {2.0}


def test_states_that_are_replaced_while_they_are_read(tmp_path, during, monkeypatch):
    monkeypatch.setattr(undisturbed, "_PAUSES", (0.0,) * 5)
    save_state(torch.zeros(1, 3), tmp_path / "a.state", {"word": "old"})
    during(states, "tensors_digest", lambda: save_state(torch.ones(1, 3), tmp_path / "a.state"), after=1)
    assert load_state(tmp_path / "a.state", torch.zeros(1, 3)).tolist() == [[1.0, 1.0, 1.0]]
    model = filled(0.5)
    one, two = (generate(model, text, 0).state for text in (b"a", b"bcd"))
    one.save(tmp_path / "a.session", model)
    during(states, "safe_open", lambda: two.save(tmp_path / "a.session", model), after=2)
    assert Session.load(tmp_path / "a.session", model).position.tolist() == [3]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process: ``(exit code, standard output)``."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["dualform", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, capsys.readouterr().out

    return run


def test_a_run_that_goes_on_while_it_is_verified_is_not_damaged(tmp_path, during, command, monkeypatch):
    monkeypatch.setattr(undisturbed, "_PAUSES", (0.0,) * 5)
    run, model = tmp_path / "run", filled(0.0)
    recipe = Recipe(model=model.config.to_dict(), steps=9, keep=2, data=Data(path="x"))
    optimizer = build_optimizer(model, recipe.optim)

    def save(step):
        save_checkpoint(run / "checkpoints", recipe, Position(step), model, optimizer, ByteTokenizer())

    for step in (1, 2):
        save(step)
    model.save(run / "best")
    from dualform.models.saving import verify

    during(verify, "file_digest", lambda: save(3))
    code, out = command("verify", run, "--json")
    listed = json.loads(out)
    assert code == 0 and listed["counts"]["damaged"] == 0
    assert {Path(row["path"]).parts[-2] for row in listed["files"]} >= {"step-00000002", "best"}
    assert not any("step-00000001" in row["path"] for row in listed["files"])
    during(verify, "file_digest", lambda: filled(1.0).save(run / "best"), after=8)
    assert command("verify", run)[0] == 0


def test_a_model_is_converted_with_what_lies_beside_it(folder, during, command, tmp_path):
    filled(0.0, vocab=5).save(folder, words(5))
    during(weights, "_opened", lambda: filled(1.0, vocab=5).save(folder, words(4)), after=3)
    assert command("convert", folder, tmp_path / "copy")[0] == 0
    assert values(load(tmp_path / "copy").parameters()) == {1.0}
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == words(4).to_json()


@pytest.mark.timeout(60)
def test_a_folder_is_free_after_a_save_though_a_forked_process_holds_its_file(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    opened, kept = os.open, []

    def forking(*args, **kwargs):
        handle = opened(*args, **kwargs)
        kept.append(os.dup(handle))  # what a child of a fork has: another handle, the same lock
        return handle

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", forking)
        filled(1.0).save(tmp_path / "model")
    try:
        other = os.open(tmp_path / "model", os.O_RDONLY)
        kept.append(other)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        for handle in kept:
            os.close(handle)
