"""The mixture of experts: against a loop over elements and experts, by batch, compiled, and in models that train."""

import math
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.layers.activation import ACTIVATIONS
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.moe import MoE, MoEConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.presets import preset
from dualform.ops import backend, grouped_linear
from vectors import close

CONFIGS = {
    "softmax": MoEConfig(5, 2, d_hidden=7),
    "softmax, not normalised": MoEConfig(4, 3, normalise=False, d_hidden=3, scale=1.5),
    "one of several": MoEConfig(3, 1, normalise=False, d_hidden=5, activation="gelu"),
    "one alone": MoEConfig(1, 1, d_hidden=2),
    "all": MoEConfig(4, 4, d_hidden=2, scores="sigmoid"),
    "sigmoid, corrected": MoEConfig(6, 2, "sigmoid", corrected=True, d_hidden=4, scale=2.5, d_shared=3, eps=1e-6),
    "groups": MoEConfig(12, 3, "sigmoid", groups=4, top_groups=2, corrected=True, d_hidden=3, normalise=False),
    "groups of one": MoEConfig(4, 2, groups=4, top_groups=3, d_hidden=3),
    "not gated": MoEConfig(5, 2, "sigmoid", gated=False, activation="relu2", d_hidden=6, d_shared=4),
    "shared behind a gate": MoEConfig(4, 2, d_hidden=3, d_shared=5, shared_gate=True, activation="gelu_tanh"),
}
every = pytest.mark.parametrize("name", CONFIGS)


def layer(name: str, d_model: int = 5) -> MoE:
    torch.manual_seed(3)
    made = CONFIGS[name].build(d_model).double()
    if made.router.correction is not None:
        torch.nn.init.normal_(made.router.correction)
    return made


def loop(moe: MoE, x: Tensor) -> Tensor:
    """Element by element and expert by expert, as the papers have it."""
    c, rows = moe.config, []
    f = ACTIVATIONS[c.activation]

    def mlp(v: Tensor, first: Tensor, last: Tensor) -> Tensor:
        inner = first @ v
        half = len(inner) // 2
        return last @ (f(inner[:half]) * inner[half:] if c.gated else f(inner))

    for v in x.reshape(-1, x.shape[-1]):
        logits = moe.router.weight @ v
        exps = (logits - logits.max()).exp()
        scores = exps / exps.sum() if c.scores == "softmax" else 1 / (1 + (-logits).exp())
        ranked = scores if moe.router.correction is None else scores + moe.router.correction
        size, worth = c.experts // c.groups, []
        for g in range(c.groups):
            worth.append(sum(sorted(ranked[g * size : (g + 1) * size].tolist())[-2:]))
        best = sorted(range(c.groups), key=lambda g: worth[g])[-c.top_groups :]
        open_ = [e for e in range(c.experts) if e // size in best]
        chosen = sorted(open_, key=lambda e: ranked[e].item())[-c.top_k :]
        total = sum(scores[e] for e in chosen) + c.eps
        y = torch.zeros_like(v)
        for e in chosen:
            first = moe.gate_up_proj[e] if c.gated else moe.up_proj[e]
            weight = scores[e] / total if c.normalise else scores[e]
            y = y + c.scale * weight * mlp(v, first, moe.down_proj[e])
        if moe.shared is not None:
            first = moe.shared.gate_up_proj if c.gated else moe.shared.up_proj
            beside = mlp(v, first.weight, moe.shared.down_proj.weight)
            gate = 1.0 if moe.shared_gate is None else 1 / (1 + (-(moe.shared_gate.weight @ v)).exp())
            y = y + gate * beside
        rows.append(y)
    return torch.stack(rows).view_as(x)


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return list(torch.autograd.grad((y * cotangent).sum(), leaves, materialize_grads=True, allow_unused=True))


@every
@pytest.mark.parametrize("by", ["", "reference"])
def test_it_is_the_sum_over_the_chosen_experts(name: str, by: str) -> None:
    moe, x = layer(name), torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *moe.parameters()]
    with backend(by):
        got = moe(x)
        found = gradients(got, leaves)
    want = loop(moe, x)
    close(got, want, 1e-12)
    for i, (a, b) in enumerate(zip(found, gradients(want, leaves), strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=f"gradient {i} of {name}")


@every
def test_an_output_does_not_depend_on_what_else_is_in_the_batch(name: str) -> None:
    moe, x = layer(name), torch.randn(3, 7, 5, dtype=torch.float64)
    whole = moe(x)
    close(torch.stack([torch.stack([moe(v[None, None])[0, 0] for v in row]) for row in x]), whole, 1e-12)
    x[1, 4] = torch.nan
    others = torch.arange(21) != 11
    close(moe(x).flatten(0, 1)[others], whole.flatten(0, 1)[others], 1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,)])
def test_any_number_of_elements(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer("sigmoid, corrected")(x)
    y.sum().backward()
    assert y.shape == shape and x.grad is not None and x.grad.shape == shape


def test_the_weights_of_experts_start_as_those_of_linear_maps() -> None:
    moe = MoEConfig(16, d_hidden=100).build(64)
    assert moe.gate_up_proj.abs().max() <= 1 / 8 and moe.down_proj.abs().max() <= 1 / 10
    assert moe.gate_up_proj.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.02)


def test_bfloat16_is_routed_in_float32() -> None:
    exact = MoEConfig(16, 2, d_hidden=8).build(32)
    moe, x = MoEConfig(16, 2, d_hidden=8).build(32), torch.randn(40, 32).bfloat16()
    moe.load_state_dict(exact.state_dict())
    exact.load_state_dict(moe.bfloat16().state_dict())
    assert torch.equal(moe.router(x).experts, exact.router(x.float()).experts)
    assert moe(x).dtype == torch.bfloat16
    close(moe(x).float(), exact(x.float()), 2e-2)


# What the training is told.


class Context(NamedTuple):
    """What a model gives its parts while it trains."""

    losses: list[Tensor]
    counted: Tensor | None = None
    collects: bool = True
    add_loss: Any = None


def told(moe: MoE, x: Tensor, counted: Tensor | None = None) -> list[Tensor]:
    losses: list[Tensor] = []
    moe(x, context=Context(losses, counted, add_loss=losses.append))
    return losses


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_losses_are_those_of_their_papers(scores: Any, padded: bool) -> None:
    torch.manual_seed(0)
    moe = MoEConfig(4, 2, scores, d_hidden=3, balance=0.5, z=0.25).build(5).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    counted = torch.rand(2, 6) < 0.6 if padded else None
    rows = x[counted] if counted is not None else x.flatten(0, 1)
    logits = rows @ moe.router.weight.T
    score = logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
    used = torch.zeros(4, dtype=torch.float64)
    for row in score:
        for e in row.topk(2).indices:
            used[e] += 1 / (2 * len(rows))
    share = (score / score.sum(-1, keepdim=True)).mean(0)
    balance, z = told(moe, x, counted)
    close(balance, 0.5 * 4 * (used * share).sum(), 1e-12)
    close(z, 0.25 * logits.exp().sum(-1).log().square().mean(), 1e-12)
    (slope,) = torch.autograd.grad(balance, moe.router.weight)
    close(slope, torch.autograd.grad(2 * (used * share).sum(), moe.router.weight)[0], 1e-10)


def test_experts_that_are_used_alike_cost_one() -> None:
    moe = MoEConfig(4, 2, d_hidden=3, balance=1.0, z=0).build(4).double()
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(4) + torch.eye(4).roll(1, 0))
    (balance,) = told(moe, torch.eye(4, dtype=torch.float64)[None])
    assert balance.item() == pytest.approx(1)


def test_a_correction_moves_towards_experts_that_are_used_too_little() -> None:
    moe = MoEConfig(4, 1, "sigmoid", corrected=True, d_hidden=3, balance=1.0, z=0).build(5).double()
    x = torch.randn(1, 50, 5, dtype=torch.float64)
    (balance,) = told(moe, x)
    balance.backward()
    used = torch.bincount(moe.router(x[0]).experts.flatten(), minlength=4).double() / 50
    assert balance.item() == 0 and moe.router.weight.grad is None and moe.router.correction is not None
    assert moe.router.correction.grad is not None
    close(moe.router.correction.grad, used - 0.25, 1e-12)


def test_a_correction_that_nothing_moves_is_no_parameter_to_train() -> None:
    for balance in (0.0, 0.01):
        correction = MoEConfig(4, scores="sigmoid", corrected=True, balance=balance).build(5).router.correction
        assert correction is not None and correction.requires_grad == (balance > 0)


def test_nothing_is_told_where_nobody_listens() -> None:
    losses: list[Tensor] = []
    moe, x = MoEConfig(4).build(5), torch.randn(2, 5)
    moe(x, context=Context(losses, collects=False, add_loss=losses.append))
    replace(moe.config, balance=0.0, z=0.0).build(5)(x, context=Context(losses, add_loss=losses.append))
    assert not losses


# In models.


def test_padding_and_packing_change_nothing() -> None:
    torch.manual_seed(0)
    small = {
        "M": (MambaConfig(d_state=3), MLPConfig(d_hidden=5)),
        "E": (MambaConfig(d_state=3), MoEConfig(5, 2, d_hidden=4)),
        "A": (AttentionConfig(heads=2, rope=None), MLPConfig(d_hidden=5)),
    }
    model = LanguageModel(ModelConfig(17, 6, small, "MEAE")).double().eval()
    long, short = torch.randint(17, (1, 7)), torch.randint(17, (1, 4))
    alone = [model(tokens)[0] for tokens in (long, short)]
    packed, _ = model(torch.cat([long, short], 1), cu_seqlens=torch.tensor([0, 7, 11]))
    close(packed, torch.cat(alone, 1), 1e-12)
    padded = torch.cat([long, F.pad(short, (3, 0))])
    y, state = model(padded, attention_mask=torch.tensor([[1] * 7, [0] * 3 + [1] * 4]))
    close(y[1, 3:], alone[1][0], 1e-12)
    more = torch.randint(17, (2,))
    want = [model(torch.cat([tokens, more[i : i + 1, None]], 1))[0][0, -1] for i, tokens in enumerate((long, short))]
    close(model.step(more, state)[0], torch.stack(want), 1e-12)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_losses_of_routers_are_part_of_that_of_a_training(recompute: bool) -> None:
    """And of no other, nor is that of padding."""
    torch.manual_seed(0)
    parts: Any = {"E": (MambaConfig(d_state=2), MoEConfig(4, 2, d_hidden=3, balance=1.0, z=0.5))}
    model: Any = LanguageModel(ModelConfig(11, 6, parts, "EE")).double()
    tokens = torch.randint(11, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    seen: list[Tensor] = []

    def look(router: Any, given: tuple[Tensor], routing: Any) -> None:
        seen.append(router.balance_loss(routing) + 0.5 * router.z_loss(routing))

    hooks = [block.parts[1].router.register_forward_hook(look) for block in model._stack()]
    plain = model.eval().loss(tokens, attention_mask=mask)
    want = plain + seen[0] + seen[1]
    for hook in hooks:
        hook.remove()
    model.recompute = recompute
    got = model.train().loss(tokens, attention_mask=mask)
    close(got, want, 1e-12)
    leaves = list(model.parameters())
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of the compiler itself
def test_compiled_and_exported_for_any_number_of_elements() -> None:
    moe, x = layer("sigmoid, corrected"), torch.randn(2, 9, 5, dtype=torch.float64)
    program = torch.export.export(moe, (x,), dynamic_shapes={"x": {1: torch.export.Dim("length", min=1, max=10**6)}})
    close(program.module()(x[:, :4]), moe(x[:, :4]), 1e-12)
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (9, 4):
        leaf = x[:, :length].clone().requires_grad_()
        got, want = compiled(leaf), moe(leaf)
        close(got, want, 1e-12)
        leaves = [leaf, *moe.parameters()]
        for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["byte-moe-mamba", "byte-samba", "byte-jamba"])
def test_presets_train(name: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(preset(name))
    tokens = torch.arange(40).remainder(7)[None]
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(6):
        loss = model.loss(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_active_parameters_leave_out_the_experts_that_a_byte_does_not_go_to() -> None:
    model = LanguageModel(
        ModelConfig(11, 8, {"E": (MoEConfig(5, 2, d_hidden=3), MoEConfig(3, 1, gated=False, d_hidden=2))}, "EE")
    )
    assert model.parameter_count() - model.active_parameter_count() == 2 * (3 * 3 * 3 * 8 + 2 * 2 * 2 * 8)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"experts": 0}, "experts is 0, expected at least 1"),
        ({"top_k": 9}, "top_k is 9, expected at most 8"),
        ({"groups": 3}, "experts 8 is not a multiple of groups 3"),
        ({"groups": 2, "top_groups": 3}, "top_groups is 3, expected at most groups = 2"),
        ({"groups": 4, "top_k": 3}, "top_k is 3, expected at most 2, the experts that are chosen from"),
        ({"scale": -1.0}, r"scale is -1\.0"),
        ({"balance": math.inf}, "balance is inf"),
        ({"d_shared": -1}, "d_shared is -1"),
        ({"shared_gate": True}, "shared_gate is set, but there is no shared expert"),
        ({"d_hidden": 0}, "moe: d_hidden is 0"),
        ({"activation": "tanh"}, "moe: activation 'tanh' is unknown"),
        ({"scores": "top"}, "scores is 'top', expected 'softmax' or 'sigmoid'"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MoEConfig(**options).build(8)


# The operator beyond what every operator is tested on.


def test_pytorchs_grouped_product_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU runs it; PyTorch has one for a CPU that takes the same layouts."""
    module = sys.modules["dualform.ops.grouped_linear"]
    x, weight = torch.randn(11, 8, requires_grad=True), torch.randn(4, 16, 8, requires_grad=True)
    ends, cotangent = torch.tensor([3, 3, 10, 11]), torch.randn(11, 16)

    def run() -> list[Tensor]:
        y = grouped_linear(x, weight, ends)
        return [y, *torch.autograd.grad(y, [x, weight], cotangent)]

    want, asked = run(), []
    monkeypatch.setattr(module, "fits_the_grouped_product", lambda x, *widths: asked.append(widths) or True)
    for a, b in zip(run(), want, strict=True):
        torch.testing.assert_close(a, b)
    assert [sorted(widths) for widths in asked] == [[8, 16]] * 3


def test_borders_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a graph is captured on a GPU."""
    module = sys.modules["dualform.ops.grouped_linear"]
    x, weight = torch.randn(11, 3, requires_grad=True), torch.randn(4, 5, 3, requires_grad=True)
    ends, cotangent = torch.tensor([3, 3, 10, 11]), torch.randn(11, 5)

    def run() -> list[Tensor]:
        y = grouped_linear(x, weight, ends)
        return [y, *torch.autograd.grad(y, [x, weight], cotangent)]

    want = run()
    monkeypatch.setattr(module, "readable", lambda tensor: False)
    for a, b in zip(run(), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ends": torch.tensor([3, 2, 4])}, "ends is 3, 2, 4, expected numbers that rise to the 4 rows of x"),
        ({"ends": torch.tensor([1, 2, 3])}, "ends is 1, 2, 3"),
        ({"ends": torch.tensor([-1, 2, 4])}, "ends is -1, 2, 4"),
        ({"ends": torch.tensor([1, 2, 4]).int()}, r"ends is torch\.int32"),
        ({"ends": torch.tensor([2, 4])}, r"ends has shape \(2,\)"),
        ({"x": torch.randn(4, 3).double()}, r"x is torch\.float64, but weight is torch\.float32"),
        ({"weight": torch.randn(3, 2, 5)}, r"weight has shape \(3, 2, 5\)"),
        ({"weight": torch.randn(0, 2, 3), "ends": torch.zeros(0).long()}, "weight has no groups"),
    ],
)
def test_arguments_of_the_operator(change: dict[str, Tensor], words: str) -> None:
    given = {"x": torch.randn(4, 3), "weight": torch.randn(3, 2, 3), "ends": torch.tensor([1, 2, 4]), **change}
    with pytest.raises(ArgumentError, match=words):
        grouped_linear(**given)
