"""``dualform eval``: bits per byte and perplexity against the loss of the whole text."""

import json
import math

import pytest
import torch

from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.train import evaluate
from dualform.train.data import whole_text
from dualform.train.recipe import Data

TEXTS = {"a.txt": "To be, or not to be: that is the question.\n" * 3, "b.txt": "Whether 'tis nobler in the mind é\n"}
PARTS = {"M": (Mamba2Config(d_state=4, d_head=8),), "A": (AttentionConfig(heads=2),)}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    return folder


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    lm = LanguageModel(ModelConfig(256, 16, PARTS, "M"))
    lm.save(tmp_path / "model")
    return lm


def nats(model, text):
    tokens = torch.tensor([list(text.encode())])
    with torch.no_grad():
        return model.loss(tokens).item() * (tokens.shape[1] - 1)


@pytest.mark.parametrize("together", [7, 4096])
def test_a_text_is_read_from_its_beginning_to_its_end(dualform, model, corpus, tmp_path, monkeypatch, together):
    monkeypatch.setattr(evaluate, "_TOGETHER", together)
    told = dualform("eval", tmp_path / "model", "--set", f"data.path={corpus}", "--json")
    found = json.loads(told[1])
    whole = "".join(f"\n{text}" for text in TEXTS.values())
    size = len(whole.encode())
    want = nats(model, whole)
    assert told[0] == 0 and (found["bytes"], found["tokens"], found["documents"]) == (size - 2, size - 1, 2)
    assert found["nats"] == pytest.approx(want, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(want / math.log(2) / (size - 2), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(want / (size - 1)), rel=1e-5)
    code, out, err = dualform("eval", tmp_path / "model", "--set", f"data.path={corpus}")
    assert code == 0 and f"{found['bits_per_byte']:.4f} bits per byte" in out and not err
    assert "2 documents; passed over 1 files that are not text" in out


def test_documents_by_themselves(dualform, model, corpus, tmp_path):
    """Each from its separator to the next one, which says that it has ended."""
    options = ("--set", f"data.path={corpus}", "--set", "data.packed=true", "--json")
    found = json.loads(dualform("eval", tmp_path / "model", *options)[1])
    want = sum(nats(model, f"\n{text}\n") for text in TEXTS.values())
    assert found["nats"] == pytest.approx(want, rel=1e-5)


def test_progress_is_told(model, corpus, monkeypatch):
    monkeypatch.setattr(evaluate, "_TOGETHER", 20)
    from dualform.models.tokenizer import ByteTokenizer

    for packed in (False, True):
        said = []
        with whole_text(Data(path=str(corpus), packed=packed), ByteTokenizer()) as dataset:
            found = evaluate.score(
                model, dataset, length=20, packed=packed, streams=1, tell=lambda *counts, said=said: said.append(counts)
            )
        assert len(said) > 3 and said[-1] == (found.tokens, found.tokens) and said == sorted(said)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ((), "Missing option '--set'"),
        (("--set", "data.packed=true"), "no text is given"),
        (("--set", "optim.lr=1"), "expected a key of data"),
        (("--set", "data.path=nowhere"), "'nowhere' does not exist"),
        (("--set", "data.path=x", "--set", "data.pth=x"), "data.pth"),
    ],
)
def test_what_cannot_be_evaluated(dualform, model, tmp_path, options, sentence):
    code, out, err = dualform("eval", tmp_path / "model", *options)
    assert code == 2 and not out and sentence in err


def test_a_state_that_grows_begins_anew(dualform, corpus, tmp_path):
    torch.manual_seed(0)
    lm = LanguageModel(ModelConfig(256, 16, PARTS, "MA"))
    lm.save(tmp_path / "grows")
    (tmp_path / "one.txt").write_text("abcdefghijklm")
    options = ("--set", f"data.path={tmp_path / 'one.txt'}", "--set", "data.length=5", "--json")
    found = json.loads(dualform("eval", tmp_path / "grows", *options)[1])
    text = b"\nabcdefghijklm"
    pieces = [text[at : at + 6] for at in range(0, 13, 5)]
    want = sum(nats(lm, piece.decode()) for piece in pieces)
    assert found["nats"] == pytest.approx(want, rel=1e-5)
