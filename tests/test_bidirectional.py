"""Any mixer in both directions: joined in each way, over packed and padded sequences, in a classifier, and refused."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.packing import from_lengths
from dualform.layers.attention import AttentionConfig
from dualform.layers.bidirectional import Bidirectional, BidirectionalConfig
from dualform.layers.block import ChainConfig
from dualform.layers.dss import DSSConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.recall import RecallConfig
from dualform.layers.s4 import S4Config
from dualform.layers.s4d import S4DConfig
from dualform.layers.s5 import S5Config
from dualform.models.config import ModelConfig
from dualform.models.heads import SequenceClassifier
from dualform.models.lm import LanguageModel
from dualform.models.saving.model import load, save

D = 8
MIXERS = {
    "mamba2": Mamba2Config(d_state=3, d_head=4),
    "attention": AttentionConfig(heads=2, window=3),
    "lstm": LSTMConfig(hidden=5),
    "chain": ChainConfig((Mamba2Config(d_state=2, d_head=8), MLPConfig(d_hidden=5))),
}
ways = pytest.mark.parametrize("joined", ["added", "gated", "concatenated"])


def build(mixer: str, **given) -> Bidirectional:
    torch.manual_seed(0)
    return BidirectionalConfig(MIXERS[mixer], **given).build(D).double()


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@ways
@pytest.mark.parametrize("mixer", MIXERS)
def test_it_is_both_directions_joined(mixer, joined, tied):
    layer, u = build(mixer, joined=joined, tied=tied), x(2, 7)
    y, z = layer.forwards(u)[0], layer.backwards(u.flip(1))[0].flip(1)
    gate = (layer.gate(u) if joined == "gated" else u).sigmoid()
    want = {"added": y + z, "gated": gate * y + (1 - gate) * z}.get(joined)
    got, state = layer(u)
    close(got, torch.cat([y, z], -1) @ layer.out_proj.weight.T if want is None else want)
    assert state == () and (layer.forwards is layer.backwards) == tied
    first = torch.autograd.grad(got[:, 0].square().sum(), next(layer.backwards.parameters()), allow_unused=True)[0]
    assert first is not None and first.any()


@pytest.mark.parametrize("mixer", MIXERS)
def test_each_packed_sequence_is_reversed_by_itself(mixer):
    layer, u, lengths = build(mixer), x(1, 11), [4, 0, 1, 6]
    got = layer(u, cu_seqlens=from_lengths(torch.tensor(lengths)))[0]
    close(got, torch.cat([layer(part)[0] for part in u.split(lengths, 1)], 1))


BOTH_WAYS: dict[str, Any] = {
    **{name: BidirectionalConfig(mixer, joined="gated") for name, mixer in MIXERS.items()},
    "s4": S4Config(d_state=4, bidirectional=True),
    "s4d": S4DConfig(d_state=4, bidirectional=True),
    "dss": DSSConfig(d_state=4, length=9, bidirectional=True),
    "s5": S5Config(d_state=4, bidirectional=True),
}
CONTINUOUS = ("s4d", "dss", "s5")


@pytest.mark.parametrize("name, timed", [*((name, False) for name in BOTH_WAYS), *((n, True) for n in CONTINUOUS)])
def test_packed_sequences_have_the_gradients_of_each_alone(name, timed):
    """Of the input, the intervals and all parameters; rows of a batch and sequences of a line alike."""
    torch.manual_seed(0)
    layer, lengths = BOTH_WAYS[name].build(D).double(), [4, 0, 1, 6]
    u, weights = x(1, 11).requires_grad_(), x(1, 11)
    times = {"intervals": torch.rand(1, 11, dtype=torch.float64).add(0.5).requires_grad_()} if timed else {}
    leaves = [u, *times.values(), *layer.parameters()]

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((y * weights).sum(), leaves)

    packed = layer(u, cu_seqlens=from_lengths(torch.tensor(lengths)), **times)[0]
    pieces = zip(*(whole.split(lengths, 1) for whole in (u, *times.values())), strict=True)
    alone = torch.cat([layer(part, **dict(zip(times, more, strict=True)))[0] for part, *more in pieces], 1)
    close(packed, alone)
    for got, want in zip(gradients(packed), gradients(alone), strict=True):
        close(got, want)


@ways
def test_a_classifier_padded_and_saved(joined, tmp_path):
    torch.manual_seed(0)
    parts = {"B": (BidirectionalConfig(MIXERS["mamba2"], joined=joined), MLPConfig(d_hidden=5))}
    model = SequenceClassifier(ModelConfig(13, D, parts, "BB"), 3).double()
    text = torch.randint(13, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    alone = torch.cat([model(row[keep.bool()][None])[0] for row, keep in zip(text, mask, strict=True)])
    close(model(text, attention_mask=mask)[0], alone)
    again = ModelConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert again == model.config and not model.causal
    save(model, tmp_path)
    close(load(tmp_path)(text)[0], model(text)[0])
    loss = model.loss(text, torch.tensor([0, 1, 2]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(model.parameters())))


def test_what_a_model_scales_at_the_start():
    for joined, names in (
        ("added", {"forwards.out_proj.weight", "backwards.out_proj.weight"}),
        ("concatenated", {"out_proj.weight"}),
    ):
        assert {*build("mamba2", joined=joined).residual} == names


def test_what_is_refused():
    layer = build("mamba2")
    for call in (lambda: layer.init_state(1), lambda: layer.step(x(2), ()), lambda: layer(x(1, 2), ())):
        with pytest.raises(ArgumentError, match="no state and no step: its outputs depend on inputs to come"):
            call()
    for mixer, sentence in (
        (MLPConfig(), "mixer is MLP, which sees each step alone"),
        (S4DConfig(bidirectional=True), "mixer is S4D, which is bidirectional already"),
        (ChainConfig((RecallConfig(),)), "mixer is Block, which reads what other parts tell"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            BidirectionalConfig(mixer).build(D)
    config = ModelConfig(13, D, {"B": (BidirectionalConfig(MIXERS["mamba2"]),)}, "B")
    with pytest.raises(ConfigError, match="would see the token that it is to predict"):
        LanguageModel(config)
    with pytest.raises(ConfigError, match=r"bidirectional.*joined is 'multiplied'|joined is 'multiplied'"):
        BidirectionalConfig(MIXERS["mamba2"], joined="multiplied")
