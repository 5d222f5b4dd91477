"""Training steps captured in CUDA graphs."""

import json
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import nn

from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.presets import preset
from dualform.ops import SlowBackendWarning
from dualform.train.capture import as_written, capture
from dualform.train.loop import train
from dualform.train.recipe import Data, Recipe


def small() -> ModelConfig:
    return replace(preset("byte-mamba"), d_model=32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
def test_without_graphs_it_says_so_and_goes_on(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no graph\nof this")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", broken)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    model, objective = LanguageModel(small()), nn.Identity()
    with pytest.warns(SlowBackendWarning, match=r"could not be captured .*\(no graph\); graphs=false"):
        run, captured = capture(objective, model, torch.zeros(1, 2), False)
    assert run is objective and not captured
    assert all(block._compiled_call_impl is None for block in model.blocks)
    with as_written(captured):
        assert model(torch.zeros(1, 3, dtype=torch.int64))[0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_captured_run_is_the_same_run(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 2000)
    losses = []
    for graphs in (False, True):
        out = tmp_path / str(graphs)
        recipe = Recipe(
            model=small().to_dict(),
            out=str(out),
            steps=12,
            log_every=1,
            graphs=graphs,
            precision="float32",
            data=Data(path=str(text), length=64, batch=4, accumulate=2),
        )
        train(recipe, console=Console(file=StringIO()))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
