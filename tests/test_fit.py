"""``dualform fit``: tables in, a folder with a model and a report out, and what cannot be learned named."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import dualform as df
from dualform.core.errors import ArgumentError, DataError
from dualform.series.scores import of_classes, of_numbers
from dualform.series.tables import read_table

FILES = {
    *("model", "report.md", "report.json", "predictions.csv"),
    *("confusion.png", "calibration.png", "hardest.png", "training.png"),
}


def waves(count: int = 30, length: int = 12) -> pd.DataFrame:
    """A row for each wave, slow or fast, a column for each step."""
    source = np.random.default_rng(0)
    fast = np.arange(count) % 2
    values = np.sin((1 + 2 * fast[:, None]) * np.linspace(0, 6, length) + source.uniform(0, 6, count)[:, None])
    frame = pd.DataFrame(values, columns=[f"t{i}" for i in range(length)])
    return frame.assign(kind=np.where(fast, "fast", "slow"))


def steps_of(wide: pd.DataFrame) -> pd.DataFrame:
    """The same with a row for each step, and a second channel."""
    rows = [
        {"pump": f"p{i}", "hour": t, "a": value, "b": -value, "kind": kind}
        for i, (*values, kind) in enumerate(wide.itertuples(index=False))
        for t, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_classes_are_learned_and_reported(tmp_path, dualform):
    waves().to_csv(tmp_path / "waves.csv", index=False)
    out = tmp_path / "out"
    code, said, err = dualform("fit", tmp_path / "waves.csv", "--target", "kind", "--out", out, "--steps", "5")
    assert (code, err) == (0, ""), err
    assert "30 sequences of 12 steps, 1 channels; 'kind': 2 classes" in said
    assert {path.name for path in out.iterdir()} == FILES
    about = json.loads((out / "report.json").read_text())
    assert (about["learned"], about["test"], about["classes"]) == (24, 6, ["fast", "slow"])
    assert np.sum(about["scores"]["confusion"]) == 6 and about["cost"]["step_us"] > 0
    page = (out / "report.md").read_text()
    assert all(f"({name})" in page for name in FILES if name.endswith(".png"))
    model = df.load(out).eval()  # as a stream has it
    assert isinstance(model, df.SequenceClassifier) and model.class_names == ("fast", "slow") and model.causal
    predictions = pd.read_csv(out / "predictions.csv")
    row = int(predictions["sequence"][0].removeprefix("line ")) - 2
    state = model.init_state(1)
    for value in waves().iloc[row, :12]:
        logits, state = model.step(torch.tensor([[value]], dtype=torch.float32), state)
    np.testing.assert_allclose(logits.softmax(-1)[0, 0].item(), predictions["p(fast)"][0], atol=1e-4)
    again = dualform("fit", tmp_path / "waves.csv", "--target", "kind", "--out", out)
    assert again[0] == 2 and "there is something already" in again[2]


def test_numbers_are_learned_from_a_row_for_each_step(tmp_path, dualform):
    wide = waves()
    steps_of(wide.assign(kind=100 + wide["t0"])).to_csv(tmp_path / "pumps.tsv", sep="\t", index=False)
    out, how = tmp_path / "out", ["--id", "pump", "--time", "hour", "--steps", "3", "--bidirectional"]
    code, said, err = dualform("fit", tmp_path / "pumps.tsv", "--target", "kind", *how, "--out", out)
    assert (code, err) == (0, ""), err
    assert "2 channels; 'kind': numbers" in said and "a sequence of 12 steps" in said
    model = df.load(out)
    assert isinstance(model, df.SequenceRegressor) and not model.causal and model.inputs == 2
    about = json.loads((out / "report.json").read_text())
    assert about["channels"] == ["a", "b"] and about["scores"]["rmse"] < 10
    assert (out / "numbers.png").exists() and not (out / "confusion.png").exists()


def test_a_folder_and_both_kinds_of_table_are_the_same_sequences(tmp_path):
    wide = waves(4)
    wide.to_csv(tmp_path / "wide.csv", index=False)
    long = steps_of(wide).drop(columns="b")
    long.to_csv(tmp_path / "long.csv", index=False)
    folder = tmp_path / "files"
    folder.mkdir()
    for name, part in long.groupby("pump"):
        part.drop(columns=["pump", "hour"]).to_csv(folder / f"{name}.csv", index=False)
    found = read_table(tmp_path / "wide.csv", "kind")
    for other in (read_table(tmp_path / "long.csv", "kind", id="pump", time="hour"), read_table(folder, "kind")):
        assert torch.equal(other.panel.x, found.panel.x)
        assert other.target.tolist() == found.target.tolist() == ["slow", "fast"] * 2
        assert other.panel.names == ["p0", "p1", "p2", "p3"] and other.channels == ["a"]


def test_times_that_are_not_even_are_noted(tmp_path):
    long = steps_of(waves(2))
    long["hour"] = long["hour"] ** 2
    long.to_csv(tmp_path / "long.csv", index=False)
    (note,) = read_table(tmp_path / "long.csv", "kind", id="pump", time="hour").notes
    assert note == "times are not even, such as 1 in 'p0' and 21 in 'p0': the model reads the intervals, in steps of 11"


def broken(name: str) -> tuple[pd.DataFrame, dict[str, str]]:
    """A table with something wrong, and how it is read."""
    wide, long = waves(4), steps_of(waves(4))
    how = {"id": "pump", "time": "hour"}
    if name == "a word":
        return wide.astype({"t3": object}).assign(t3=[0, 1, "high", 3]), {}
    if name == "no target":
        return wide.assign(kind=["slow", None, "fast", "slow"]), {}
    if name == "infinite":
        return wide.assign(t1=[0, 0, 0, np.inf]), {}
    if name == "empty":
        return wide.assign(**{f"t{i}": [1, np.nan, 1, 1] for i in range(12)}), {}
    if name == "times":
        return long.assign(hour=[5, *range(1, 48)]), how
    if name == "two targets":
        return long.assign(kind=["slow", *["fast"] * 47]), how
    return (wide[["kind"]], {}) if name == "no steps" else (wide[:0], {})


BROKEN = {
    "a word": (DataError, "line 4: 't3' is 'high', expected a number"),
    "no target": (DataError, "line 3: 'kind' is missing"),
    "infinite": (ArgumentError, r"row 3 \('line 5'\) of X is inf in element 1"),
    "empty": (ArgumentError, r"row 1 \('line 3'\) of X has no values"),
    "times": (ArgumentError, "sequence 'p0' has time 1 after 5"),
    "two targets": (DataError, "sequence 'p0' has 'kind' 'slow' and, in line 3, 'fast'"),
    "no steps": (DataError, "no columns beside 'kind'"),
    "no rows": (DataError, "a table without rows"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named(name, tmp_path):
    frame, how = broken(name)
    frame.to_csv(tmp_path / "data.csv", index=False)
    error, says = BROKEN[name]
    with pytest.raises(error, match=says):
        read_table(tmp_path / "data.csv", "kind", **how)


def test_options_that_do_not_fit_are_explained(tmp_path, dualform):
    path = tmp_path / "waves.csv"
    waves(4).to_csv(path, index=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.csv").write_bytes(b"\xff\xfe\x00")
    one = tmp_path / "one.csv"
    waves(4).assign(kind="slow").to_csv(one, index=False)
    cases = [
        ([path, "--target", "kinds"], "no column 'kinds' (--target)\n  hint: did you mean 'kind'?"),
        ([path], "--target is missing"),
        (["--demo", "--target", "kind"], "--demo has its own data"),
        ([tmp_path / "waves.json", "--target", "kind"], "expected a file that ends in .csv or .tsv"),
        ([tmp_path / "other.csv", "--target", "kind"], "no such file or folder"),
        ([tmp_path / "empty", "--target", "kind"], "no files that end in .csv"),
        ([tmp_path / "data.csv", "--target", "kind"], "cannot be read as a table"),
        ([one, "--target", "kind"], "y has one class only, 'slow', in all 4 rows"),
        ([path, "--target", "kind", "--test", "0"], "test is 0, which leaves no sequences for the report"),
        ([path, "--target", "kind", "--test", "0.1"], "4 sequences are too few to hold out 0.1"),
        (
            [path, "--target", "kind", "--task", "numbers"],
            "row 0 ('line 2'): 'kind' is 'slow', expected a finite number",
        ),
        ([path, "--target", "kind", "--task", "numberz"], "task is 'numberz', expected one of auto, classes, numbers"),
    ]
    for words, says in cases:
        code, _, err = dualform("fit", *words, "--out", tmp_path / "out")
        assert code == 2 and says in err, err
    assert not (tmp_path / "out").exists()


def test_scores_are_those_of_scikit_learn():
    from sklearn import metrics

    source = np.random.default_rng(0)
    p, y = source.dirichlet([1, 1, 1], 200), source.integers(0, 3, 200)
    found, said = of_classes(p, y), p.argmax(1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(y, said))
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(y, said))
    assert found["log_loss"] == pytest.approx(metrics.log_loss(y, p))
    assert found["confusion"] == metrics.confusion_matrix(y, said).tolist()
    assert sum(count for *_, count in found["calibration"]) == 200
    truth, guess = source.normal(size=50), source.normal(size=50)
    numbers = of_numbers(guess, truth, 0.5)
    assert numbers["r2"] == pytest.approx(metrics.r2_score(truth, guess))
    assert numbers["rmse"] == pytest.approx(metrics.root_mean_squared_error(truth, guess))
    assert of_numbers(guess[:1], truth[:1], 0.0)["r2"] is None


def test_a_folder_is_replaced_only_by_the_demo(tmp_path):
    from dualform.core.errors import CheckpointError
    from dualform.series.fitting import Fitting, fit

    waves().to_csv(tmp_path / "waves.csv", index=False)
    table, out, how = read_table(tmp_path / "waves.csv", "kind"), tmp_path / "out", Fitting("kind", steps=1)
    fit(table, out, how, lambda said: None)
    with pytest.raises(CheckpointError, match="there is something already"):
        fit(table, out, how, lambda said: None)
    (out / "mine.txt").touch()
    fit(table, out, how, lambda said: None, again=True)
    assert {path.name for path in Path(out).iterdir()} == FILES
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="there is something already"):
        fit(table, other, how, lambda said: None, again=True)
