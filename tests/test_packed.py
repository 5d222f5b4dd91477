"""Packed training: whole documents, every token predicted once an epoch, and no state across a border."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import dualform
from dualform.core.errors import DataError
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.tokenizer import ByteTokenizer
from dualform.train.data import Dataset, open_dataset, prepare
from dualform.train.evaluate import bits_per_byte
from dualform.train.loop import train
from dualform.train.objective import Objective
from dualform.train.packed import Packed, Sequences
from dualform.train.recipe import Data, Optim, Recipe
from dualform.train.report import read_metrics

QUIET = Console(quiet=True)
LENGTHS = [3, 9, 1, 25, 7, 8, 40, 2, 5, 5]  # of documents, with their separator, which is 0
HYBRID = {"M": (Mamba2Config(d_state=4, d_head=4),), "A": (AttentionConfig(heads=2, window=8),)}


def documents(vocab=11, seed=0):
    random = np.random.default_rng(seed)
    texts = [np.concatenate([[0], random.integers(1, vocab, n - 1)]) for n in LENGTHS]
    starts = np.cumsum([0, *LENGTHS[:-1]])
    return texts, np.concatenate(texts).astype(np.uint16), starts


def sequences_of(portion):
    borders = portion.cu_seqlens.tolist()
    return [tuple(portion.tokens[0, a:b].tolist()) for a, b in pairwise(borders)]


def epoch(packed, data, ranks=1):
    """The sequences of the first steps that predict as many tokens as there are, and how many those are."""
    seen, predicted, step = [], 0, 0
    while predicted < sum(LENGTHS):
        for rank in range(ranks):
            seen += [s for portion in packed.portions(data, step, rank, ranks) for s in sequences_of(portion)]
        predicted, step = predicted + packed.predicted(data, step), step + 1
    return seen, predicted


def test_an_epoch_is_every_document_whole_and_its_end():
    texts, ids, starts = documents()
    seen, predicted = epoch(Packed(ids, starts, 40, seed=3), Data(length=40, batch=1))
    assert sorted(seen) == sorted((*text.tolist(), 0) for text in texts)
    assert predicted == sum(LENGTHS) == sum(len(s) - 1 for s in seen)


def test_a_document_longer_than_a_window_is_cut_and_each_token_is_predicted_once():
    texts, ids, starts = documents()
    seen, predicted = epoch(Packed(ids, starts, 10, seed=3), Data(length=10, batch=1))
    want = []
    for text in texts:
        whole = [*text.tolist(), 0]
        want += [tuple(whole[at : at + 11]) for at in range(0, len(whole) - 1, 10)]
    assert sorted(seen) == sorted(want) and predicted == sum(LENGTHS)


def test_windows_hold_no_more_than_they_can_and_orders_follow_from_seed_and_epoch():
    _, ids, starts = documents()
    data, packed = Data(length=12, batch=1), Packed(ids, starts, 12, seed=0)
    lines = [next(packed.portions(data, step)).tokens[0].tolist() for step in range(40)]
    assert all(len(line) <= 13 for line in lines)
    again = Packed(ids, starts, 12, seed=0)
    assert [next(again.portions(data, step)).tokens[0].tolist() for step in reversed(range(40))] == lines[::-1]
    count = len(packed._windows)
    assert sorted(lines[:count]) == sorted(lines[count : 2 * count]) and lines[:count] != lines[count : 2 * count]
    other = Packed(ids, starts, 12, seed=1)
    assert [next(other.portions(data, step)).tokens[0].tolist() for step in range(40)] != lines


@pytest.mark.parametrize("ranks, accumulate", [(1, 3), (2, 1), (2, 3), (6, 1)])
def test_processes_and_portions_share_a_step(ranks, accumulate):
    _, ids, starts = documents()
    packed, data = Packed(ids, starts, 12, seed=0), Data(length=12, batch=6)
    (whole,) = packed.portions(data, 2)
    assert whole.share == 1
    parts = [p for rank in range(ranks) for p in packed.portions(replace(data, accumulate=accumulate), 2, rank, ranks)]
    assert len(parts) == ranks * accumulate
    assert sorted(s for part in parts for s in sequences_of(part)) == sorted(sequences_of(whole))
    torch.manual_seed(0)
    objective = Objective(LanguageModel(ModelConfig(11, 8, HYBRID, "MA")).double())
    mean = sum(objective(p.tokens, p.cu_seqlens) * p.share for p in parts) / len(parts)
    torch.testing.assert_close(mean, objective(whole.tokens, whole.cu_seqlens))


def test_the_loss_is_that_of_every_document_alone():
    _, ids, starts = documents()
    (portion,) = Packed(ids, starts, 40, seed=0).portions(Data(length=40, batch=3), 0)
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(11, 8, HYBRID, "MA")).double()
    alone = []
    for sequence in map(torch.tensor, sequences_of(portion)):
        alone.append(F.cross_entropy(model(sequence[None, :-1])[0][0], sequence[1:], reduction="none"))
    assert len(alone) > 1
    torch.testing.assert_close(Objective(model)(portion.tokens, portion.cu_seqlens), torch.cat(alone).mean())


@pytest.mark.parametrize("parts", [{"M": HYBRID["M"]}, {"A": (AttentionConfig(heads=2),)}])
def test_held_out_documents_are_read_by_themselves(parts):
    texts, ids, starts = documents(seed=5)
    nbytes = (ids > 0).astype(np.uint32) * 2
    dataset = Dataset(np.zeros(0), ids, nbytes, {}, held_out_starts=starts)
    torch.manual_seed(1)
    model = LanguageModel(ModelConfig(11, 8, parts, "".join(parts))).double()
    nats, length = [], 10 if "A" in parts else 1000
    for text in texts:
        whole = torch.tensor([*text.tolist(), 0])
        for at in range(0, len(text), length):
            piece = whole[at : at + length + 1]
            nats.append(F.cross_entropy(model(piece[None, :-1])[0][0], piece[1:], reduction="none").detach())
    want = torch.cat(nats).sum() / math.log(2) / nbytes.sum()
    found = bits_per_byte(model, dataset, length=10, packed=True)
    assert found == pytest.approx(want.item(), rel=1e-6)


# --- runs ---


@pytest.fixture
def recipe(tmp_path):
    folder, random = tmp_path / "text", np.random.default_rng(0)
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text("the cat sat\n" * random.integers(1, 5))
    return Recipe(
        model=ModelConfig(256, 8, HYBRID, "MA").to_dict(),
        out=str(tmp_path / "run"),
        steps=8,
        save_every=3,
        log_every=2,
        device="cpu",
        data=Data(path=str(folder), held_out=6, length=24, batch=4, packed=True),
        optim=Optim(lr=0.02, warmup=2),
    )


def losses(out):
    return [row["loss"] for row in read_metrics(out) if row["kind"] == "train"]


def test_a_packed_run_that_is_resumed_is_the_unbroken_run(recipe, tmp_path, monkeypatch):
    whole = train(recipe, console=QUIET)
    broken, portions = replace(recipe, out=str(tmp_path / "broken")), Packed.portions

    def failing(self, data, step, *ranks):
        if step == 5:
            raise OSError("the lights went out")
        return portions(self, data, step, *ranks)

    monkeypatch.setattr(Packed, "portions", failing)
    with pytest.raises(OSError):
        train(broken, console=QUIET)
    monkeypatch.undo()
    resumed = train(Recipe.load(broken.out), resume=True, console=QUIET)
    assert losses(whole) == losses(resumed) and len(losses(whole)) == 4
    one, two = (dualform.load(Path(folder) / "model").state_dict() for folder in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    halves = replace(recipe, out=str(tmp_path / "halves"), data=replace(recipe.data, accumulate=2))
    assert losses(train(halves, console=QUIET)) == pytest.approx(losses(whole), rel=1e-4)


def test_a_packed_run_counts_what_it_predicts(recipe):
    out = train(recipe, console=QUIET)
    dataset = open_dataset(recipe.data, ByteTokenizer(), out / "data")
    packed = Packed(dataset.train, dataset.train_starts, 24, recipe.seed)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tokens"] == sum(packed.predicted(recipe.data, step) for step in range(8)) < 8 * 4 * 24
    held = bits_per_byte(dualform.load(out / "model"), dataset, length=24, packed=True)
    assert summary["bits_per_byte"] == pytest.approx(held, rel=1e-6)


def test_borders_are_kept_beside_the_tokens(tmp_path):
    (tmp_path / "text").mkdir()
    for name in "abcdefgh":
        (tmp_path / "text" / name).write_text(name * 5)
    data = Data(path=str(tmp_path / "text"), separator="\n\n", length=100, packed=True)
    prepare(data, ByteTokenizer(), tmp_path / "data")  # fewer tokens than one window, and none is needed
    dataset = open_dataset(data, ByteTokenizer(), tmp_path / "data")
    for ids, starts in ((dataset.train, dataset.train_starts), (dataset.held_out, dataset.held_out_starts)):
        assert starts.tolist() == list(range(0, len(ids), 7)) and bytes(ids[:3]).startswith(b"\n\n")
    chosen = Sequences(dataset.train, dataset.train_starts, 100).line(np.array([0]))
    assert bytes(chosen[0][0].tolist()) in {b"\n\n" + 5 * c.encode() + b"\n" for c in "abcdefgh"}
    with pytest.raises(DataError, match="fewer than one window"):
        prepare(replace(data, packed=False), ByteTokenizer(), tmp_path / "data")


def test_a_checkpoint_without_the_newest_keys_resumes(recipe):
    """A recipe grows; a checkpoint written before has the default of what it does not name."""
    plain = replace(recipe, data=replace(recipe.data, packed=False))
    out = train(plain, console=QUIET)
    for file in (out / "checkpoints").glob("*/run.json"):
        about = json.loads(file.read_text())
        del about["recipe"]["data"]["packed"], about["recipe"]["graphs"]
        file.write_text(json.dumps(about))
        (file.parent / "manifest.json").unlink()  # which came later than those keys
    train(replace(plain, steps=10), resume=True, console=QUIET)
    assert len(losses(out)) == 5
