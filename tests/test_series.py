"""Estimators of sequences: what they take, what they refuse, and what they learn."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.layers.s4d import S4DConfig
from dualform.series import DeepClassifier, DeepRegressor
from dualform.series.calibration import calibrate
from dualform.series.members import split
from dualform.series.panel import panel
from dualform.series.plan import held_out_share, plan
from dualform.series.split import held_out_rows
from dualform.series.training import Examples, held_out_loss, train

SMALL = df.ModelConfig(0, 16, {"S": (S4DConfig(d_state=4, bidirectional=True),)}, "S", dropout=0.1)
QUICK = {"model": SMALL, "lr": 0.02, "random_state": 0}


def waves(count: int = 24, length: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Slow and fast waves of random phase, and their names."""
    source = np.random.default_rng(0)
    fast = np.arange(count) % 2
    phase = source.uniform(0, 6, count)[:, None]
    return np.sin((1 + 2 * fast[:, None]) * np.linspace(0, 6, length) + phase), np.where(fast, "fast", "slow")


def ragged() -> tuple[list[np.ndarray], np.ndarray]:
    X, y = waves()
    return [one[: 12 + i % 9] for i, one in enumerate(X)], y


def test_one_set_in_many_forms_is_one_panel():
    values = np.random.default_rng(0).normal(size=(3, 4, 2))
    expected = panel("test", values)
    index = pd.MultiIndex.from_product([range(3), [0.5, 1.0, 1.5, 2.0]])
    forms = {
        "channels first": panel("test", values.swapaxes(1, 2), channels_first=True),
        "a list": panel("test", list(values)),
        "a tensor": panel("test", torch.from_numpy(values)),
        "levels": panel("test", pd.DataFrame(values.reshape(12, 2), index=index)),
        "cells": panel("test", pd.DataFrame({c: [pd.Series(one) for one in values[..., c]] for c in (0, 1)})),
        "a series": panel("test", pd.Series(list(values))),
    }
    for name, found in forms.items():
        assert torch.equal(found.x, expected.x), name
        assert torch.equal(found.lengths, torch.tensor([4, 4, 4])), name
        assert found.names is None or name == "levels", name
    table = panel("test", pd.DataFrame(values[..., 0]).to_numpy())
    assert torch.equal(table.x, expected.x[..., :1])


def test_padding_is_nan_and_holes_are_no_padding():
    given = panel("test", np.array([[1.0, np.nan, 3.0, np.nan], [1.0, 2.0, np.nan, np.nan]]))
    assert given.lengths.tolist() == [3, 2] and given.x.shape == (2, 3, 1)
    assert given.holes and not given.take(torch.tensor([1])).holes
    assert given.filled()[..., 0].nan_to_num(7).tolist() == [[1, 7, 3], [1, 2, 0]]


REFUSED = {
    "empty": ([np.ones(3), np.ones(0)], "row 1 of X is empty"),
    "only NaN": ([np.ones(3), np.full(3, np.nan)], r"row 1 of X has no values"),
    "channels": ([np.ones((3, 2)), np.ones((4, 2)), np.ones((3, 3))], "row 2 of X has 3 channels, row 0 has 2"),
    "infinite": ([np.ones(3), np.array([0, 1, np.inf])], "row 1 of X is inf in element 2, channel 0"),
    "a word": ([[1.0, 2.0], ["high"]], "row 1 of X is not of numbers"),
    "axes": ([np.ones((2, 2, 2))], "row 0 of X has 3 axes"),
    "no sequences": (np.ones((0, 5, 1)), "no sequences"),
    "a number": (3.0, "X is float"),
    "named": (pd.Series([np.ones(3), np.ones(0)], index=["ok", "pump"]), r"row 1 \('pump'\) of X is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_sequence_that_cannot_be_read_is_named(case):
    X, says = REFUSED[case]
    with pytest.raises(ArgumentError, match=says):
        panel("test", X)


@pytest.mark.parametrize(("times", "says"), [([0, 2, 1], "time 1 after 2"), ([0, 1, 1], "time 1 twice")])
def test_times_must_rise(times, says):
    index = pd.MultiIndex.from_arrays([["a"] * 3 + ["b"] * 3, [0, 1, 2, *times]])
    with pytest.raises(ArgumentError, match=f"sequence 'b' has {says}"):
        panel("test", pd.DataFrame({"v": range(6)}, index=index))


def test_answers_that_cannot_be_learned_are_named():
    X, y = waves(6)
    with pytest.raises(ArgumentError, match="one class only, 'slow', in all 6 rows"):
        DeepClassifier(**QUICK).fit(X, ["slow"] * 6)
    with pytest.raises(ArgumentError, match="X has 6 sequences, y has 5"):
        DeepClassifier(**QUICK).fit(X, y[:5])
    with pytest.raises(ArgumentError, match=r"2 sequences are too few to hold out 0\.2"):
        DeepRegressor(**QUICK, validation=0.2).fit(X[:2], [1.0, 2.0])
    with pytest.raises(ArgumentError, match="class_weight has 'middle', which is none of the classes: fast, slow"):
        DeepClassifier(**QUICK, class_weight={"middle": 2}).fit(X, y)
    with pytest.raises(ArgumentError, match="members is 0"):
        DeepClassifier(**QUICK, members=0).fit(X, y)


ANSWERS = {
    "nan": ([1, 2, np.nan], "row 2 of y is nan, expected a finite number", "row 2 of y is nan, expected a label"),
    "infinite": ([1, np.inf, 2], "row 1 of y is inf, expected a finite number", "row 1 of y is inf, expected a label"),
    "none": (["a", None, "b"], "row 0 of y is 'a', expected a finite number", "row 1 of y is None, expected a label"),
    "of pandas": (pd.Series(["a", "b", pd.NA]), "row 0 of y is 'a'", "row 2 of y is <NA>, expected a label"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_that_is_none_is_named(case):
    y, of_numbers, of_classes = ANSWERS[case]
    for kind, says in ((DeepRegressor, of_numbers), (DeepClassifier, of_classes)):
        with pytest.raises(ArgumentError, match=says):
            kind(**QUICK).fit(np.ones((3, 5)), y)


OPTIONS = {
    "model": ({"model": "s4d"}, "model is 's4d', expected a ModelConfig, or None"),
    "steps": ({"steps": 2.5}, r"steps is 2\.5, expected a positive whole number"),
    "words": ({"steps": "many"}, "steps is 'many', expected a positive whole number"),
    "lr": ({"lr": float("nan")}, "lr is nan, expected a positive number"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_cannot_be_is_named(case):
    options, says = OPTIONS[case]
    with pytest.raises(ArgumentError, match=says):
        DeepClassifier(**QUICK | options).fit(*waves(6))


def test_a_word_in_a_table_is_named():
    frame = pd.DataFrame({"a": [1, 2], "b": [1, "high"]}, index=["north", "south"])
    with pytest.raises(ArgumentError, match=r"row 1 \('south'\) of X is 'high' in column 1, expected a number"):
        DeepClassifier(**QUICK).fit(frame, ["a", "b"])


def test_a_classifier_learns_sequences_of_any_lengths():
    X, y = ragged()
    model = DeepClassifier(**QUICK, steps=80).fit(X, y)
    assert model.score(X, y) > 0.9
    padded = np.full((len(X), 20), np.nan)
    for row, one in zip(padded, X, strict=True):
        row[: len(one)] = one
    again = DeepClassifier(**QUICK, steps=80).fit(padded, y)
    np.testing.assert_array_equal(again.predict_proba(padded), model.predict_proba(X))
    assert model.predict(padded[:, :5]).shape == (24,) and model.n_features_in_ == 1
    assert model.predict([one[:7] for one in X]).shape == (24,)
    with pytest.raises(ArgumentError, match="have 2 channels, expected 1, as in fit"):
        model.predict([np.ones((9, 2))])
    with pytest.raises(ValueError, match="X has 5 features, but DeepClassifier is expecting 20"):
        again.predict(padded[:, :5])


def test_what_is_said_of_a_sequence_does_not_depend_on_others():
    X, y = ragged()
    model = DeepClassifier(**QUICK, steps=2).fit(X, y)
    alone = np.concatenate([model.predict_proba([one]) for one in X])
    np.testing.assert_allclose(model.predict_proba(X), alone, rtol=1e-12)


def test_missing_values_are_learned_with():
    X, y = waves()
    X[np.random.default_rng(1).random(X.shape) < 0.3] = np.nan
    model = DeepClassifier(**QUICK, steps=80).fit(X, y)
    assert model.models_[0].entrance.missing == "marked"
    assert model.score(X, y) > 0.9


def test_probabilities_are_the_mean_over_members_wherever_they_are_trained():
    X, y = waves()
    one = DeepClassifier(**QUICK, steps=3, members=2).fit(X, y)
    other = DeepClassifier(**QUICK, steps=3, members=2, n_jobs=2).fit(X, y)
    np.testing.assert_allclose(other.predict_proba(X), one.predict_proba(X), rtol=1e-6)
    x = torch.from_numpy(X)[..., None]
    each = [model.double()(x)[0].softmax(-1) for model in other.models_]
    assert not torch.allclose(each[0], each[1])
    np.testing.assert_allclose(one.predict_proba(X), torch.stack(each).mean(0).detach(), rtol=1e-6)


def test_the_weights_with_the_lowest_held_out_loss_are_kept():
    X, y = waves(40)
    X = X + np.random.default_rng(0).normal(size=X.shape)  # so that it learns by heart
    examples = Examples(panel("test", X), torch.from_numpy((y == "slow").astype(np.int64)))
    learned, held = split(examples, 0.3, seed=0)
    model = df.SequenceClassifier(SMALL, 2, inputs=1)
    looks = train(model, learned, plan(28, steps=200, lr=0.02), held_out=held)
    lowest = min(look.held_out for look in looks)
    assert lowest < looks[-1].held_out and looks[-1].step < 200  # it stopped early
    assert held_out_loss(model, held) == pytest.approx(lowest, rel=1e-5) and not model.training


def test_probabilities_are_made_as_high_as_they_are_right():
    model, source = df.SequenceClassifier(SMALL, 3, inputs=1), torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, dtype=torch.float64, generator=source)
    y = (4 * logits).softmax(-1).multinomial(1, generator=source)[:, 0]  # of a model that is not sure enough
    before = model.head.weight.clone()
    factor = calibrate(model, logits, y)
    assert factor == pytest.approx(4, rel=0.1)
    torch.testing.assert_close(model.head.weight, factor * before)
    sure = calibrate(model, 30 * F.one_hot(torch.arange(3)).double(), torch.arange(3))
    assert sure < 0.2  # three examples that are right are no proof of certainty


def test_every_class_is_held_out_and_learned():
    y = torch.tensor([0] * 50 + [1] * 10 + [2])
    rows = held_out_rows(y, 0.2, seed=3)
    zeros, ones = y[rows].bincount().tolist()  # and no 2, which would not be learned
    assert abs(zeros - 10) <= 1 and abs(ones - 2) <= 1
    assert not torch.equal(rows, held_out_rows(y, 0.2, seed=4))
    values = torch.linspace(0, 1, 100)[torch.randperm(100)][:, None]
    held = values[held_out_rows(values, 0.1, seed=0)].sort(0).values[:, 0]
    assert ((held >= torch.arange(10) / 10 - 0.01) & (held <= torch.arange(1, 11) / 10 + 0.01)).all()


def test_the_plan_follows_the_number_of_sequences():
    assert (plan(20).batch, plan(20).steps) == (20, 400)
    assert (plan(6_400).batch, plan(6_400).steps) == (32, 4_000)
    assert plan(10**9).steps == 20_000
    assert held_out_share("test", "auto", 399) == 0 < held_out_share("test", "auto", 400)
    assert held_out_share("test", None, 10**6) == 0


def test_an_estimator_is_pickled_as_arrays():
    X, y = ragged()
    model = DeepClassifier(**QUICK, steps=3).fit(X, y)
    data = pickle.dumps(model)
    assert b"torch" not in data
    np.testing.assert_array_equal(pickle.loads(data).predict_proba(X), model.predict_proba(X))


def test_a_regressor_answers_in_the_units_of_y(tmp_path):
    X, _ = waves(40)
    y = np.stack([1000 + 50 * X.mean(1), 0.01 * X[:, 0]], 1)
    model = DeepRegressor(**QUICK, steps=150).fit(X, y)
    assert model.score(X, y) > 0.7
    df.save(model.models_[0], tmp_path)
    alone, _ = df.load(tmp_path).double().eval()(torch.from_numpy(X)[..., None])
    np.testing.assert_allclose(alone.detach(), model.predict(X), rtol=1e-9)
    assert DeepRegressor(**QUICK, steps=2).fit(X, y[:, 0]).predict(X).shape == (40,)


def test_some_more_sequences_are_learned():
    X, y = waves()
    model = DeepClassifier(**QUICK).partial_fit(X, y, classes=["fast", "middle", "slow"])
    first = model.score(X, y)
    for _ in range(12):
        model.partial_fit(X, y)
    assert model.score(X, y) > max(first, 0.9)
    with pytest.raises(ArgumentError, match="row 1 has the label 'broken', which is none of the classes: fast, middle"):
        model.partial_fit(X[:2], ["fast", "broken"])
    numbers = 500 + X.mean(1)
    regressor = DeepRegressor(**QUICK).partial_fit(X, numbers)
    errors = [np.square(regressor.partial_fit(X, numbers).predict(X) - numbers).mean() for _ in range(8)]
    assert errors[-1] < 0.5 * numbers.var() and errors[-1] < errors[0]


def test_a_rare_class_counts_as_much_as_the_others():
    X, y = waves(40)
    keep = np.r_[0:4, 4:40:2]  # two of one class
    X, y = X[keep], y[keep]
    weighed = DeepClassifier(**QUICK, steps=30, class_weight="balanced").fit(X, y).predict_proba(X)
    plain = DeepClassifier(**QUICK, steps=30).fit(X, y).predict_proba(X)
    assert weighed[y == "fast", 0].mean() > plain[y == "fast", 0].mean()


def test_what_is_learned_does_not_depend_on_where_zero_is():
    X, y = waves()
    near = DeepClassifier(**QUICK, steps=40).fit(X, y).predict_proba(X)
    far = DeepClassifier(**QUICK, steps=40).fit(X + 1e8, y).predict_proba(X + 1e8)  # float32 would see steps of 8
    np.testing.assert_allclose(far, near, atol=1e-3)
