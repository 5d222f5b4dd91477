"""AdamW's groups follow the layers' hints; the schedule is a warm-up and a cosine."""

import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from dualform.core.errors import ConfigError
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mixer import Hint
from dualform.layers.mlp import MLPConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.train.optim import build_optimizer, freeze, parameter_hints, schedule, set_learning_rate
from dualform.train.recipe import Optim, Recipe

PARTS = {"M": (Mamba2Config(d_state=4, d_head=4),), "m": (MambaConfig(d_state=3), MLPConfig(d_hidden=5))}
PARTS["A"] = (AttentionConfig(heads=2, bias=True),)


class Slow(nn.Module):
    """A layer with a parameter that bears little, one that must decay although it is a vector, and a frozen one."""

    hints: ClassVar[dict[str, Hint]] = {"A": Hint(max_lr=1e-3), "v": Hint(decay=True, max_lr=1.0)}

    def __init__(self):
        super().__init__()
        self.A, self.v, self.B = (nn.Parameter(torch.ones(2, 2) if n != "v" else torch.ones(2)) for n in "AvB")
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def model(**options):
    return LanguageModel(ModelConfig(7, 8, PARTS, "MmAM", shared="M", **options))


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_nothing_else(tied):
    hints = {name: hint for name, _, hint in parameter_hints(model(tie_embeddings=tied))}
    decays = {name.rsplit(".", 1)[-1] if "head" not in name else "head" for name, hint in hints.items() if hint.decay}
    assert decays == {"weight", "conv_weight"} | ({"head"} if not tied else set())
    kept = {name for name, hint in hints.items() if not hint.decay}
    assert any(name.endswith("A_log") for name in kept) and any(name.endswith("dt_bias") for name in kept)
    assert {"embed.weight", "norm.weight"} <= kept and all("norm" not in name for name in hints if name not in kept)
    assert not any(name.endswith("bias") for name in hints if name not in kept)


def test_every_parameter_is_in_one_group():
    lm = model()
    optimizer = build_optimizer(lm, Optim())
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in lm.parameters())


def test_hints_decide_decay_and_the_largest_learning_rate():
    layer = Slow()
    optimizer = build_optimizer(nn.Sequential(layer), Optim(lr=0.1, weight_decay=0.3))
    found = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    told = {
        name: (found[id(p)]["weight_decay"], found[id(p)]["peak_lr"]) for name, p in [*layer.named_parameters()][:3]
    }
    assert told == {"A": (0.0, 1e-3), "v": (0.3, 0.1), "B": (0.3, 0.1)}
    assert id(layer.frozen) not in found
    set_learning_rate(optimizer, 0.5)
    assert found[id(layer.A)]["lr"] == 5e-4 and found[id(layer.B)]["lr"] == 0.05


def test_adamw_is_adamw():
    """Two steps against the paper's algorithm 2, written out."""
    layer = nn.Linear(3, 2, bias=False).double()
    w, m, v = layer.weight.detach().clone(), 0.0, 0.0
    optim = Optim(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    optimizer = build_optimizer(layer, optim)
    for t, share in ((1, 0.5), (2, 1.0)):
        x = torch.randn(4, 3, dtype=torch.float64)
        layer(x).square().sum().backward()
        g = layer.weight.grad.clone()
        set_learning_rate(optimizer, share)
        optimizer.step()
        optimizer.zero_grad()
        m, v, lr = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2, 0.1 * share
        w = w - lr * 0.2 * w - lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
        assert torch.allclose(layer.weight, w, rtol=1e-12, atol=1e-12)


def test_the_schedule_rises_and_falls():
    optim = Optim(warmup=4, floor=0.1)
    steps = [schedule(optim, step, step / 100) for step in range(101)]
    assert steps[:4] == sorted(steps[:4]) and steps[0] == pytest.approx(1 / 5)
    assert steps[4:] == sorted(steps[4:], reverse=True)
    assert steps[4] == 1 and steps[52] == pytest.approx(0.1 + 0.9 / 2) and steps[100] == pytest.approx(0.1)
    assert schedule(optim, 200, 2.0) == steps[100]  # a run that went past its time stays at the floor
    assert schedule(Optim(warmup=0, floor=1), 0, 0.0) == 1
    assert [schedule(Optim(warmup=9), step, step / 5) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert schedule(Optim(warmup=0, floor=0), 7, 1 / 3) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)


@pytest.mark.parametrize("steps, warmup", [(5, 0), (20, 2), (499, 49), (500, 50), (10_000, 50)])
def test_a_short_run_has_a_short_warmup(steps, warmup):
    settled = Recipe(steps=steps).settled()
    assert settled.optim.warmup == warmup and settled.settled() == settled
    assert max(schedule(settled.optim, step, step / steps) for step in range(steps)) == 1
    kept = Recipe(steps=steps, optim=Optim(warmup=7))
    assert kept.settled() == kept


@pytest.mark.parametrize("steps", [20, 10_000])
def test_by_the_clock_a_tenth_of_the_run_ends_the_warmup(steps):
    """How many steps the minutes will hold is not known; the share of them that has passed is."""
    recipe = Recipe(minutes=2)
    assert recipe.settled() == recipe and replace(recipe, steps=9).settled().optim.warmup == "auto"
    rates = [schedule(recipe.optim, step, step / steps) for step in range(steps)]
    assert max(rates) == 1 and rates.index(max(rates)) == min(50, steps // 10)


def test_what_is_frozen_has_no_gradient_and_no_moments():
    lm = model(tie_embeddings=False)
    freeze(lm, ["embed", "blocks.0", "blocks.2.parts.0.out_proj.weight"])
    names = {name for name, _, _ in parameter_hints(lm)}
    assert not any(name.startswith(("embed", "blocks.0.")) for name in names)
    assert "head.weight" in names and "norm.weight" in names
    lm.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    optimizer = build_optimizer(lm, Optim())
    optimizer.step()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in lm.named_parameters():
        assert (id(parameter) in trained) == (parameter.grad is not None) == (parameter in optimizer.state), name


@pytest.mark.parametrize(
    "names, said",
    [
        (["embd"], r"names 'embd', no part of the model\n.*did you mean 'embed'"),
        (["x"], "known: embed, blocks, norm"),
        (["embed", "blocks", "norm"], "nothing to train"),
    ],
)
def test_what_cannot_be_frozen_is_said(names, said):
    with pytest.raises(ConfigError, match=said):
        freeze(model(), names)
