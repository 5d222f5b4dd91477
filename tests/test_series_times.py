"""Estimators of sequences whose samples do not come evenly, or come at another rate, or are missing."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.layers.bidirectional import BidirectionalConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.s4d import S4DConfig
from dualform.layers.s5 import S5Config
from dualform.series import DeepClassifier, DeepRegressor
from dualform.series.fitting import Fitting, fit
from dualform.series.panel import panel
from dualform.series.tables import read_table
from dualform.series.times import in_steps, usual_step

SMALL = df.ModelConfig(0, 16, {"S": (S4DConfig(d_state=4, bidirectional=True),)}, "S", dropout=0.1)
QUICK = {"model": SMALL, "lr": 0.02, "steps": 60, "random_state": 0}


def waves(times: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Slow and fast waves of random phase at times ``(n, T)``, and their names."""
    source = np.random.default_rng(seed)
    fast = np.arange(len(times)) % 2
    return np.sin((1 + fast[:, None]) * times + source.uniform(0, 6, len(times))[:, None]), np.where(
        fast, "fast", "slow"
    )


def even(count: int = 32, length: int = 24) -> np.ndarray:
    return np.tile(0.4 * np.arange(length), (count, 1))


def uneven(count: int = 32, length: int = 24, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 0.7, (count, length)).cumsum(1)


def test_one_set_of_times_in_many_forms_is_one():
    times, values = uneven(3, 4), np.arange(12.0).reshape(3, 4)
    want = panel("test", values, times=times).intervals
    torch.testing.assert_close(want[:, 1:], torch.from_numpy(np.diff(times)))
    assert want[:, 0].isnan().all()
    seconds = np.round(times * 1e9).astype("int64").astype("timedelta64[ns]")
    dates = np.datetime64("2026-03-01T12:00:00", "ns") + seconds
    index = pd.MultiIndex.from_arrays([np.repeat(range(3), 4), times.ravel()])
    of_dates = pd.MultiIndex.from_arrays([np.repeat(range(3), 4), dates.ravel()])
    forms = {
        "a list": (values, list(times)),
        "of lists": (list(values), [list(one) for one in times]),
        "a tensor": (values, torch.from_numpy(times)),
        "spans": (values, seconds),
        "dates": (values, dates),
        "objects": (values, pd.Series(list(dates))),
        "index": (pd.DataFrame({"v": values.ravel()}, index=index), "index"),
        "index of dates": (pd.DataFrame({"v": values.ravel()}, index=of_dates), "index"),
    }
    for name, (X, given) in forms.items():
        torch.testing.assert_close(panel("test", X, times=given).intervals, want, equal_nan=True, msg=name)
    shared = panel("test", values, times=times[0]).intervals
    torch.testing.assert_close(shared[:, 1:], torch.from_numpy(np.diff(times[:1])).expand(3, -1))


def test_times_end_with_their_sequence():
    values = np.array([[1.0, 2.0, 3.0, np.nan], [1.0, np.nan, np.nan, np.nan], [1.0, np.nan, 3.0, np.nan]])
    found = panel("test", values, times=np.array([[0, 2, 3, np.nan], [5, 4, 3, 2], [0, 1, 6, 7.0]]))
    assert found.lengths.tolist() == [3, 1, 3] and found.intervals.shape == (3, 3)
    assert in_steps(found.intervals, 2.0).tolist() == [[1, 1, 0.5], [1, 1, 1], [1, 0.5, 2.5]]
    assert usual_step(found.intervals) == 1.0 and usual_step(torch.full((2, 1), torch.nan)) == 1.0


REFUSED = {
    "back": ([[0, 1, 2], [0, 2, 1]], "row 1 of times has 1 after 2 in element 2, expected rising times"),
    "twice": ([[0, 1, 1], [0, 1, 2]], "row 0 of times has 1 twice in element 2"),
    "missing": ([[0, 1, 2], [0, np.nan, 2]], "row 1 of times is nan in element 1, expected finite times"),
    "infinite": ([[0, 1, np.inf], [0, 1, 2]], "row 0 of times is inf in element 2"),
    "too few": ([[0, 1, 2], [0, 1]], r"row 1 has 3 samples, and times of the shape \(2,\)"),
    "too many": ([[0, 1, 2, 3], [0, 1, 2]], r"row 0 has 3 samples, and times of the shape \(4,\)"),
    "rows": ([[0, 1, 2]], "X has 2 sequences, times has 1"),
    "shared": ([0, 1], r"row 0 has 3 samples, and times of the shape \(2,\)"),
    "words": ([["a", "b", "c"], [0, 1, 2]], "row 0 of times is not of numbers or dates"),
    "a word": ("hour", "times is 'hour', expected an array"),
    "a number": (3.0, "times is float, expected an array"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_times_that_cannot_be_meant_are_named(case):
    times, says = REFUSED[case]
    with pytest.raises(ArgumentError, match=says):
        panel("test", np.ones((2, 3)), times=times)


def test_a_row_of_times_is_called_by_its_name():
    frame = pd.DataFrame(np.ones((2, 3)), index=["north", "south"])
    with pytest.raises(ArgumentError, match=r"row 1 \('south'\) of times has 1 twice"):
        DeepClassifier(**QUICK).fit(frame, ["a", "b"], times=[[0, 1, 2], [0, 1, 1]])


BLOCKS = {
    "s4d": S4DConfig(d_state=4, bidirectional=True),
    "s5": S5Config(d_state=4, bidirectional=True),
    "mamba": MambaConfig(d_state=2),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_even_times_change_nothing_and_a_rate_is_a_step(name):
    X, y = waves(even(8))
    options = {**QUICK, "model": df.ModelConfig(0, 8, {"B": (BLOCKS[name],)}, "B"), "steps": 2}
    plain, timed = DeepClassifier(**options).fit(X, y), DeepClassifier(**options).fit(X, y, times=even(8))
    assert timed.step_ == pytest.approx(0.4) and plain.step_ == 1.0
    want = plain.predict_proba(X)
    np.testing.assert_allclose(timed.predict_proba(X, times=even(8)), want, atol=1e-6)
    np.testing.assert_allclose(plain.predict_proba(X, times=np.arange(24)), want, rtol=1e-9)
    twice = plain.predict_proba(X, times=2 * np.arange(24))
    assert np.abs(twice - want).max() > 1e-6
    if name != "mamba":  # whose convolution counts samples, and which takes no rate
        model = plain.models_[0].double()
        intervals = torch.full((8, 12), 2.0, dtype=torch.float64)
        said = model(torch.from_numpy(X[:, ::2, None]), intervals=intervals)[0].softmax(-1)
        np.testing.assert_allclose(plain.predict_proba(X[:, ::2], rate=2), said.detach(), rtol=1e-6)


def test_padding_changes_nothing_where_times_are_uneven():
    times = uneven(8)
    X, y = waves(times)
    lengths = [24, 9, 17, 1, 24, 12, 3, 20]
    rows, taken = ([one[:n] for one, n in zip(array, lengths, strict=True)] for array in (X, times))
    model = DeepClassifier(**QUICK | {"steps": 3}).fit(rows, y, times=taken)
    alone = [model.predict_proba([row], times=[one]) for row, one in zip(rows, taken, strict=True)]
    together = model.predict_proba(rows, times=taken)
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-12)
    padded, at = np.full(X.shape, np.nan), np.full(X.shape, np.nan)
    for i, (row, one) in enumerate(zip(rows, taken, strict=True)):
        padded[i, : len(row)], at[i, : len(row)] = row, one
    np.testing.assert_array_equal(model.predict_proba(padded, times=at), together)


def test_waves_at_random_times_are_told_apart_by_their_times():
    times, unseen = uneven(64), uneven(64, seed=2)
    (X, y), (Z, z) = waves(times), waves(unseen, seed=3)
    model = DeepClassifier(**QUICK).fit(X, y, times=times)
    assert model.score(Z, z, times=unseen) > 0.9


def test_a_sampling_rate_halved_and_missing_samples_cost_little():
    times = even(64, 48) / 2
    (X, y), (Z, z) = waves(times), waves(times, seed=3)
    model = DeepClassifier(**QUICK).fit(X, y)
    whole = model.score(Z, z)
    assert whole > 0.95
    assert model.score(Z[:, ::2], z, rate=2) > whole - 0.02
    gone = np.random.default_rng(0).random(Z.shape) < 0.3
    kept = [np.flatnonzero(~row) for row in gone]
    left_out = [row[at] for row, at in zip(Z, kept, strict=True)]
    assert model.score(left_out, z, times=kept) > whole - 0.03


def test_values_that_are_missing_later_are_on_a_line_where_both_sides_are_read():
    times = uneven(8)
    X, y = waves(times)
    holes = np.where(np.random.default_rng(0).random(X.shape) < 0.3, np.nan, X)
    holes[:, -1] = X[:, -1]
    bridged, carried = holes.copy(), holes.copy()
    for row, one, at in zip(bridged, holes, times, strict=True):
        known = ~np.isnan(one)
        row[:] = np.interp(at, at[known], one[known])
    options = QUICK | {"steps": 2}
    model = DeepClassifier(**options).fit(X, y, times=times)
    np.testing.assert_allclose(
        model.predict_proba(holes, times=times), model.predict_proba(bridged, times=times), rtol=1e-9
    )
    torch.testing.assert_close(panel("test", holes, times=times).bridged().x[..., 0], torch.from_numpy(bridged))
    causal = DeepClassifier(**options | {"model": None, "causal": True}).fit(X, y)
    for row in carried:
        row[:] = pd.Series(row).ffill().to_numpy()
    first = np.isnan(carried[:, 0])  # where nothing is there to carry yet
    said, want = (causal.predict_proba(values[~first]) for values in (holes, carried))
    np.testing.assert_allclose(said, want, rtol=1e-9)


def test_a_regressor_reads_times():
    times = uneven(64)
    X, y = waves(times)
    speed = np.where(y == "fast", 20.0, 10.0)
    model = DeepRegressor(**QUICK).fit(X, speed, times=times)
    assert model.score(X, speed, times=times) > 0.8
    model.partial_fit(X[:4], speed[:4], times=times[:4])
    assert model.predict(X[:, :9], times=times[:, :9]).shape == (64,)


def test_what_is_not_said_of_the_times_is_asked_for():
    X, y = waves(even(8))
    timed = DeepClassifier(**QUICK | {"steps": 1}).fit(X, y, times=even(8))
    with pytest.raises(ArgumentError, match="fit was given times, expected those of these sequences"):
        timed.predict(X)
    with pytest.raises(ArgumentError, match="give times or rate, not both"):
        timed.predict(X, times=even(8), rate=2)
    with pytest.raises(ArgumentError, match="rate is 0, expected a positive number"):
        timed.predict(X, rate=0)
    assert timed.predict(X[:, ::2], rate=2).shape == (8,)
    lstm = df.ModelConfig(0, 8, {"L": (BidirectionalConfig(LSTMConfig()),)}, "L")
    with pytest.raises(ArgumentError, match="intervals is given, and Bidirectional does not take it"):
        DeepClassifier(model=lstm, steps=1).fit(X, y, times=even(8))


def test_a_table_with_uneven_times_is_learned_with_them(tmp_path):
    times = uneven(20, 12)
    X, y = waves(times)
    start = np.datetime64("2026-03-01", "ms")
    rows = [
        (f"p{i}", start + np.timedelta64(int(1000 * at), "ms"), value, y[i])
        for i in range(20)
        for at, value in zip(times[i], X[i], strict=True)
    ]
    pd.DataFrame(rows, columns=["pump", "at", "v", "kind"]).to_csv(tmp_path / "pumps.csv", index=False)
    table = read_table(tmp_path / "pumps.csv", "kind", id="pump", time="at")
    assert table.panel.intervals is not None
    np.testing.assert_allclose(table.panel.intervals[:, 1:], np.diff(times), atol=2e-3)
    about = fit(table, tmp_path / "out", Fitting("kind", steps=2), lambda text: None)
    assert 0.2 < about["step"] < 0.6 and json.loads((tmp_path / "out" / "report.json").read_text())["step"]
    assert "--step" in (tmp_path / "out" / "report.md").read_text()


def test_even_times_of_a_table_are_no_intervals(tmp_path):
    rows = [(i, 60 * t, float(i + t), "ab"[i % 2]) for i in range(4) for t in range(5)]
    pd.DataFrame(rows, columns=["id", "at", "v", "kind"]).to_csv(tmp_path / "even.csv", index=False)
    table = read_table(tmp_path / "even.csv", "kind", id="id", time="at")
    assert table.panel.intervals is None and table.notes == []
