"""Names of the Hugging Face Hub, without the Hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

import dualform as df
from dualform.compat.mixer_seq import MambaLMHeadModel
from dualform.core.errors import CheckpointError
from dualform.models.saving.hub import hub_name, snapshot
from dualform.models.saving.model import shape
from dualform.train.recipe import Data, Recipe
from dualform.train.setup import build_model

GOLDEN = Path(__file__).parent / "golden"
NAME = "somebody/mamba-tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with one repository: its folder, and what was asked for."""
    there, cache, asked = tmp_path / "hub", tmp_path / "cache", list[list[str]]()
    shutil.copytree(GOLDEN / "lm_mamba", there)
    (there / "README.md").write_text("not asked for")

    def download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        assert name == NAME and not options
        asked.append(allow_patterns)
        cache.mkdir(exist_ok=True)
        for path in there.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    snapshot.cache_clear()
    yield there, cache, asked
    snapshot.cache_clear()


def test_a_model_by_its_name(hub):
    _, cache, asked = hub
    want = df.load(GOLDEN / "lm_mamba").state_dict()
    got = df.load(NAME).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert shape(NAME).parameter_count() == 29536
    assert len(asked) == 1, "asked again in one process"
    assert {path.name for path in cache.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_pickles_only_where_there_is_nothing_else(hub):
    there, _, asked = hub
    torch.save(load_file(there / "model.safetensors"), there / "pytorch_model.bin")
    df.load(NAME)
    assert len(asked) == 1 and not any("bin" in pattern for pattern in asked[0])
    snapshot.cache_clear()
    (there / "model.safetensors").unlink()
    shutil.rmtree(hub[1])
    df.load(NAME)
    assert len(asked) == 3 and "pytorch_model.bin" in asked[2]


def test_a_folder_here_comes_first(hub):
    here = Path(NAME)
    shutil.copytree(GOLDEN / "lm_mamba2", here)
    assert df.load(NAME).parameter_count() == 33864
    shutil.rmtree(here)
    with pytest.raises(CheckpointError, match=f"{NAME}: no such folder\n"):
        df.load(NAME)  # beside other folders of that owner
    assert not hub[2]


def test_the_names_of_mamba_ssm(hub):
    there, _, _ = hub
    shutil.rmtree(there)
    df.save(df.load(GOLDEN / "lm_mamba"), there, layout="mamba_ssm")
    model = MambaLMHeadModel.from_pretrained(NAME, device="cpu", dtype=torch.float64)
    want = load_file(GOLDEN / "lm_mamba.safetensors")
    with torch.no_grad():
        logits = model(want["input_ids"]).logits
    torch.testing.assert_close(logits[..., :97], want["logits_f64"], rtol=1e-5, atol=1e-5)


def test_a_run_begins_with_it(hub):
    there, _, _ = hub
    letters = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(97)}, " "))
    letters.save("letters.json")
    given = Recipe(model=NAME, steps=1, data=Data(tokenizer="letters.json"))
    model, _ = build_model(given)  # a repository without a tokenizer takes the one that is given
    assert model.parameter_count() == 29536
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        build_model(Recipe(model=NAME, steps=1))
    snapshot.cache_clear()
    letters.save(str(there / "tokenizer.json"))
    assert build_model(Recipe(model=NAME, steps=1))[1].encode("!") == [1]


@pytest.mark.parametrize("name", ["mamba", "a/b/c", "/a/b", "./b", "../b", "a/", "~/b", "a b/c", "C:\\a/b"])
def test_what_is_no_name(name):
    assert hub_name(name) is None


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (lambda response: RepositoryNotFoundError("404: not there", response=response), "404: not there\n.*spelling"),
        (lambda response: GatedRepoError("403: ask first", response=response), "403: ask first\n.*terms"),
        (lambda response: ConnectionError("\nno route"), "no route\n.*hf download"),
        (lambda response: OSError(), "OSError\n"),
    ],
)
def test_what_the_hub_does_not_give(hub, monkeypatch, error, sentence):
    response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()

    def refuse(*args: Any, **options: Any) -> str:
        raise error(response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=f"{NAME}: no such folder here, and not .* Hugging Face Hub: {sentence}"):
        df.load(NAME)


def test_a_repository_of_another_architecture(hub):
    there, _, _ = hub
    (there / "config.json").write_text(json.dumps({"model_type": "gemma9"}))
    with pytest.raises(CheckpointError, match="model_type is 'gemma9'"):
        df.load(NAME)
