"""What was saved is what is loaded: sizes always, digests on request, and many processes that save to one place."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from dualform.core.errors import CheckpointError
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.saving import incoming as incoming_module
from dualform.models.saving.digest import file_digest, tensors_digest
from dualform.models.saving.files import creating, replacing, replacing_file
from dualform.models.saving.manifest import read_manifest
from dualform.models.saving.model import load, save
from dualform.models.saving.state import load_state, save_state


def build(seed=0):
    torch.manual_seed(seed)
    return LanguageModel(ModelConfig(7, 8, {"M": (Mamba2Config(d_state=4, d_head=4),)}, "M"))


def same(a, b):
    x, y = a.state_dict(), b.state_dict()
    return all(torch.equal(x[name], y[name]) for name in x)


@pytest.fixture
def saved(tmp_path):
    save(build(), tmp_path / "model")
    return tmp_path / "model"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- folders ---


def test_a_manifest_lists_what_was_saved(saved):
    about = json.loads((saved / "manifest.json").read_text())
    assert about["format"] == 1 and about["digest"] == "xxh3-128"
    for name in ("config.json", "model.safetensors"):
        data = (saved / name).read_bytes()
        assert about["files"].pop(name) == {"bytes": len(data), "digest": file_digest(saved / name)}
    assert not about["files"]


def test_a_digest_is_that_of_the_library(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    assert file_digest(tmp_path / "a") == "99aa06d3014798d86001c324468d497f"  # XXH3, 128 bits, of nothing
    (tmp_path / "a").write_bytes(b"x" * (2**20 + 1))
    whole = file_digest(tmp_path / "a")
    flip(tmp_path / "a", 2**20)
    assert file_digest(tmp_path / "a") != whole


def test_a_flipped_byte_of_a_weight_is_found_on_request(saved):
    flip(saved / "model.safetensors", -1)
    assert not same(load(saved), build())
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged: its digest is \w{32}.*\n.*copy or save"):
        load(saved, verify=True)
    save(build(), saved)
    assert same(load(saved, verify=True), build())


def test_sizes_are_always_compared(saved):
    with (saved / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError, match=r"config.json: [\d,]+ bytes, but [\d,]+ were saved") as error:
        load(saved)
    assert "delete the manifest.json" in str(error.value)
    (saved / "manifest.json").unlink()
    assert same(load(saved), build())


def test_a_file_that_is_gone_is_named(saved):
    save(build(), saved, Words("{}"))
    (saved / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json: missing, but listed in manifest.json"):
        load(saved)


def test_a_folder_without_a_manifest_loads_unless_it_is_to_be_verified(saved):
    (saved / "manifest.json").unlink()
    assert same(load(saved), build())
    with pytest.raises(CheckpointError, match=r"no manifest.json, so there are no digests"):
        load(saved, verify=True)


class Words:
    def __init__(self, text):
        self.text = text

    def to_json(self):
        return self.text


def test_files_that_stay_stay_listed(saved):
    save(build(), saved, Words("{}"))
    save(build(1), saved)
    assert read_manifest(saved / "manifest.json").keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    flip(saved / "tokenizer.json", 0)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: damaged"):
        load(saved, verify=True)
    (saved / "tokenizer.json").unlink()
    save(build(1), saved)
    assert read_manifest(saved / "manifest.json").keys() == {"config.json", "model.safetensors"}


def test_a_damaged_manifest_does_not_stand_in_the_way_of_saving(saved):
    (saved / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest.json: cannot be read as JSON"):
        load(saved)
    save(build(1), saved)
    assert same(load(saved, verify=True), build(1))


GOOD = {"bytes": 3, "digest": "0" * 32}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"format": 2}, "format is 2, expected 1"),
        ({"format": "1"}, "format is '1', expected a whole number"),
        ({"digest": "sha256"}, "digest is 'sha256', expected 'xxh3-128'"),
        ({"files": []}, r"files is \[\], expected an object"),
        ({"files": {"../secret": GOOD}}, "'../secret': not the name of a file in this folder"),
        ({"files": {"a": 3}}, "'a': is 3, expected bytes and digest"),
        ({"files": {"a": GOOD | {"bytes": -1}}}, "'a': -1 bytes"),
        ({"files": {"a": GOOD | {"bytes": "3"}}}, "bytes is '3', expected a whole number"),
        ({"files": {"a": GOOD | {"digest": "0" * 31 + "g"}}}, "32 hexadecimal digits"),
        ({"files": {"a": {"bytes": 3}}}, "'digest' is missing"),
    ],
)
def test_a_manifest_is_read_with_care(tmp_path, change, said):
    about = {"format": 1, "digest": "xxh3-128", "files": {"a": GOOD}} | change
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=said) as error:
        read_manifest(tmp_path / "manifest.json")
    assert str(tmp_path / "manifest.json") in str(error.value)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), creating(tmp_path / "new") as new:
        (new / "a").write_text("half")
        raise KeyError
    assert not os.listdir(tmp_path)
    with creating(tmp_path / "new") as new:
        (new / "a").write_text("whole")
        (new / "inside").mkdir()
        assert not (tmp_path / "new").exists()
    assert sorted(os.listdir(tmp_path / "new")) == ["a", "inside", "manifest.json"] and os.listdir(tmp_path) == ["new"]
    assert read_manifest(tmp_path / "new" / "manifest.json").keys() == {"a"}
    with pytest.raises(CheckpointError, match="new: is there already"), creating(tmp_path / "new") as new:
        (new / "a").write_text("another")
    assert (tmp_path / "new" / "a").read_text() == "whole"


# --- states ---


def test_every_byte_of_a_state_counts(tmp_path):
    state = (torch.arange(3.0)[None], torch.tensor([2]))
    save_state(state, tmp_path / "s", {"model": "this one"})
    data = (tmp_path / "s").read_bytes()
    for at in range(8, len(data)):
        flip(tmp_path / "s", at)
        with pytest.raises(CheckpointError):
            load_state(tmp_path / "s", state)
        (tmp_path / "s").write_bytes(data)
    load_state(tmp_path / "s", state)


def test_a_digest_depends_on_names_dtypes_shapes_bytes_and_words():
    tensors, words = {"a": torch.ones(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}, {"k": "v"}
    others = [
        ({"c": tensors["a"], "b": tensors["b"]}, words),
        (tensors | {"a": torch.ones(3, 2)}, words),
        (tensors | {"a": torch.ones(2, 3).view(torch.int32)}, words),
        (tensors | {"a": torch.ones(2, 3).mul(2)}, words),
        (tensors, {"k": "w"}),
        (tensors, {}),
    ]
    want = tensors_digest(tensors, words)
    assert want == tensors_digest(dict(reversed(tensors.items())), words)
    assert len({want, *(tensors_digest(*other) for other in others)}) == 7


def test_states_of_the_first_format_have_no_digest_and_load(tmp_path):
    save_file({"state": torch.ones(2)}, tmp_path / "s", metadata={"dualform_state": "1", "word": "kept"})
    assert torch.equal(load_state(tmp_path / "s", torch.zeros(2)), torch.ones(2))
    save_file({"state": torch.ones(2)}, tmp_path / "s", metadata={"dualform_state": "2"})
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(tmp_path / "s", torch.zeros(2))


def test_a_length_below_zero_is_refused(tmp_path):
    layer = AttentionConfig(heads=2).build(4)
    state = layer.init_state(1, max_len=2)
    save_state(state._replace(length=state.length - 1), tmp_path / "s")
    with pytest.raises(CheckpointError, match="length is -1, expected 0 or more"):
        load_state(tmp_path / "s", state)


# --- who may read, and who writes ---


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        save(build(), tmp_path / "model")
        save_state(build().init_state(1), tmp_path / "model" / "a.state")
        with creating(tmp_path / "new") as new:
            (new / "a").touch(mode=0o600)
    finally:
        os.umask(before)
    found = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()}
    assert found and set(found.values()) == {mode}, found


def test_threads_that_save_to_one_file(tmp_path):
    states, failures = [torch.full((64,), float(i)) for i in range(4)], []

    def work(state):
        try:
            for _ in range(8):
                save_state(state, tmp_path / "s")
        except CheckpointError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(state,)) for state in states]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not failures and os.listdir(tmp_path) == ["s"]
    found = load_state(tmp_path / "s", states[0])
    assert any(torch.equal(found, state) for state in states)


def write_many(place, number):
    for _ in range(10):
        with replacing_file(place / "file") as new:
            new.write_text(number * 1000)
        with replacing(place / "folder") as new:
            for name in "ab":
                (new / name).write_text(number * 1000)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_processes_that_save_to_one_place(tmp_path):
    context = multiprocessing.get_context("fork")
    run = [context.Process(target=write_many, args=(tmp_path, str(n))) for n in range(4)]
    for process in run:
        process.start()
    for process in run:
        process.join()
    assert [process.exitcode for process in run] == [0, 0, 0, 0]
    texts = [(tmp_path / name).read_text() for name in ("file", "folder/a", "folder/b")]
    assert all(text in ("0" * 1000, "1" * 1000, "2" * 1000, "3" * 1000) for text in texts) and texts[1] == texts[2]
    for name, entry in read_manifest(tmp_path / "folder" / "manifest.json").items():
        assert entry.digest == file_digest(tmp_path / "folder" / name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "file", "folder", "manifest.json"]


def test_what_the_dead_left_is_removed_and_what_the_living_write_is_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here, machine = os.getpid(), incoming_module._machine()
    stale = [f".s.{machine}-{ended.pid}-00000000.incoming", f".s.{machine}-{here}-00000001.incoming", ".s.incoming"]
    kept = [
        f".s.{machine}-{os.getppid()}-00000000.incoming",  # a process that lives
        f".s.00000000-{ended.pid}-00000000.incoming",  # of another machine, and recent
        f".t.{machine}-{ended.pid}-00000000.incoming",  # of another file
        ".s.my own.incoming", "s.incoming", ".s.incoming.bak",  # of a user
    ]  # fmt: skip
    old = f".s.00000000-{ended.pid}-00000001.incoming"
    for name in [*stale, *kept, old]:
        (tmp_path / name).write_text("x")
    os.utime(tmp_path / old, (0, 0))
    with replacing_file(tmp_path / "s") as one:
        one.write_text("1")
        with replacing_file(tmp_path / "s") as other:  # while the first is still writing
            other.write_text("2")
        assert one.exists()
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "s"]) and (tmp_path / "s").read_text() == "1"


def test_a_name_of_any_length_has_room(tmp_path):
    name = "é" * 120
    save_state(torch.ones(1), tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_a_folder_of_an_interrupted_move_is_whole(saved):
    """A kill between the commit and the last move: what counts lies in ``.committed``."""
    other = saved.with_name("other")
    save(build(1), other)
    shutil.copytree(other, saved / ".committed")
    os.replace(saved / ".committed" / "config.json", saved / "config.json")
    assert same(load(saved, verify=True), build(1))
    with replacing(saved) as new:
        (new / "notes").write_text("x")
    assert same(load(saved, verify=True), build(1))
    assert read_manifest(saved / "manifest.json").keys() == {"config.json", "model.safetensors", "notes"}
