"""Saved models load bit for bit; a save that fails at any instant leaves one to load; damage is named."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualform.core.errors import CheckpointError, ConfigError
from dualform.layers.attention import AttentionConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.saving import files
from dualform.models.saving import model as saving
from dualform.models.saving.files import current, replacing, replacing_file
from dualform.models.saving.model import load, save
from dualform.models.tokenizer import ByteTokenizer

FILES = ["config.json", "manifest.json", "model.safetensors"]  # of a saved model
PARTS = {
    "M": (Mamba2Config(d_state=4, d_head=4),),
    "m": (MambaConfig(d_state=3), MLPConfig(d_hidden=5)),
    "A": (AttentionConfig(heads=2, window=3),),
    "L": (LSTMConfig(hidden=3),),
}


def build(pattern="MAA", seed=0, **options):
    torch.manual_seed(seed)
    parts = {letter: PARTS[letter] for letter in dict.fromkeys(pattern)}
    return LanguageModel(ModelConfig(7, 8, parts, pattern, **options))


def same(a, b):
    x, y = a.state_dict(), b.state_dict()
    return a.config == b.config and x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


MODELS = [("MmAL", {}), ("MAMA", {"shared": "A"}), ("A", {"tie_embeddings": False, "norm_eps": 1e-6})]


@pytest.mark.parametrize("pattern, options", MODELS)
def test_round_trip(tmp_path, pattern, options):
    model = build(pattern, **options)
    model.save(tmp_path / "a" / "b")
    again = load(tmp_path / "a" / "b")
    assert same(model, again) and sorted(os.listdir(tmp_path / "a" / "b")) == FILES
    x = torch.randint(7, (2, 5))
    assert torch.equal(model(x)[0], again(x)[0])
    assert all(p.requires_grad and p.is_leaf for p in again.parameters()) and again.training == model.training
    again.loss(x).backward()


def test_shared_tensors_are_stored_once_and_stay_shared(tmp_path):
    model = build("MAMA", shared="A")
    save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == model.parameter_count()
    assert not any(name.startswith(("blocks.3", "head")) for name in stored)
    again = load(tmp_path)
    assert again.blocks[1] is again.blocks[3] and again.parameter_count() == model.parameter_count()


def test_dtypes(tmp_path):
    model = build().bfloat16()
    save(model, tmp_path)
    assert same(load(tmp_path), model)
    assert same(load(tmp_path, dtype=torch.float64), model.double())
    assert {p.dtype for p in load(tmp_path, device="meta", dtype=torch.float16).parameters()} == {torch.float16}


def test_the_config_file_is_for_people(tmp_path):
    save(build(), tmp_path)
    text = (tmp_path / "config.json").read_text()
    about = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert about["format"] == 1 and about["library"].startswith("dualform ")
    assert about["model"]["pattern"] == "MAA" and "\n  " in text


def test_loading_leaves_the_random_stream_alone(tmp_path):
    save(build(), tmp_path)
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    load(tmp_path)
    assert torch.equal(torch.rand(4), want)


def test_a_loaded_model_does_not_depend_on_the_file(tmp_path):
    model = build()
    save(model, tmp_path)
    again = load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    assert same(model, again)


def test_saving_over_another_model_keeps_what_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tokenizer.json").write_text("{}")
    save(build("MA"), tmp_path)
    save(build("mL"), tmp_path, ByteTokenizer())
    assert same(load(tmp_path), build("mL"))
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "tokenizer.json").read_text() == "{}"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


# --- failures while saving ---


class Words:
    """A tokenizer, as far as saving knows one."""

    def __init__(self, text):
        self.text = text

    def to_json(self):
        return self.text


class Kill(BaseException):
    """The process ends here."""


class Saboteur:
    """Counts every touch of the disk while a model is saved, and makes one of them fail."""

    def __init__(self, monkeypatch, at, error):
        self.at, self.error, self.step, self.committed = at, error, 0, False
        for owner, name in (
            (files.os, "replace"),
            (files.os, "fsync"),
            (files.Path, "mkdir"),
            (files.Path, "rmdir"),
            (files.Path, "write_text"),
            (saving, "save_file"),
            (files.shutil, "rmtree"),
            (files.Path, "unlink"),
        ):
            monkeypatch.setattr(owner, name, self.wrap(name, getattr(owner, name)))

    def wrap(self, name, real):
        def touch(*args, **kwargs):
            dead = self.step > self.at and self.error is Kill  # a killed process cleans nothing up
            if name in ("rmtree", "unlink"):
                return None if dead else real(*args, **kwargs)
            self.step += 1
            if dead or self.step - 1 == self.at:
                if name in ("write_text", "save_file"):  # half of it reaches the disk
                    path = args[1] if name == "save_file" else args[0]
                    with open(path, "wb") as file:
                        file.write(b"half")
                raise Kill if self.error is Kill else OSError(28, "No space left on device")
            result = real(*args, **kwargs)
            self.committed |= name == "replace" and args[1].name == ".committed"
            return result

        return touch


def count_steps(folder):
    with pytest.MonkeyPatch.context() as patch:
        saboteur = Saboteur(patch, 10**9, Kill)
        save(build("mL", seed=2), folder, Words("new"))
    return saboteur.step


@pytest.mark.parametrize("error", [OSError, Kill])
def test_a_failure_at_any_step_leaves_the_old_or_the_new_model(tmp_path, error):
    old, new = build("MAA", seed=1), build("mL", seed=2)
    save(old, tmp_path / "trial", Words("old"))
    steps = count_steps(tmp_path / "trial")
    assert steps > 10
    outcomes = []
    for at in range(steps):
        folder = tmp_path / f"{at}"
        save(old, folder, Words("old"))
        with pytest.MonkeyPatch.context() as patch:
            saboteur = Saboteur(patch, at, error)
            with pytest.raises(Kill if error is Kill else CheckpointError) as failure:
                save(new, folder, Words("new"))
        if error is OSError:
            message = "saved, but not all files" if saboteur.committed else "cannot save.*\n.*still loads"
            assert failure.match(message) and failure.match("No space left on device")
        want, word = (new, "new") if saboteur.committed else (old, "old")
        assert same(load(folder, verify=True), want), f"step {at}"
        assert current(folder, "tokenizer.json").read_text() == word
        outcomes.append(saboteur.committed)
        save(new, folder, Words("newer"))  # and the next one succeeds, and cleans up
        assert same(load(folder, verify=True), new) and (folder / "tokenizer.json").read_text() == "newer"
        assert sorted(os.listdir(folder)) == [*FILES, "tokenizer.json"]
    assert outcomes == sorted(outcomes) and 0 < sum(outcomes) < steps  # one instant, between old and new


def test_a_real_limit_of_the_disk(tmp_path):
    resource = pytest.importorskip("resource")
    old = build("MAA", seed=1)
    save(old, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot save"):
            save(build("mL"), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same(load(tmp_path), old) and sorted(os.listdir(tmp_path)) == FILES


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot save: (File exists|Not a directory)"):
        save(build(), tmp_path / "file")


def test_replacing_is_undone_by_an_exception_of_the_writer(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyError), replacing(tmp_path) as new:
        (new / "a").write_text("new")
        raise KeyError
    with pytest.raises(KeyError), replacing_file(tmp_path / "a") as new:
        new.write_text("new")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_replacing_a_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a"
    with replacing_file(path) as new:
        new.write_text("first")
    monkeypatch.setattr(files.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CheckpointError, match="No space left"), replacing_file(path) as new:
        new.write_text("second")
    assert path.read_text() == "first" and os.listdir(path.parent) == ["a"]


HOLDS = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.readline()
"""


@contextmanager
def held(folder):
    """Another process moves the files of a folder, and does not end before a line comes."""
    with subprocess.Popen([sys.executable, "-c", HOLDS, folder], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.skipif(files.fcntl is None, reason="no locks on Windows")
def test_a_save_does_not_wait_for_ever(tmp_path, monkeypatch):
    assert files._PATIENCE == 60
    old = build(seed=1)
    save(old, tmp_path)
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    with held(tmp_path):
        message = f"{re.escape(str(tmp_path))}: cannot save: another process has held this folder for 0.1 seconds"
        with pytest.raises(CheckpointError, match=rf"{message}\n.*end that process"):
            save(build(), tmp_path)
        assert same(load(tmp_path), old) and sorted(os.listdir(tmp_path)) == FILES


@pytest.mark.skipif(files.fcntl is None, reason="no locks on Windows")
def test_a_save_waits_for_another_process(tmp_path, monkeypatch):
    save(build(seed=1), tmp_path)
    with held(tmp_path) as process:
        waits = []

        def pause(seconds):
            waits.append(seconds)
            if len(waits) == 3:
                process.communicate("\n")

        monkeypatch.setattr(files.time, "sleep", pause)
        save(build(), tmp_path)
    assert len(waits) >= 3 and same(load(tmp_path), build())


# --- damage ---


@pytest.fixture
def saved(tmp_path):
    save(build(), tmp_path / "model")
    return tmp_path / "model"


def refused(folder, message, error=CheckpointError):
    with pytest.raises(error, match=message):
        load(folder)


def test_no_folder(tmp_path, saved, monkeypatch):
    refused(tmp_path / "nowhere", "nowhere: no such folder")
    refused(saved / "config.json", r"a file, expected the folder(.|\n)*try .*model")
    monkeypatch.chdir(tmp_path)
    refused("nobody/nothing", r"nobody/nothing: no such folder here, and not loaded from the Hugging Face Hub")


def test_no_config(saved):
    (saved / "config.json").unlink()
    refused(saved, "no config.json")


@pytest.mark.parametrize("text", ["", "{", "\ufffd", '{"a": 1}', "[]", "3"])
def test_unreadable_config(saved, text):
    (saved / "config.json").write_text(text)
    refused(saved, "cannot be read|not a config of this library")


def test_bytes_that_are_no_text(saved):
    (saved / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(saved, "cannot be read")


def test_foreign_config(saved):
    (saved / "config.json").write_text('{"model_type": "gemma9", "hidden_size": 8}')
    refused(saved, r"model_type is 'gemma9', which is not in the tables\n.*mamba, mamba2")


def edit(folder, change):
    path = folder / "config.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def test_later_format(saved):
    edit(saved, lambda about: about.update(format=2, library="dualform 9.9"))
    refused(saved, "format 2 of dualform 9.9, expected 1\n.*upgrade")


def test_unknown_and_missing_config_keys(saved):
    edit(saved, lambda about: about["model"].update(d_modell=3))
    refused(saved, r"config.json: model: unknown key 'd_modell'", ConfigError)
    edit(saved, lambda about: (about["model"].pop("d_modell"), about["model"].pop("pattern")))
    refused(saved, "missing key pattern", ConfigError)


def test_no_weights(saved):
    (saved / "model.safetensors").unlink()
    refused(saved, "no model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights(saved, keep):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(saved, "model.safetensors: cannot be read.*\n.*truncated")


def tensors(folder, change):
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors")


def test_wrong_tensors_are_named(saved):
    tensors(saved, lambda held: held.update(extra=torch.zeros(1)))
    refused(saved, "1 too many, first 'extra'")
    tensors(saved, lambda held: (held.pop("norm.weight"), held.pop("embed.weight")))
    refused(saved, "2 missing, first 'embed.weight'; 1 too many, first 'extra'")
    tensors(saved, lambda held: (held.pop("extra"), held.update({"norm.weight": torch.ones(8)})))
    refused(saved, "1 missing, first 'embed.weight'")
    tensors(saved, lambda held: held.update({"embed.weight": torch.ones(8, 7)}))
    refused(saved, r"embed.weight has shape \(8, 7\), expected \(7, 8\)\n.*another model")
    tensors(saved, lambda held: held.update({"embed.weight": torch.ones(7, 8, dtype=torch.int64)}))
    refused(saved, "embed.weight is I64, expected torch.float32")


def test_weights_of_another_config(saved, tmp_path):
    save(build("mL"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", saved)
    refused(saved, r"missing.*too many")


def test_nothing_is_left_behind_by_a_refusal(saved):
    before = {p: p.stat().st_mtime_ns for p in Path(saved).iterdir()}
    tensors(saved, lambda held: held.update(extra=torch.zeros(1)))
    refused(saved, "extra")
    assert {p.name for p in Path(saved).iterdir()} == {p.name for p in before}
