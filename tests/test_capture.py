"""Training steps captured in CUDA graphs."""

import json
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.presets import preset
from dualform.ops import SlowBackendWarning
from dualform.train import loop
from dualform.train.capture import as_written, capture
from dualform.train.loop import train
from dualform.train.objective import Objective
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


class Replayed(torch.autograd.Function):
    """Returns its gradients in the same memory every time, as a captured graph does."""

    @staticmethod
    def forward(ctx, objective, windows, memory, *parameters):
        with torch.enable_grad():
            loss = objective(windows)
        ctx.found, ctx.memory = torch.autograd.grad(loss, parameters), memory
        return loss.detach()

    @staticmethod
    def backward(ctx, dloss):
        for static, gradient in zip(ctx.memory, ctx.found, strict=True):
            static.copy_(gradient * dloss)
        return None, None, None, *(static.detach() for static in ctx.memory)


def replayed(objective, sample, **options):
    parameters = list(objective.parameters())
    memory = [torch.empty_like(p) for p in parameters]
    return lambda windows: Replayed.apply(objective, windows, memory, *parameters)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
def test_portions_of_a_captured_step_add_up(monkeypatch):
    """A replay writes over the gradients of the one before."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", replayed)
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    torch.manual_seed(0)
    model = LanguageModel(small())
    objective, portions = Objective(model), torch.randint(256, (3, 2, 9))
    for portion in portions:
        objective(portion).backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    run, captured = capture(objective, model, portions[0], False, len(portions))
    assert captured
    for _ in range(2):
        model.zero_grad()
        for portion in portions:
            run(portion).backward()
        for p, exact in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, exact)


@pytest.mark.parametrize(
    "graphs, what", [(True, "compiling blocks and capturing a step in CUDA graphs"), (False, "compiling kernels")]
)
def test_what_a_gpu_has_to_wait_for_is_said_before(monkeypatch, graphs, what):
    told: list[str] = []
    monkeypatch.setattr(loop, "capture", lambda *args: (told.append("captured"), True))
    run = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1),
        bfloat16=True,
        dataset=SimpleNamespace(windows=lambda *args: [SimpleNamespace(to=lambda device: device)]),
        device=torch.device("cuda"),
        model=nn.Identity(),
        packed=False,
        recipe=SimpleNamespace(graphs=graphs, seed=0, data=SimpleNamespace(accumulate=1)),
        report=SimpleNamespace(say=told.append),
        wrapped=nn.Identity(),
    )
    loop._Run._prepare_device(run)
    assert told == [f"{what}; the first step may take a minute"] + ["captured"] * graphs
    run.device, before = torch.device("cpu"), list(told)
    loop._Run._prepare_device(run)
    assert told == before


def test_gradients_of_graphs_are_expected_on_their_stream(monkeypatch):
    warned: list[bool] = []
    name = "set_warn_on_accumulate_grad_stream_mismatch"
    monkeypatch.setattr(torch.autograd.graph, name, warned.append, raising=False)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda objective, *args, **options: objective)
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    capture(nn.Identity(), LanguageModel(small()), torch.zeros(1, 2), False)
    assert warned == [False]


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
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
