"""Classifiers and regressors: pooling by definition, the same answer in pieces, steps, packed and padded."""

import pytest
import torch
import torch.nn.functional as F

import dualform as df
from dualform.core.errors import ArgumentError, CheckpointError, ConfigError
from dualform.core.packing import from_lengths
from dualform.core.tree import clone, leaves, take
from dualform.layers.attention import AttentionConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.s4d import S4DConfig
from dualform.models.backbone import Backbone
from dualform.models.heads import POOLINGS, SequenceClassifier, SequenceRegressor
from dualform.models.saving.model import load, save


def config(bidirectional: bool = False, **options) -> df.ModelConfig:
    parts = {
        "S": (S4DConfig(d_state=4, bidirectional=bidirectional),),
        "L": (LSTMConfig(),),
        "A": (AttentionConfig(heads=2),),
    }
    return df.ModelConfig(**{"vocab_size": 0, "d_model": 8, "parts": parts, "pattern": "SLA", **options})


def classifier(pooling: str = "mean", **options) -> SequenceClassifier:
    torch.manual_seed(0)
    window = 4 if pooling in ("window", "forgetting") else None
    model = SequenceClassifier(config(**options), 3, inputs=2, pooling=pooling, window=window).double()
    if pooling == "attention":
        torch.nn.init.normal_(model.pool.query)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def forgetful(h):
    weights = 0.75 ** torch.arange(h.shape[1] - 1, -1, -1, dtype=h.dtype)
    return torch.einsum("t,btd->bd", weights / weights.sum(), h)


REDUCE = {
    "mean": lambda h, _: h.mean(1),
    "last": lambda h, _: h[:, -1],
    "max": lambda h, _: h.amax(1),
    "attention": lambda h, pool: torch.einsum("bt,btd->bd", (h @ pool.query).softmax(1), h),
    "window": lambda h, _: h[:, -4:].mean(1),
    "forgetting": lambda h, _: forgetful(h),
}


@pytest.mark.parametrize("length", [9, 2])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_output_is_the_head_of_the_pooled_features(pooling, length, x):
    model, x = classifier(pooling), x[:, :length]
    logits, state = model(x)
    torch.testing.assert_close(logits, model.head(REDUCE[pooling](model.features(x)[0], model.pool)))
    assert logits.shape == (4, 3) and state.seen.tolist() == [length] * 4
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
    want_empty = take(state.pooled, [1])
    want = torch.cat([model(x[i : i + 1, :end])[0] for i, end in enumerate((7, 5, 9, 6))])
    keep = torch.arange(4) < torch.tensor([2, 0, 4, 1])[:, None]
    got, state = model(x[:, 5:][keep][None], clone(state), cu_seqlens=torch.tensor([0, 2, 2, 6, 7]))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(take(state.pooled, [1]), want_empty)
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
    assert type(df.load(tmp_path / "a")) is type(load(tmp_path / "a", kind=Backbone)) is SequenceClassifier
    with pytest.raises(CheckpointError, match="a SequenceClassifier, expected a LanguageModel"):
        load(tmp_path / "a", kind=df.LanguageModel)
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


# --- labels ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_labels_of_minus_100_do_not_count(x, dtype):
    model, labels = classifier().to(dtype), torch.tensor([2, -100, 0, -100])
    x = x.to(dtype)
    close = {} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(model.loss(x, labels), model.loss(x[::2], labels[::2]), **close)
    model.zero_grad()
    loss = model.loss(x, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_logits_that_are_not_finite_do_not_count_under_a_label_of_minus_100(x):
    model, labels, seen = classifier(), torch.tensor([2, -100, 0, 1]), []

    def plant(module, args, logits):
        seen.append(logits.index_fill(0, torch.tensor([1]), torch.nan))
        seen[0].retain_grad()
        return seen[0]

    want = model.loss(x, labels)
    model.head.register_forward_hook(plant)
    loss = model.loss(x, labels)
    loss.backward()
    torch.testing.assert_close(loss, want)
    assert seen[0].grad.isfinite().all() and not seen[0].grad[1].any() and seen[0].grad[0].any()


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (torch.tensor([0.0, 1.0, 1.7, 2.0]), "SequenceClassifier: labels is torch.float32, expected int32 or int64"),
        (torch.tensor([0, 1, 2, 3]), "labels holds 3, expected 0 to 2"),
        (torch.tensor([0, -1, 2, 1]), "labels holds -1"),
        (torch.tensor([True, False, True, True]), r"labels is torch.bool.*\n.*labels.long\(\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(x, labels, says):
    with pytest.raises(ArgumentError, match=says):
        classifier().loss(x, labels)


# --- long streams, and what a state holds ---


def test_the_mean_of_a_long_stream_is_still_the_mean_and_still_moves():
    """Set a thousand million elements back: a float32 sum would no longer move, and the mean would sink."""
    model = classifier().float()
    x = torch.randn(1, 2, generator=torch.Generator().manual_seed(0))
    _, state = model.step(x, model.init_state(1))
    settled = state.blocks
    seen = torch.tensor([10**9])
    mean = torch.linspace(0.5, 1, model.config.d_model, dtype=torch.float64)
    state = state._replace(pooled=(mean * 10**9)[None].to(state.pooled.dtype), seen=seen)
    before = state.pooled.double()
    with torch.no_grad():
        for _ in range(100):
            state = state._replace(blocks=clone(settled))
            y, state = model.step(x, state)
    feature = model.features(x[:, None], clone(settled))[0][0, 0].double()
    moved = (state.pooled.double() - before)[0]
    torch.testing.assert_close(moved, 100 * feature, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y[0], model.head(mean.float()), rtol=1e-5, atol=1e-5)
    assert state.seen.item() == 10**9 + 100


@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_is_pooled_does_not_hold_on_to_the_features(pooling, x):
    with torch.no_grad():
        _, state = classifier(pooling)(x)
    for leaf in leaves(state.pooled):
        assert leaf.untyped_storage().nbytes() == leaf.nbytes


# --- intervals and rate ---


@pytest.mark.parametrize("pooling", POOLINGS)
def test_intervals_reach_the_mixers_padded_packed_and_stepped(pooling, x):
    model = classifier(pooling, pattern="SS")
    times = torch.rand(4, 9, dtype=torch.float64) + 0.5
    want, _ = model(x, intervals=times)
    assert not torch.allclose(want, model(x)[0])
    packed, _ = model(x.view(1, 36, 2), intervals=times.view(1, 36), cu_seqlens=torch.arange(5) * 9)
    torch.testing.assert_close(packed, want)
    _, state = model(x[:, :8], intervals=times[:, :8])
    torch.testing.assert_close(model.step(x[:, 8], state, interval=times[:, 8])[0], want)
    with torch.no_grad():
        _, state = model(x[:, :8], intervals=times[:, :8])
        torch.testing.assert_close(model.prepare().step(x[:, 8], state, interval=times[:, 8])[0], want)
    keep = torch.arange(9) >= torch.tensor([[0], [2], [9], [5]])
    padded, _ = model(x, intervals=times, attention_mask=keep)
    torch.testing.assert_close(padded[1:2], model(x[1:2, 2:], intervals=times[1:2, 2:])[0])
    labels = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(model.loss(x, labels, intervals=times), F.cross_entropy(want, labels))


def test_rate_reaches_the_mixers(x):
    model = classifier(pattern="SS")
    want, _ = model(x, rate=2.0)
    assert not torch.allclose(want, model(x)[0])
    torch.testing.assert_close(want, model(x, intervals=torch.full((4, 9), 2.0))[0])  # zero-order hold
    _, state = model(x[:, :8], rate=2.0)
    torch.testing.assert_close(model.step(x[:, 8], state, rate=2.0)[0], want)
    with torch.no_grad():
        _, state = model(x[:, :8], rate=2.0)
        torch.testing.assert_close(model.prepare(rate=2.0).step(x[:, 8], state)[0], want)
    with pytest.raises(ArgumentError, match="SequenceClassifier: part 'L': rate is given, and LSTM does not take it"):
        classifier()(x, rate=2.0)
    with torch.no_grad(), pytest.raises(ArgumentError, match="part 'L': rate is given"):
        classifier().prepare(rate=2.0)
