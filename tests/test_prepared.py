"""Prepared tokens are what was written, or a sentence: sizes every time, digests once, and a file cut short later."""

import json
import shutil

import numpy as np
import pytest

from dualform.core.errors import DataError
from dualform.models.tokenizer import ByteTokenizer
from dualform.train import prepared
from dualform.train.data import open_dataset, prepare
from dualform.train.loop import train
from dualform.train.mapped import Mapped
from dualform.train.packed import Packed
from dualform.train.recipe import Data, Recipe

NAMES = ["about.json", "held_out.ids", "held_out.nbytes", "held_out.starts", "train.ids", "train.starts"]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i:02}.txt").write_text(f"file {i}\n" + "some words here\n" * 200)
    return Data(path=str(tmp_path / "text"), length=16, held_out=4, packed=True)


@pytest.fixture
def folder(data, tmp_path):
    prepare(data, ByteTokenizer(), tmp_path / "run" / "data")
    return tmp_path / "run" / "data"


def opened(data, folder):
    return open_dataset(data, ByteTokenizer(), folder)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_the_folder_lists_its_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted([*NAMES, "manifest.json"])
    assert sorted(json.loads((folder / "manifest.json").read_text())["files"]) == NAMES
    assert sorted(path.name for path in folder.parent.iterdir()) == ["data"]


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("name", NAMES[1:])
def test_a_file_cut_short_is_named(data, folder, name, manifest):
    if not manifest:
        (folder / "manifest.json").unlink()
    content = (folder / name).read_bytes()
    for keep in (0, len(content) // 16 * 8, len(content) - 1):
        (folder / name).write_bytes(content[:keep])
        with pytest.raises(DataError, match=rf"{name}: [\d,]+ bytes, but about.json speaks of [\d,]+"):
            opened(data, folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: cannot be read: No such file"):
        opened(data, folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_byte_is_named(data, folder, name):
    flip(folder / name, -3)
    with pytest.raises(DataError, match=f"{name}"):
        opened(data, folder)
    flip(folder / name, -3)
    assert len(opened(data, folder).train) > 1000


def test_digests_are_compared_once_for_each_time_of_writing(data, folder, monkeypatch):
    calls = []
    real = prepared.check_numbers
    monkeypatch.setattr(prepared, "check_numbers", lambda *args: (calls.append(args), real(*args)))
    monkeypatch.setattr(prepared, "_TICK", -1)
    opened(data, folder), opened(data, folder)
    assert len(calls) == 1
    (folder / "train.ids").touch()
    opened(data, folder), opened(data, folder)
    assert len(calls) == 2
    shutil.copytree(folder, folder.with_name("copy"))
    opened(data, folder.with_name("copy")), opened(data, folder.with_name("copy"))
    assert len(calls) == 3
    monkeypatch.undo()
    monkeypatch.setattr(prepared, "check_numbers", lambda *args: calls.append(args))
    opened(data, folder)  # what was noted too soon after a write is not trusted: times are coarse
    assert len(calls) == 4


def test_data_of_older_versions_opens_and_its_numbers_are_looked_at(data, folder):
    (folder / "manifest.json").unlink()
    about = json.loads((folder / "about.json").read_text())
    assert len(opened(data, folder).train) == about["train"]["tokens"]
    nbytes = np.fromfile(folder / "held_out.nbytes", np.uint32)
    nbytes[3] += 1
    nbytes.tofile(folder / "held_out.nbytes")
    with pytest.raises(DataError, match=r"nbytes: sums to \d+ bytes, but \d+ were held out"):
        opened(data, folder)


def test_tokens_outside_of_the_vocabulary_are_refused(folder):
    about = prepared.read_about(folder)
    with pytest.raises(DataError, match=r"train.ids: token 119; the vocabulary is 0 to 99"):
        prepared.check_numbers(folder, about, 100)


@pytest.mark.parametrize(
    "change", [lambda s: s[::-1], lambda s: s + 1, lambda s: np.append(s[:-1], 10**9), np.negative]
)
def test_starts_rise_inside_of_the_tokens(data, folder, change):
    (folder / "manifest.json").unlink()
    starts = np.fromfile(folder / "train.starts", np.int64)
    change(starts).astype(np.int64).tofile(folder / "train.starts")
    with pytest.raises(DataError, match=r"train.starts: not places that rise from 0 to \d+"):
        opened(data, folder)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda a: a.pop("dtype"), "'dtype' is missing"),
        (lambda a: a.update(dtype="float64"), "dtype is 'float64', expected uint8"),
        (lambda a: a.update(dtype="uint16"), r"train.ids: [\d,]+ bytes, but about.json speaks of"),
        (lambda a: a.update(source=[]), "source is"),
        (lambda a: a.update(train=3), "train is 3"),
        (lambda a: a["train"].update(tokens=10**30), "tokens"),
        (lambda a: a["train"].update(bytes=0), "train.bytes is 0, expected at least 1"),
        (lambda a: a["train"].update(documents=True), "documents is True"),
        (lambda a: a["held_out"].pop("bytes"), "'bytes' is missing"),
        (lambda a: a.update(gzip="2"), "gzip is '2'"),
        (lambda a: a.update(xz=-1.0), "xz is -1.0, expected 0 or more"),
        (lambda a: a.update(skipped=-1), "skipped is -1"),
    ],
)
def test_what_is_wrong_in_about_is_named(data, folder, change, said):
    about = json.loads((folder / "about.json").read_text())
    change(about)
    (folder / "about.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=said):
        opened(data, folder)


def test_a_file_that_is_cut_while_it_is_mapped_is_an_error_and_no_signal(data, folder):
    whole = Data(path=data.path, length=16, held_out=4)
    dataset = opened(data, folder)
    packed = Packed(dataset.train, dataset.train_starts, data.length, 0)
    next(dataset.windows(whole, 0, 0)), next(packed.portions(data, 0))
    with (folder / "train.ids").open("r+b") as file:
        file.truncate(10)
    for touch in (dataset.windows(whole, 0, 0), packed.portions(data, 0)):
        with pytest.raises(DataError, match=r"train.ids: 10 bytes, but [\d,]+ when it was opened: it was cut short"):
            next(touch)


def test_mapped_arrays_are_read_only(tmp_path):
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "a")
    array = Mapped.open(tmp_path / "a", np.uint16)
    assert array[[3, 1]].tolist() == [3, 1] and array[3] == 3 and array[2:4].tolist() == [2, 3] and len(array) == 10
    for target in (array, array[2:4]):
        with pytest.raises(ValueError, match="read-only"):
            target[0] = 1


def test_prepared_data_is_replaced_and_nothing_else_is_removed(data, folder):
    before = opened(data, folder).train[:100].tobytes()
    prepare(data, ByteTokenizer(), folder)
    assert opened(data, folder).train[:100].tobytes() == before
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds 'thesis.txt', not of a run\n.*another folder"):
        prepare(data, ByteTokenizer(), folder)
    assert (folder / "thesis.txt").read_text() == "mine" and (folder / "train.ids").exists()


def test_a_run_that_cannot_begin_leaves_the_files_of_others(data, folder):
    (folder / "thesis.txt").write_text("mine")
    recipe = Recipe(out=str(folder.parent), steps=1, data=data)
    with pytest.raises(DataError, match=r"holds 'thesis.txt'"):
        train(recipe)
    assert (folder / "thesis.txt").read_text() == "mine" and (folder / "train.ids").exists()
