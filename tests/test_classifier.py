"""Classifiers and regressors: pooling by definition, the same answer in pieces, steps, packed and padded."""

import pytest
import torch
import torch.nn.functional as F

import dualform as df
from dualform.core.errors import ArgumentError, CheckpointError, ConfigError
from dualform.core.packing import from_lengths
from dualform.core.tree import clone, leaves
from dualform.layers.attention import AttentionConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.s4d import S4DConfig
from dualform.models.backbone import Backbone
from dualform.models.heads import POOLINGS, SequenceClassifier, SequenceRegressor
from dualform.models.store import load, save


def config(bidirectional: bool = False, **options) -> df.ModelConfig:
    parts = {
        "S": (S4DConfig(d_state=4, bidirectional=bidirectional),),
        "L": (LSTMConfig(),),
        "A": (AttentionConfig(heads=2),),
    }
    return df.ModelConfig(**{"vocab_size": 0, "d_model": 8, "parts": parts, "pattern": "SLA", **options})


def classifier(pooling: str = "mean", **options) -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(config(**options), 3, inputs=2, pooling=pooling).double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


REDUCE = {"mean": lambda h: h.mean(1), "last": lambda h: h[:, -1], "max": lambda h: h.amax(1)}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_output_is_the_head_of_the_pooled_features(pooling, x):
    model = classifier(pooling)
    logits, state = model(x)
    torch.testing.assert_close(logits, model.head(REDUCE[pooling](model.features(x)[0])))
    assert logits.shape == (4, 3) and state.seen.tolist() == [9] * 4
    assert all(len(leaf) == 4 for leaf in leaves(state))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pieces_and_steps_end_in_the_answer_of_the_whole(pooling, x):
    model = classifier(pooling)
    whole, end = model(x)
    _, state = model(x[:, :4])
    again, state = model(x[:, 4:7], state)
    torch.testing.assert_close(again, model(x[:, :7])[0])
    for t in (7, 8):
        again, state = model.step(x[:, t], state)
    torch.testing.assert_close(again, whole)
    for got, want in zip(leaves(state.blocks[:2]), leaves(end.blocks[:2]), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(state.pooled, end.pooled)
    first, _ = model.step(x[:, 0], model.init_state(4, max_len=9))
    torch.testing.assert_close(first, model(x[:, :1])[0])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_and_padded_are_each_sequence_alone(pooling, bidirectional, x):
    model, lengths = classifier(pooling, bidirectional=bidirectional), torch.tensor([9, 1, 6, 3])
    alone = torch.cat([model(x[i : i + 1, :n])[0] for i, n in enumerate(lengths)])
    keep = torch.arange(9) < lengths[:, None]
    packed, _ = model(x[keep][None], cu_seqlens=from_lengths(lengths))
    torch.testing.assert_close(packed, alone)
    torch.testing.assert_close(model(x, attention_mask=keep.long())[0], alone)
    left = torch.zeros_like(x)
    left[keep.flip(1)] = x[keep]
    torch.testing.assert_close(model(left, attention_mask=keep.flip(1).long())[0], alone)
    labels = torch.tensor([0, 1, 2, 0])
    loss = model.loss(x, labels, attention_mask=keep.long())
    torch.testing.assert_close(loss, F.cross_entropy(alone, labels))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_goes_on_from_a_state_and_empty_sequences_keep_theirs(pooling, x):
    model = classifier(pooling)
    _, state = model(x[:, :5])
    want_empty = state.pooled[1].clone()
    want = torch.cat([model(x[i : i + 1, :end])[0] for i, end in enumerate((7, 5, 9, 6))])
    keep = torch.arange(4) < torch.tensor([2, 0, 4, 1])[:, None]
    got, state = model(x[:, 5:][keep][None], clone(state), cu_seqlens=torch.tensor([0, 2, 2, 6, 7]))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(state.pooled[1], want_empty)
    nothing, _ = model(x[:1, :0])
    torch.testing.assert_close(nothing[0], model.head.bias)


def test_a_bidirectional_model_reads_whole_sequences(x):
    model = classifier(bidirectional=True)
    logits, state = model(x)
    assert state == () and not model.causal and logits.shape == (4, 3)
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.equal(model.features(x)[0][:, 0], model.features(changed)[0][:, 0])
    for call in (lambda: model.init_state(1), lambda: model.step(x[:, 0], ()), lambda: model(x, ())):
        with pytest.raises(ArgumentError, match="bidirectional"):
            call()


def test_a_language_model_refuses_a_bidirectional_part():
    with pytest.raises(ConfigError, match="bidirectional"):
        df.LanguageModel(config(bidirectional=True, vocab_size=5))


def test_tokens_and_a_regressor():
    torch.manual_seed(0)
    model = SequenceRegressor(config(vocab_size=5), 2).double()
    tokens = torch.randint(5, (3, 6))
    y, _ = model(tokens)
    target = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(model.loss(tokens, target), (y - target).square().mean())
    with pytest.raises(ArgumentError, match="tokens holds 9, expected 0 to 4"):
        model(torch.full((1, 2), 9))


def test_a_few_steps_of_training_lower_the_loss(x):
    model, labels = classifier(), torch.tensor([0, 1, 2, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = model.loss(x, labels).item()
    for _ in range(10):
        optimizer.zero_grad()
        model.loss(x, labels).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert model.loss(x, labels).item() < 0.8 * before


@pytest.mark.parametrize("bidirectional", [False, True])
def test_saving_and_loading(bidirectional, tmp_path, x):
    model = classifier("max", bidirectional=bidirectional)
    model.save(tmp_path / "a")
    save(model, tmp_path / "b")
    for folder in ("a", "b"):
        again = load(tmp_path / folder, kind=SequenceClassifier)
        assert type(again) is SequenceClassifier and again.pooling == "max" and again.config == model.config
        torch.testing.assert_close(again(x)[0], model(x)[0], rtol=0, atol=0)
    assert type(load(tmp_path / "a", kind=Backbone)) is SequenceClassifier
    with pytest.raises(CheckpointError, match=r"a SequenceClassifier, expected a LanguageModel\n.*kind=SequenceClass"):
        load(tmp_path / "a")
    text = (tmp_path / "b" / "config.json").read_text()
    (tmp_path / "b" / "config.json").write_text(text.replace('"outputs"', '"outputz"'))
    with pytest.raises(CheckpointError, match="head"):
        load(tmp_path / "b", kind=SequenceClassifier)
    (tmp_path / "b" / "config.json").write_text(text.replace("SequenceClassifier", "Oracle"))
    with pytest.raises(CheckpointError, match="unknown kind of model 'Oracle'"):
        load(tmp_path / "b", kind=SequenceClassifier)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SequenceClassifier(config(), 3, inputs=2, pooling="sum"), "'sum' is unknown\n.*mean, last, max"),
        (lambda: SequenceClassifier(config(), 1, inputs=2), "1 outputs, expected at least 2"),
        (lambda: SequenceRegressor(config(), 0, inputs=2), "0 outputs, expected at least 1"),
        (lambda: SequenceClassifier(config(), 3), "vocab_size is 0"),
        (lambda: SequenceClassifier(config(), 3, inputs=0), "inputs is 0"),
        (lambda: df.LanguageModel(config()), "vocab_size is 0"),
    ],
)
def test_bad_configs(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_bad_calls(x):
    model = classifier()
    with pytest.raises(ArgumentError, match=r"x has shape \(4, 9, 1\)"):
        model(x[..., :1])
    with pytest.raises(ArgumentError, match="expected a floating dtype"):
        model(x.long())
    with pytest.raises(ArgumentError, match="not both"):
        model(x, cu_seqlens=torch.tensor([0, 9]), attention_mask=torch.ones(4, 9))
    with pytest.raises(ArgumentError, match="expected a PooledState"):
        model.step(x[:, 0], ())
    with pytest.raises(ArgumentError, match="labels"):
        model.loss(x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="values other than 0 and 1"):
        model(x, attention_mask=torch.full((4, 9), 2))
