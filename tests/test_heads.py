"""What classifiers and regressors do with padding, missing values, scales, targets and streams; labels by element."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dualform as df
from dualform.core.errors import ArgumentError, CheckpointError, ConfigError
from dualform.core.packing import from_lengths
from dualform.core.tree import clone, leaves
from dualform.layers.lstm import LSTMConfig
from dualform.layers.s4d import S4DConfig
from dualform.models.heads import HEADS, SequenceClassifier, SequenceRegressor, StepClassifier, StepRegressor

NAN = float("nan")
LENGTHS = torch.tensor([9, 1, 6, 3])
KEEP = torch.arange(9) < LENGTHS[:, None]


def config(bidirectional: bool = False) -> df.ModelConfig:
    parts = {"S": (S4DConfig(d_state=4, bidirectional=bidirectional),), "L": (LSTMConfig(),)}
    return df.ModelConfig(vocab_size=0, d_model=8, parts=parts, pattern="S" if bidirectional else "SL")


def build(kind: Any, outputs: Any = 3, *, bidirectional: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(config(bidirectional), outputs, inputs=2, **options).double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


close = torch.testing.assert_close

# --- one output per element ---


@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_element_has_an_output_padded_packed_and_alone(bidirectional, x):
    model = build(StepClassifier, bidirectional=bidirectional)
    y, state = model(x, lengths=LENGTHS)
    assert y.shape == (4, 9, 3) and (state == ()) == bidirectional
    for i, n in enumerate(LENGTHS):
        close(y[i : i + 1, :n], model(x[i : i + 1, :n])[0])
        assert not y[i, n:].any()
    close(model(x[KEEP][None], cu_seqlens=from_lengths(LENGTHS))[0][0], y[KEEP])
    close(model(x)[0], model.head(model.features(x)[0]))
    if bidirectional:
        with pytest.raises(ArgumentError, match="bidirectional model has no state"):
            model.init_state(1)


def test_a_stream_has_an_output_at_each_step(x):
    model = build(StepRegressor, quantiles=(0.1, 0.9))
    whole, end = model(x)
    assert whole.shape == (4, 9, 3, 2)
    state = model.init_state(4)
    with torch.no_grad():
        steps = model.prepare()
        for t in range(9):
            y, state = steps.step(x[:, t], state)
            close(y, whole[:, t])
    close(list(leaves(state)), list(leaves(end)))


@pytest.mark.parametrize("several", [False, True])
def test_labels_at_padding_do_not_count(several, x):
    model = build(StepClassifier, multi_label=several)
    labels = (draw(4, 9, 3) > 0) if several else torch.arange(36).view(4, 9) % 3
    y = model(x, lengths=LENGTHS)[0][KEEP]
    want = F.binary_cross_entropy_with_logits(y, labels[KEEP].double()) if several else F.cross_entropy(y, labels[KEEP])
    close(model.loss(x, labels, lengths=LENGTHS), want)
    close(model.loss(x, labels, attention_mask=KEEP.long()), want)
    packed = {"cu_seqlens": from_lengths(LENGTHS)}
    close(model.loss(x[KEEP][None], labels[KEEP][None], **packed), want)


def test_targets_at_padding_do_not_count(x):
    model, targets = build(StepRegressor), draw(4, 9, 3)
    want = F.mse_loss(model(x, lengths=LENGTHS)[0][KEEP], targets[KEEP])
    targets = targets.masked_fill(~KEEP[..., None], NAN)
    close(model.loss(x, targets, lengths=LENGTHS), want)
    with pytest.raises(ArgumentError, match="targets holds nan in row"):
        model.loss(x, targets)


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_loss_leaves_padding_out(x):
    for kind, targets in ((StepRegressor, draw(4, 9, 3)), (StepClassifier, torch.arange(36).view(4, 9) % 3)):
        model = build(kind, bidirectional=True)
        want = model.loss(x, targets, attention_mask=KEEP)
        got = torch.compile(model.loss, backend="eager")(x, targets, attention_mask=KEEP)
        close(got, want)


# --- padding ---


@pytest.mark.parametrize("kind", HEADS.values())
def test_lengths_are_the_mask_everywhere(kind, x):
    model = build(kind)
    mask = KEEP.long()
    for call in (model, model.features):
        close(call(x, lengths=LENGTHS)[0], call(x, attention_mask=mask)[0])
    h, state = model.features(x, lengths=LENGTHS)
    for i, n in enumerate(LENGTHS):
        alone, end = model.features(x[i : i + 1, :n])
        close(h[i : i + 1, :n], alone)
        close([leaf[i : i + 1] for leaf in leaves(state)], list(leaves(end)))
    with pytest.raises(ArgumentError, match="lengths holds 10, expected 0 to 9"):
        model(x, lengths=LENGTHS + 1)
    with pytest.raises(ArgumentError, match="give one of cu_seqlens, attention_mask and lengths"):
        model(x, lengths=LENGTHS, attention_mask=mask)
    with pytest.raises(ArgumentError, match="lengths has shape"):
        model(x, lengths=LENGTHS[:2])


def test_what_stands_at_padding_may_be_anything(x):
    model = build(SequenceClassifier)
    close(model(x.masked_fill(~KEEP[..., None], NAN), lengths=LENGTHS), model(x, lengths=LENGTHS))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [SequenceRegressor, StepRegressor])
def test_padding_and_packing_leave_gradients_as_they_are(kind, bidirectional, x):
    model = build(kind, bidirectional=bidirectional, missing="marked")
    targets = draw(4, 9, 3) if kind is StepRegressor else draw(4, 3)

    def gradients(x, targets, **given):
        loss = model.loss(x, targets, **given) * (LENGTHS.sum() if kind is StepRegressor else 4)
        return torch.autograd.grad(loss, list(model.parameters()))

    want = [torch.zeros_like(p) for p in model.parameters()]
    for i, n in enumerate(LENGTHS):
        own = targets[i : i + 1, :n] if kind is StepRegressor else targets[i : i + 1]
        loss = model.loss(x[i : i + 1, :n], own) * (n if kind is StepRegressor else 1)
        want = [a + b for a, b in zip(want, torch.autograd.grad(loss, list(model.parameters())), strict=True)]
    packed = {"cu_seqlens": from_lengths(LENGTHS)}
    line = targets[KEEP][None] if kind is StepRegressor else targets
    for got in (
        gradients(x, targets, lengths=LENGTHS),
        gradients(x, targets, attention_mask=KEEP.long()),
        gradients(x[KEEP][None], line, **packed),
    ):
        close(list(got), want)


# --- values that are missing, and scales ---


def test_what_is_not_finite_is_refused_and_placed(x):
    x[2, 4, 1] = NAN
    for kind in HEADS.values():
        model = build(kind)
        with pytest.raises(ArgumentError, match=r"x holds nan in row 2, element 4, channel 1.*\n.*missing="):
            model(x)
        with pytest.raises(ArgumentError, match="row 2, element 4, channel 1"):
            model(x, lengths=torch.tensor([9, 3, 8, 2]))
        state = model.init_state(4)
        with pytest.raises(ArgumentError, match="row 2, channel 1"):
            model.step(x[:, 4], state)
    x[2, 4, 1] = torch.inf
    with pytest.raises(ArgumentError, match="x holds inf in row 2"):
        build(SequenceClassifier, missing="carried")(x)
    assert build(SequenceClassifier, missing="passed")(x)[0].isfinite().all(1).tolist() == [True, True, False, True]


def test_a_missing_value_is_the_mean_and_marked(x):
    model = build(SequenceClassifier, missing="marked", standardise=True)
    model.fit_inputs(3 * x + 1)
    x[2, 4, 1] = NAN
    scaled = torch.cat([(3 * x + 1 - model.entrance.mean) / model.entrance.deviation, x.isnan().double()], -1)
    seen = []
    model.embed.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(3 * x + 1)
    close(seen[0], scaled.nan_to_num(0))
    assert seen[0][2, 4].tolist()[1:] == [0, 0, 1]


def test_the_last_value_is_carried_in_pieces_packed_and_stepped(x):
    model = build(StepRegressor, missing="carried")
    gone = torch.rand(4, 9, 2, generator=torch.Generator().manual_seed(3)) < 0.5
    filled = x.clone()
    for t in range(9):
        before = filled[:, t - 1] if t else torch.zeros(4, 2, dtype=x.dtype)
        filled[:, t] = torch.where(gone[:, t], before, filled[:, t])
    want, end = build(StepRegressor)(filled)
    holes = x.masked_fill(gone, NAN)
    y, state = model(holes)
    close(y, want)
    close(state[-1], filled[:, -1])
    first, middle = model(holes[:, :4])
    second, _ = model(holes[:, 4:], clone(middle))
    close(torch.cat([first, second], 1), want)
    for t in range(4, 9):
        y, middle = model.step(holes[:, t], middle)
        close(y, want[:, t])
    packed, state = model(holes[KEEP][None], cu_seqlens=from_lengths(LENGTHS))
    close(packed[0], want[KEEP])
    close(state[-1], filled[range(4), LENGTHS - 1])
    with pytest.raises(ArgumentError, match="state is not a tuple of 3, one per block, and the last values"):
        model(x, end)


@pytest.mark.parametrize("missing", ["refused", "marked", "carried"])
def test_inputs_are_scaled_inside_of_the_model(missing, x, tmp_path):
    model = build(SequenceClassifier, standardise=True, missing=missing)
    shifted = torch.tensor([100.0, 1e-3]) * x + torch.tensor([5000.0, -2.0])
    model.fit_inputs(shifted, lengths=LENGTHS)
    close(model.entrance.mean, shifted[KEEP].mean(0))
    close(model.entrance.deviation, shifted[KEEP].std(0, correction=0))
    plain = build(SequenceClassifier, missing=missing)
    close(
        model(shifted, lengths=LENGTHS)[0],
        plain((x - x[KEEP].mean(0)) / x[KEEP].std(0, correction=0), lengths=LENGTHS)[0],
    )
    model.save(tmp_path)
    again = df.load(tmp_path, kind=SequenceClassifier)
    close(again(shifted)[0], model(shifted)[0], rtol=0, atol=0)
    assert again.entrance is not None and again.entrance.options == {
        "standardise": True,
        **({} if missing == "refused" else {"missing": missing}),
    }


def test_a_constant_channel_and_one_without_values_are_left(x):
    model = build(SequenceClassifier, standardise=True, missing="marked")
    x[..., 0] = 0.1
    x[..., 1] = NAN
    model.fit_inputs(x)
    close(model.entrance.mean, torch.tensor([0.1, 0.0], dtype=torch.float64))
    assert model.entrance.deviation.tolist() == [1, 1]
    with pytest.raises(ArgumentError, match=r"does not scale its inputs\n.*standardise=True"):
        build(SequenceClassifier).fit_inputs(x)


# --- targets ---


def test_class_weights_and_label_smoothing(x):
    model, labels = build(SequenceClassifier), torch.tensor([0, 2, -100, 1])
    logits, weights = model(x)[0], torch.tensor([1.0, 0.5, 4.0], dtype=torch.float64)
    for smoothing in (0.0, 0.3):
        want = F.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
        close(model.loss(x, labels, class_weights=weights, label_smoothing=smoothing), want)
        close(
            model.loss(x, labels, label_smoothing=smoothing), F.cross_entropy(logits, labels, label_smoothing=smoothing)
        )
    assert model.loss(x, torch.full((4,), -100), class_weights=weights) == 0
    for wrong in (torch.tensor([1.0, -1.0, 1.0]), torch.zeros(3), torch.tensor([1.0, NAN, 1.0])):
        with pytest.raises(ArgumentError, match=r"class_weights is .*, expected numbers from 0, not all 0"):
            model.loss(x, labels, class_weights=wrong)
    with pytest.raises(ArgumentError, match=r"class_weights has shape \(2,\)"):
        model.loss(x, labels, class_weights=torch.ones(2))
    with pytest.raises(ArgumentError, match=r"label_smoothing is 1.0, expected at least 0"):
        model.loss(x, labels, label_smoothing=1.0)


def test_several_labels_at_once(x):
    model, labels = build(SequenceClassifier, multi_label=True), draw(4, 3) > 0
    logits = model(x)[0]
    close(model.loss(x, labels), F.binary_cross_entropy_with_logits(logits, labels.double()))
    weights = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    each = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
    close(model.loss(x, labels, class_weights=weights), (each * weights).sum() / (4 * weights.sum()))
    smooth = F.binary_cross_entropy_with_logits(logits, 0.8 * labels.double() + 0.1)
    close(model.loss(x, labels, label_smoothing=0.2), smooth)
    with pytest.raises(ArgumentError, match="labels holds 2, expected 0 to 1"):
        model.loss(x, 2 * torch.ones(4, 3))
    with pytest.raises(ArgumentError, match=r"labels has shape \(4,\)"):
        model.loss(x, torch.zeros(4, dtype=torch.int64))


def test_quantiles_are_those_of_the_targets_where_the_loss_is_least():
    """The constant that makes the pinball loss least is the quantile."""
    torch.manual_seed(0)
    q = (0.1, 0.5, 0.9)
    model = SequenceRegressor(config(), 1, inputs=2, quantiles=q).double()
    targets = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None] ** 2
    x = torch.zeros(101, 1, 2, dtype=torch.float64)
    torch.nn.init.zeros_(model.head.weight)

    def loss(at: list[float]) -> float:
        model.head.bias.data = torch.tensor(at, dtype=torch.float64)
        return model.loss(x, targets).item()

    best = targets.quantile(torch.tensor(q, dtype=torch.float64)).tolist()
    assert model(x)[0].shape == (101, 1, 3)
    for i in range(3):
        for by in (-0.02, 0.02):
            assert loss([b + by * (i == j) for j, b in enumerate(best)]) > loss(best)


def test_targets_that_are_no_numbers_are_refused(x):
    model = build(SequenceRegressor)
    with pytest.raises(ArgumentError, match="targets holds nan in row 1"):
        model.loss(x, torch.tensor([[0.0] * 3, [NAN] * 3, [0.0] * 3, [1.0] * 3]))
    with pytest.raises(ArgumentError, match=r"targets is torch.int64, expected a floating dtype"):
        model.loss(x, torch.zeros(4, 3, dtype=torch.int64))


# --- streams ---


def test_pooling_starts_anew_while_the_blocks_remember(x):
    model = build(SequenceClassifier)
    _, state = model(x[:, :5])
    h = model.features(x)[0]
    fresh = model.reset(clone(state))
    close(model(x[:, 5:], fresh)[0], model.head(h[:, 5:].mean(1)))
    some = model.reset(clone(state), torch.tensor([True, False, False, True]))
    want = model.head(h[:, 5:].mean(1)), model.head(h.mean(1))
    y, _ = model(x[:, 5:], some)
    close(y[[0, 3]], want[0][[0, 3]])
    close(y[[1, 2]], want[1][[1, 2]])
    with pytest.raises(ArgumentError, match=r"rows is torch.int64, expected bool"):
        model.reset(state, torch.tensor([0, 1, 2, 3]))


def test_a_window_forgets_what_is_behind_it(x):
    for pooling in ("window", "forgetting"):
        model = build(SequenceClassifier, pooling=pooling, window=3)
        with torch.no_grad():
            _, state = model(x)
            loud = state._replace(pooled=state.pooled + 1e3)
            held, y = clone(state.blocks), None
            for _ in range(3 if pooling == "window" else 300):
                y, loud = model.step(x[:, 0], loud._replace(blocks=clone(held)))
        h = model.features(x[:, :1], held)[0][:, 0]
        close(y, model.head(h))


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("pooling", ["window", "forgetting"])
def test_one_program_pools_any_length(pooling, x):
    model, programs = build(SequenceClassifier, pooling=pooling, window=3, bidirectional=True), []

    def count(program, _):
        programs.append(program)
        return program.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=count, dynamic=True, fullgraph=True)
    for length in (5, 9, 7):
        part = x[:, :length].contiguous()
        close(compiled(part)[0], model(part)[0])
    assert len(programs) == 1


# --- options and files ---


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SequenceClassifier, {"pooling": "window", "window": 3, "multi_label": True}),
        (SequenceClassifier, {"pooling": "attention", "missing": "marked"}),
        (SequenceRegressor, {"quantiles": (0.1, 0.9), "pooling": "forgetting", "window": 5}),
        (StepClassifier, {"standardise": True, "missing": "carried"}),
        (StepRegressor, {"quantiles": (0.5,)}),
    ],
)
def test_saving_and_loading(kind, options, tmp_path, x):
    model = build(kind, **options)
    df.save(model, tmp_path)
    again = df.load(tmp_path)
    assert type(again) is kind and again.head_options() == model.head_options()
    close(again(x)[0], model(x)[0], rtol=0, atol=0)


def test_names_of_classes_are_saved(tmp_path):
    model = SequenceClassifier(config(), ["walks", "sits", "lies"], inputs=2)
    model.save(tmp_path)
    again = df.load(tmp_path, kind=SequenceClassifier)
    assert again.outputs == 3 and again.class_names == ("walks", "sits", "lies")
    assert SequenceClassifier(config(), 3, inputs=2).class_names is None


def test_a_head_as_it_was_saved_before_these_options(tmp_path, x):
    model = build(SequenceClassifier, pooling="max")
    model.save(tmp_path)
    head = json.loads((tmp_path / "config.json").read_text())["head"]
    assert head == {"kind": "SequenceClassifier", "outputs": 3, "inputs": 2, "pooling": "max"}
    assert {name for name in model.state_dict() if not name.startswith("blocks")} == {
        "embed.weight",
        "embed.bias",
        "norm.weight",
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"missing": "guessed"}, "missing is 'guessed', expected one of"),
        ({"windo": 3}, "head: unknown key 'windo'"),
        ({"window": 3}, "window is 3, and pooling 'mean' has none"),
        ({"class_names": ["a", "b"]}, "2 class_names for 3 outputs"),
        ({"class_names": [1, 2, 3]}, "class_names is"),
        ({"quantiles": [0.5]}, "unknown keyword 'quantiles'"),
        ({"standardise": 1}, "standardise is 1"),
    ],
)
def test_a_head_that_cannot_be_is_named(change, says, tmp_path):
    build(SequenceClassifier).save(tmp_path)
    path = tmp_path / "config.json"
    about = json.loads(path.read_text())
    about["head"] |= change
    path.write_text(json.dumps(about))
    with pytest.raises((CheckpointError, ConfigError), match=says) as error:
        df.load(tmp_path)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: build(SequenceClassifier, pooling="window"), "window is None, expected at least 1 element"),
        (lambda: build(SequenceClassifier, pooling="forgetting", window=0), "window is 0"),
        (lambda: build(SequenceClassifier, window=3), "pooling 'mean' has none"),
        (lambda: build(SequenceClassifier, missing="x"), "SequenceClassifier: missing is 'x'"),
        (lambda: build(SequenceClassifier, ["a"]), "1 outputs, expected at least 2"),
        (lambda: build(SequenceClassifier, ["a", "a"]), "names 'a' twice"),
        (lambda: build(SequenceClassifier, "ab"), "one name for each"),
        (lambda: build(SequenceRegressor, quantiles=()), "expected numbers between 0 and 1"),
        (lambda: build(StepRegressor, quantiles=(0.5, 1.0)), "expected numbers between 0 and 1"),
        (lambda: StepClassifier(config(), 3), "vocab_size is 0"),
        (lambda: SequenceClassifier(config(), 3, standardise=True), "the model reads tokens"),
    ],
)
def test_bad_options(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
