"""Any mixer in both directions: joined in each way, over packed and padded sequences, in a classifier, and refused."""

import json

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.packing import from_lengths
from dualform.layers.attention import AttentionConfig
from dualform.layers.bidirectional import Bidirectional, BidirectionalConfig
from dualform.layers.block import ChainConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.recall import RecallConfig
from dualform.layers.s4d import S4DConfig
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
