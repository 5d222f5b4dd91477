"""``dualform watch``: what it says is what the model says, in any order of streams, and after any interruption."""

import csv
import math
import os
import re
import signal
import subprocess
import sys
from io import StringIO

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dualform.cli.main import app
from dualform.core.errors import ArgumentError, DualformError
from dualform.gaussian import Irregular, Level, Regression, Seasonal
from dualform.gaussian.continuous import ContinuousLinearGaussian
from dualform.gaussian.model import LinearGaussian
from dualform.generation.streams import surprise, watched
from dualform.layers.attention import AttentionConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.s4d import S4DConfig
from dualform.layers.s5 import S5Config
from dualform.models.config import ModelConfig
from dualform.models.heads import SequenceClassifier, SequenceRegressor, StepClassifier, StepRegressor
from dualform.models.lm import LanguageModel
from dualform.models.saving.model import save
from dualform.models.saving.state import load_meta

S4D, S5 = S4DConfig(d_state=6), S5Config(d_state=6)
SCALED = {"standardise": True, "missing": "carried"}


def config(*parts):
    letters = dict(zip("AB", ((part,) for part in parts), strict=False))
    return ModelConfig(0, 8, letters, "AB" if len(parts) > 1 else "AA")


MODELS = {
    "level": lambda: (Level(variance=2.0) + Irregular(variance=3.0)).build(),
    "season": lambda: (Level(variance=0.5) + Seasonal(4, variance=0.1) + Irregular(variance=1.0)).build(),
    "two": lambda: LinearGaussian(
        [[0.9]], [[1.0], [0.5]], [[0.3]], [[0.2, 0.1], [0.1, 0.4]], P0="stationary", d=[1, 2]
    ),
    "walk": lambda: ContinuousLinearGaussian([[-0.1]], [[1.0]], [[2.0]], [[0.5]], P0="stationary"),
    "class": lambda: SequenceClassifier(
        config(S4D, S5), ["calm", "storm"], inputs=2, standardise=True, missing="carried"
    ),
    "several": lambda: StepClassifier(config(S5), 3, inputs=2, multi_label=True),
    "value": lambda: SequenceRegressor(config(S4D), 2, inputs=2),
    "band": lambda: StepRegressor(config(S4D), 1, inputs=1, quantiles=(0.9, 0.1, 0.4)),
    "lstm": lambda: StepRegressor(config(LSTMConfig()), 1, inputs=1),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models in folders, made where they are asked for."""
    root, made = tmp_path_factory.mktemp("watched"), {}

    class Folders(dict):
        def __missing__(self, name):
            torch.manual_seed(sorted(MODELS).index(name))
            made[name] = model = MODELS[name]()
            if getattr(model, "entrance", None) is not None and model.entrance.standardise:
                model.fit_inputs(torch.randn(5, 7, 2) * 3 + 1)
            save(model, root / name)
            self[name] = str(root / name), model.eval()
            return self[name]

    return Folders()


def told(text, *options):
    """Rows of what comes out, each by the names of the columns."""
    result = CliRunner().invoke(app, ["watch", *options], input=text, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return list(csv.DictReader(StringIO(result.stdout)))


def refused(text, *options):
    """What came out before the error, and its sentence."""
    result = CliRunner().invoke(app, ["watch", *options], input=text)
    assert isinstance(result.exception, DualformError), result.output
    return result.stdout, str(result.exception)


def lines(values, header="", keys=None):
    shown = [",".join("" if v != v else f"{v!r}" for v in row) for row in values.tolist()]
    keys = [""] * len(shown) if keys is None else [f"{key}," for key in keys]
    return header + "".join(f"{key}{row}\n" for key, row in zip(keys, shown, strict=True))


def column(rows, name):
    return torch.tensor([float(row[name] or "nan") for row in rows], dtype=torch.float64)


def close(a, b, tolerance=2e-6):
    torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", ["season", "two"])
def test_a_gaussian_model_says_what_its_filter_does(name, folders):
    """The band is that of the prediction; nothing is said while the level is not known, nor scored without a value."""
    folder, model = folders[name]
    y = torch.randn(12, model.d_obs, generator=torch.Generator().manual_seed(1)).double() * 2
    y[6, 0] = torch.nan
    rows, want = told(lines(y), folder, "--level", "0.9"), model.filter(y)
    known = slice(5, None) if name == "season" else slice(None)  # the season takes four values
    S = model.C @ want.predicted_cov[:-1] @ model.C.mT + model.R
    d = 0 if model.d is None else model.d
    names = ["value"] if model.d_obs == 1 else ["value_1", "value_2"]
    for i, channel in enumerate(names):
        mean = (want.predicted_mean[:-1] @ model.C.mT + d)[:, i]
        half = 1.6448536269514722 * S[:, i, i].sqrt()
        for what, expected in (("expected", mean), ("low", mean - half), ("high", mean + half)):
            close(column(rows, f"{channel}_{what}")[known], expected[known])
        close(column(rows, f"{channel}_estimate")[known], (want.mean @ model.C.mT + d)[known, i])
    if name == "season":
        assert rows[0]["value_expected"] == rows[3]["value_low"] == rows[3]["score"] == rows[6]["score"] == ""
        z = (y[:, 0] - mean).abs() / S[:, 0, 0].sqrt()
        close(column(rows, "score")[known], -torch.erfc(z / 2**0.5).log10()[known], 1e-3)


def test_the_score_is_the_tail_of_chi_squared():
    distance, degrees = torch.full((4,), 12.0).double(), torch.tensor([1, 2, 4, 0])
    tails = [math.erfc(6**0.5), math.exp(-6), 7 * math.exp(-6), math.nan]
    close(surprise(distance, degrees), -torch.tensor(tails).double().log10(), 1e-6)
    near, far = (surprise(torch.tensor([d, d, d]).double(), torch.tensor([1, 2, 7])) for d in (1199.9, 1200.1))
    assert ((far - near > 0) & (far - near < 0.1)).all()  # where the expansion takes over
    assert surprise(torch.tensor([1e6]).double(), torch.tensor([2])).isfinite().all()


def test_an_anomaly_is_what_the_score_says(folders):
    rows = told("1\n2\n1\n2\n60\n", folders["level"][0], "--alarm", "5")
    assert [row["anomaly"] for row in rows] == ["", "0", "0", "0", "1"] and float(rows[-1]["score"]) > 5


def test_times_of_a_continuous_model_and_gaps_of_a_discrete_one(folders):
    y, t = torch.tensor([[1.0], [2.0], [1.5], [0.0]]).double(), torch.tensor([0.0, 0.5, 3.5, 4.0]).double()
    folder, model = folders["walk"]
    rows = told(lines(y, "at,x\n", t.tolist()), folder, "--time", "at")
    close(column(rows, "x_estimate"), model.filter(y, times=t).mean[:, 0])
    folder, model = folders["level"]
    rows = told(lines(y, "at,x\n", t.tolist()), folder, "--time", "at", "--step", "0.5")
    full = torch.full((9, 1), torch.nan).double()
    full[[0, 1, 7, 8]] = y
    close(column(rows, "x_estimate"), model.filter(full).mean[[0, 1, 7, 8], 0])
    dates = "at,x\n2026-01-01T00:00:00,1\n2026-01-01T00:00:30,2\n"
    rows = told(dates, folder, "--time", "at", "--step", "10")
    close(column(rows, "x_estimate"), model.filter([1.0, None, None, 2.0]).mean[[0, 3], 0])
    assert rows[1]["at"] == "2026-01-01T00:00:30"


@pytest.mark.parametrize("name", ["class", "several", "value", "band", "lstm"])
def test_a_network_says_what_it_says_of_the_whole(name, folders):
    folder, model = folders[name]
    x = torch.randn(9, model.inputs, generator=torch.Generator().manual_seed(2)).double()
    if name == "class":
        x[4, 0] = torch.nan
    rows = told(lines(x), folder)
    with torch.no_grad():
        if isinstance(model, StepClassifier | StepRegressor):
            y = model(x[None].float())[0][0]
        else:
            y = torch.cat([model(x[None, : k + 1].float())[0] for k in range(len(x))])
    if name == "class":
        p = y.softmax(-1)
        assert [row["class"] for row in rows] == [("calm", "storm")[i] for i in p.argmax(-1)]
        close(column(rows, "probability"), p.amax(-1), 1e-4)
        z = (x - model.entrance.mean) / model.entrance.deviation
        close(column(rows, "score"), surprise(z.square().nansum(-1), (~x.isnan()).sum(-1)), 1e-3)
        return
    assert "score" not in rows[0]  # inputs are not scaled, so that their distribution is not known
    wanted = {
        "several": {f"probability_{i}": y.sigmoid()[:, i] for i in range(3)} if name == "several" else {},
        "value": {f"value_{i}": y[:, i] for i in range(2)} if name == "value" else {},
        "lstm": {"value": y[:, 0]},
    }
    if name == "band":
        low, middle, high = y[:, 0].sort(-1).values.unbind(-1)
        wanted["band"] = {"value": middle, "value_low": low, "value_high": high}
    assert rows[0].keys() == wanted[name].keys()
    for what, expected in wanted[name].items():
        close(column(rows, what), expected, 1e-4)


def test_irregular_times_of_a_network(folders):
    folder, model = folders["band"]
    x, t = torch.randn(5, 1).double(), torch.tensor([0.0, 2.0, 3.0, 7.0, 8.0])
    rows = told(lines(x, "at,x\n", t.tolist()), folder, "--time", "at", "--step", "2")
    intervals = torch.tensor([[1.0, 1.0, 0.5, 2.0, 0.5]])
    with torch.no_grad():
        y = model(x[None].float(), intervals=intervals)[0][0, :, 0]
    close(column(rows, "value"), y.sort(-1).values[:, 1], 1e-4)


def test_a_window_is_pooled_over(folders):
    folder, model = folders["value"]
    x = torch.randn(8, 2).double()
    rows = told(lines(x), folder, "--window", "3")
    with torch.no_grad():
        y = model.head(model.features(x[None].float())[0][0, -3:].mean(0))
    close(torch.stack([column(rows, f"value_{i}")[-1] for i in range(2)]), y, 1e-4)


@pytest.mark.parametrize("name", ["two", "class"])
def test_streams_do_not_see_each_other(name, folders, tmp_path):
    """Together and alone, in any order and in any pieces, they say the same to the last digit, and end in one state."""
    folder, random = folders[name][0], torch.Generator().manual_seed(3)
    ids = torch.randint(70, (300,), generator=random).tolist()
    x = torch.randn(300, 2, generator=random).double()
    text = lines(x, "", ids).splitlines(keepends=True)
    whole = told("id,a,b\n" + "".join(text), folder, "--id", "id", "--state", str(tmp_path / "whole"))
    assert [row["id"] for row in whole] == list(map(str, ids))
    pieces = []
    for first, last in ((0, 1), (1, 90), (90, 91), (91, 300)):
        header = "id,a,b\n" if first != 1 else ""  # which may be there or not, once the state knows it
        result = CliRunner().invoke(
            app, ["watch", folder, "--id", "id", "--state", str(tmp_path / "part")], header + "".join(text[first:last])
        )
        pieces.append(result.stdout)
    assert list(csv.DictReader(StringIO("".join(pieces)))) == whole
    assert content(tmp_path / "part") == content(tmp_path / "whole")
    alone = told("a,b\n" + "".join(line.split(",", 1)[1] for line, i in zip(text, ids, strict=True) if i == 7), folder)
    for a, b in zip(alone, (row for row in whole if row["id"] == "7"), strict=True):
        values = [name for name in a if name not in ("class", "anomaly")]
        assert all(abs(float(a[v] or 0) - float(b[v] or 0)) < 1e-4 for v in values)


def content(path):
    """What a state holds, whose words may stand in any order."""
    return load_meta(path), {name: m.numpy().tobytes() for name, m in load_file(path).items()}


def start(folder, path):
    command = [sys.executable, "-m", "dualform", "watch", folder, "--state", str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_process_that_is_told_to_stop_goes_on(folders, tmp_path):
    """What was read is taken in, half a line is not, and the state is that of a run that was never stopped."""
    folder, values = folders["band"][0], [f"{v!r}\n" for v in torch.randn(20).double().tolist()]
    whole = CliRunner().invoke(app, ["watch", folder, "--state", str(tmp_path / "whole")], "".join(values)).stdout
    with start(folder, tmp_path / "part") as one:
        one.stdin.write("".join(values[:9]).encode() + b"0.12")
        one.stdin.flush()
        first = b"".join(one.stdout.readline() for _ in range(10))
        one.send_signal(signal.SIGTERM)
        rest, error = one.communicate(timeout=60)
    assert (one.returncode, rest) == (128 + signal.SIGTERM, b"")
    assert error.decode().strip() == "stopped within line 10, which was not taken in"
    again = CliRunner().invoke(app, ["watch", folder, "--state", str(tmp_path / "part")], "".join(values[9:])).stdout
    assert first.decode() + again == whole
    assert content(tmp_path / "part") == content(tmp_path / "whole")


BAD = {
    "a word": ("level", "1\n2\nabc\n", (), r"line 3, value: 'abc' is no number", 3),
    "an infinity": ("level", "x\n1\n-inf\n", (), r"line 3, x: is -inf, expected a finite number", 2),
    "an underscore": ("level", "1\n1_0\n", (), r"line 2, value: '1_0' is no number", 2),
    "a missing one": ("band", "1\n\n", (), r"line 2, value: is missing, and the model knows no missing values", 2),
    "fewer fields": ("two", "a,b\n1,2\n3\n", (), r"line 3 has 1 field, expected 2: a, b", 2),
    "other channels": ("two", "a,b,c\n1,2,3\n", (), r"the lines have 3 channels, a, b, c, and the model has 2", 0),
    "time back": ("level", "t,x\n5,1\n4,2\n", ("--time", "t"), r"line 3, t: 4 is not after 5, the time before it", 2),
    "time twice": ("walk", "t,x\n5,1\n5,2\n", ("--time", "t"), r"line 3, t: 5 is not after 5", 2),
    "of a stream": (
        "two",
        "i,t,a,b\np,5,1,1\nq,1,1,1\np,5,2,2\n",
        ("--id", "i", "--time", "t"),
        r"line 4, t: 5 is not after 5, the time before it of stream 'p'",
        3,
    ),
    "no time": ("level", "t,x\nsoon,1\n", ("--time", "t"), r"line 2, t: 'soon' is no time", 1),
    "half a step": ("level", "t,x\n0,1\n1.5,2\n", ("--time", "t", "--step", "1"), r"line 3, t: 1.5 steps after", 2),
    "without time": ("walk", "1\n", (), r"continuous time, and no column has the time", 0),
    "step alone": ("band", "1\n", ("--step", "1"), r"--step is given, and no column has the time", 0),
    "timeless": ("lstm", "t,x\n0,1\n", ("--time", "t", "--step", "1"), r"interval", 0),
    "no such column": ("two", "a,b\n1,2\n", ("--id", "pump"), r"--id pump: no such column, the header has 'a', 'b'", 0),
    "no header": ("two", "1,2\n", ("--id", "pump"), r"line 1 has numbers and no names, and --id names a column", 0),
    "a name twice": ("two", "a,a\n1,2\n", (), r"line 1: the header names 'a' twice", 0),
    "no id": ("two", "i,a,b\n,1,2\n", ("--id", "i"), r"line 2, i: is empty, expected the name of a stream", 1),
    "a step of 0": ("level", "1\n", ("--step", "0"), r"--step is 0.0, expected a positive time", 0),
    "a level of 1": ("level", "1\n", ("--level", "1"), r"--level is 1.0, expected a probability", 0),
    "a window": ("level", "1\n", ("--window", "3"), r"window is given, and the LinearGaussian does not pool", 0),
    "a window of steps": ("band", "1\n", ("--window", "3"), r"window is given, and the StepRegressor does not pool", 0),
    "quotes": ("two", 'a,b\n"1,2\n', (), r"line 2: ", 1),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_by_its_line(case, folders):
    """What came before it is told first."""
    name, text, options, words, before = BAD[case]
    out, error = refused(text, folders[name][0], *options)
    assert re.search(words, error), error
    assert len(out.splitlines()) == before


def test_bytes_that_are_no_text(folders):
    out, error = refused(b"1\n2\n\xff\n", folders["level"][0])
    assert error == "line 3: byte 0xff at position 0 is not UTF-8" and len(out.splitlines()) == 3


def test_the_state_before_a_wrong_line_is_kept(folders, tmp_path):
    folder, path = folders["band"][0], str(tmp_path / "a.state")
    refused("1\n2\nx\n", folder, "--state", path)
    on = CliRunner().invoke(app, ["watch", folder, "--state", path], "3\n").stdout
    assert on.splitlines() == CliRunner().invoke(app, ["watch", folder], "1\n2\n3\n").stdout.splitlines()[-1:]


def test_a_state_of_something_else_is_refused(folders, tmp_path):
    path = str(tmp_path / "a.state")
    told("a,b\n1,2\n", folders["two"][0], "--state", path)
    for text, options, words in (
        ("1,2\n", (folders["value"][0],), "the state of another model"),
        ("a,c\n1,2\n", (folders["two"][0],), "line 1 names a, c; the state is of a, b"),
        ("1,2\n", (folders["two"][0], "--id", "a"), "--id a: the state was saved with none"),
        ("1,2\n", (folders["two"][0], "--value", "b,a"), "--value b,a: the state was saved with a,b"),
    ):
        assert words in refused(text, *options, "--state", path)[1]


def test_nothing_in_nothing_out(folders):
    assert told("", folders["level"][0]) == []
    assert told("x\n", folders["level"][0]) == []


REFUSED = {
    "tokens": (lambda: SequenceClassifier(ModelConfig(9, 8, {"A": (S4D,)}, "A"), 2), "reads tokens"),
    "bidirectional": (
        lambda: SequenceClassifier(config(S4DConfig(d_state=6, bidirectional=True)), 2, inputs=1),
        "is bidirectional",
    ),
    "growing": (lambda: StepRegressor(config(AttentionConfig(heads=2)), 1, inputs=1), "keeps all that it reads"),
    "language": (lambda: LanguageModel(ModelConfig(9, 8, {"A": (S4D,)}, "A")), "is a LanguageModel, expected"),
    "inputs": (lambda: LinearGaussian([[1.0]], [[1.0]], [[1.0]], [[1.0]], B=[[1.0]], P0=1.0), "has inputs"),
    "batch": (lambda: LinearGaussian([[[1.0]]] * 2, [[1.0]], [[1.0]], [[1.0]], P0=1.0), "is a batch"),
    "moving": (lambda: (Level(variance=1.0) + Regression(torch.ones(5, 1))).build(), "C of the .* vary in time"),
    "before": (
        lambda: ContinuousLinearGaussian([[0.0]], [[1.0]], [[1.0]], [[1.0]], P0=1.0, prior="before"),
        "prior='before'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_watch_say_why(name):
    make, words = REFUSED[name]
    with pytest.raises(ArgumentError, match=words):
        watched(make(), ["x"])
