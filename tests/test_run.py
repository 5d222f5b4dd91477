"""A run that loses nothing: finite numbers, one process to a folder, readers that go away, starts that fail."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import dualform
from dualform.cli.folders import load_model
from dualform.cli.info import _history
from dualform.cli.verify import _examined
from dualform.core.errors import CheckpointError, DataError, DualformError
from dualform.layers.lstm import LSTMConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.saving.incoming import incoming
from dualform.train import loop
from dualform.train.checkpoint import checkpoints
from dualform.train.claim import holding
from dualform.train.finite import magnitude
from dualform.train.loop import train
from dualform.train.optim import build_optimizer
from dualform.train.recipe import Data, Optim, Recipe
from dualform.train.report import Report

QUIET = Console(quiet=True)


@pytest.fixture
def recipe(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(f"to be or not to be, that is question {i}.\n" * 8)
    return Recipe(
        model=ModelConfig(256, 4, {"L": (LSTMConfig(),)}, "L").to_dict(),
        out=str(tmp_path / "runs" / "one"),
        steps=12,
        eval_every=100,
        save_every=2,
        log_every=100,
        device="cpu",
        data=Data(path=str(text), held_out=4, length=8, batch=2),
        optim=Optim(lr=0.01, warmup=2),
    )


def strict(path):
    """The rows of a file of JSON lines, of which NaN is no part."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def numbers(folder):
    return [t for path in folder.rglob("*.safetensors") for t in load_file(path).values()]


def bursting(monkeypatch, at):
    """A learning rate at one step that no weight survives."""
    real = loop.schedule
    monkeypatch.setattr(loop, "schedule", lambda o, step, p: 1e38 if step == at else real(o, step, p))


# --- what is saved and reported is finite ---


@pytest.mark.parametrize("at", [4, 5])
def test_a_run_that_bursts_resumes_from_its_last_finite_checkpoint(recipe, monkeypatch, at):
    """Also where the weights are finite when they are to be saved and their loss is not."""
    recipe, out = replace(recipe, keep=1), Path(recipe.out)
    bursting(monkeypatch, at)
    with pytest.raises(DualformError, match=r"goes on from step-00000004") as error:
        train(recipe, console=QUIET)
    assert f"dualform train {out} --resume --set optim.lr=0.001" in str(error.value)
    assert [place.name for place in checkpoints(out / "checkpoints")] == ["step-00000004"]
    assert not (out / "model").exists() and not (out / "summary.json").exists()
    monkeypatch.undo()
    train(replace(recipe, optim=Optim(lr=0.001, warmup=2)), resume=True, console=QUIET)
    assert all(t.isfinite().all() for t in numbers(out)) and numbers(out)


@pytest.mark.parametrize("options", [{"log_every": 10}, {"steps": 1}, {"steps": 3, "eval_every": 1, "save_every": 9}])
def test_weights_that_overflow_are_neither_saved_nor_a_success(recipe, options):
    """With 1e30 every weight is finite; the squares in the next step are not."""
    recipe = replace(recipe, optim=Optim(lr=1e30, warmup=6, clip=0), **options)
    with pytest.raises(DualformError, match=r"at step [123]\n.*begins again"):
        train(recipe, console=QUIET)
    assert not numbers(Path(recipe.out))
    strict(Path(recipe.out) / "metrics.jsonl")


def test_a_metric_that_is_no_number_is_null(tmp_path):
    for step in (0, 1):  # the second time the line is read and written again
        with Report(tmp_path, step, QUIET, {}) as report:
            report.record("train", step + 1, 0.1, loss=math.nan, bits_per_byte=math.inf, learning_rate=0.5)
    assert [(row["loss"], row["bits_per_byte"]) for row in strict(tmp_path / "metrics.jsonl")] == [(None, None)] * 2
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("spoiled", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_the_magnitude_tells_of_every_number(spoiled, value):
    model = LanguageModel(ModelConfig(7, 4, {"L": (LSTMConfig(),)}, "L"))
    optimizer = build_optimizer(model, Optim())
    model.loss(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    optimizer.step()
    assert 0 < magnitude(model, optimizer) < 100
    last = list(model.parameters())[-1]
    with torch.no_grad():
        (last if spoiled == "weight" else optimizer.state[last][spoiled]).view(-1)[-1] = value
    assert not magnitude(model, optimizer).isfinite()


# --- one process to a folder ---

HOLDER = """
import sys, time
from pathlib import Path
from dualform.train.claim import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="a kill leaves no trace to test")
def test_one_process_holds_a_folder_until_it_dies(recipe):
    out = train(replace(recipe, steps=2), console=QUIET)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        for resume in (True, False):
            with pytest.raises(CheckpointError, match=rf"one: process {other.pid} on .*, since 20.* is training here"):
                train(replace(recipe, steps=4), resume=resume, console=QUIET)
        assert {path: path.read_bytes() for path in before} == before
        other.kill()
    assert (out / ".running.lock").exists() and (out / ".running.json").exists()  # what a kill leaves
    train(replace(recipe, steps=4), resume=True, console=QUIET)
    assert not list(out.glob(".running*"))


def test_a_second_start_in_one_process_is_told_as_well(recipe):
    out = Path(recipe.out)
    out.mkdir(parents=True)
    with holding(out), pytest.raises(CheckpointError, match=f"process {os.getpid()} "):
        train(recipe, console=QUIET)
    assert list(out.iterdir()) == []
    train(recipe, console=QUIET)


# --- starts that fail ---


def test_a_start_that_fails_leaves_nothing(recipe, tmp_path, monkeypatch):
    long = replace(recipe, data=replace(recipe.data, length=10**6))
    with pytest.raises(DataError):
        train(long, console=QUIET)
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(loop, "build_optimizer", lambda *_: 1 / 0)  # after the tokens are made
    with pytest.raises(ZeroDivisionError):
        train(recipe, console=QUIET)
    assert not (tmp_path / "runs").exists()
    kept = Path(recipe.out) / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(ZeroDivisionError):
        train(recipe, console=QUIET)
    assert list(Path(recipe.out).iterdir()) == [kept]


def test_tokens_that_a_kill_left_half_removed_are_made_again(recipe):
    out = train(recipe, console=QUIET)
    for path in [*out.glob("*.*"), out / "data" / "about.json", out / "data" / "manifest.json"]:
        path.unlink()
    shutil.rmtree(out / "checkpoints")
    train(recipe, console=QUIET)


def test_what_a_kill_in_the_last_moments_leaves_is_finished(recipe):
    """After the last evaluation was written down, and before an old checkpoint was dropped whole."""
    out = train(recipe, console=QUIET)
    before, last = (out / "metrics.jsonl").read_bytes(), out / "checkpoints" / "step-00000012"
    shutil.copytree(last.with_name("step-00000010"), last.with_name("step-00000008"))
    with incoming(last.with_name("step-00000006")) as left:
        name = re.sub(r"-\d+-", "-999999999-", left.name)  # of a process that there is not
    for left in (".step-00000006.incoming", name):
        (last.parent / left).mkdir()
    (out / "summary.json").unlink()
    train(recipe, resume=True, console=QUIET)
    assert sorted(path.name for path in last.parent.iterdir()) == ["step-00000010", "step-00000012"]
    assert (out / "metrics.jsonl").read_bytes() == before and (out / "summary.json").exists()


def test_a_folder_called_data_that_is_not_of_a_run_is_left_alone(recipe):
    mine = Path(recipe.out) / "data" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(DataError, match=r"data: has to hold the run's tokens, but holds 'mine\.txt'"):
        train(recipe, console=QUIET)
    assert mine.read_text() == "mine"


# --- readers that go away ---


class Pipe(StringIO):
    """A pipe whose reader leaves after some lines."""

    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def write(self, text):
        if self.getvalue().count("\n") >= self.lines:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_whose_reader_is_gone_saves_and_ends(recipe, terminal):
    pipe = Pipe(1)
    with pytest.raises(SystemExit) as ended:
        train(recipe, console=Console(file=pipe, width=200, force_terminal=terminal))
    assert ended.value.code == 141
    assert checkpoints(Path(recipe.out) / "checkpoints")[-1].name == "step-00000001"
    resumed = train(recipe, resume=True, console=QUIET)
    whole = train(replace(recipe, out=recipe.out + "-whole"), console=QUIET)
    one, two = (dualform.load(folder / "model").state_dict() for folder in (resumed, whole))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_report_that_cannot_be_written_is_said_after_saving(recipe):
    class Full(StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        train(recipe, console=Console(file=Full()))
    assert checkpoints(Path(recipe.out) / "checkpoints")[-1].name == "step-00000001"


@pytest.mark.skipif(os.name == "nt", reason="pipes there break otherwise")
def test_the_command_ends_quietly_where_its_reader_is_gone(recipe, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict() | {"steps": 10**6, "eval_every": 1}))
    command = [sys.executable, "-m", "dualform", "train", str(tmp_path / "recipe.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert b"to train on" in run.stdout.readline()
        run.stdout.close()
        with suppress(subprocess.TimeoutExpired):
            run.wait(60)
        run.kill()
        assert (run.returncode, run.stderr.read()) == (141, b"")
    assert checkpoints(Path(recipe.out) / "checkpoints")


# --- recipes that start and go on ---


def test_a_default_warmup_is_written_down_and_kept(recipe):
    short = replace(recipe, steps=20, log_every=1, optim=Optim(lr=1e-4))
    out = train(short, console=QUIET)
    assert max(row["learning_rate"] for row in strict(out / "metrics.jsonl") if row["kind"] == "train") > 0.97e-4
    assert Recipe.load(out).optim.warmup == 2
    shown = StringIO()
    train(replace(short, steps=22), resume=True, console=Console(file=shown, width=200))
    assert "optim" not in shown.getvalue() and Recipe.load(out).optim.warmup == 2


def test_a_warmup_that_outlasts_the_run_is_kept_and_said(recipe):
    shown = StringIO()
    out = train(replace(recipe, optim=Optim(warmup=50)), console=Console(file=shown, width=200))
    assert "warning: optim.warmup is 50, more than half of 12 steps" in shown.getvalue()
    assert Recipe.load(out).optim.warmup == 50


def test_a_run_with_frozen_parts_resumes(recipe):
    recipe = replace(recipe, model=recipe.model | {"pattern": "LL"}, optim=Optim(lr=0.01, freeze=("embed", "blocks.0")))
    whole = train(recipe, console=QUIET)
    broken = replace(recipe, out=recipe.out + "-broken")
    with pytest.raises(SystemExit):
        train(broken, console=Console(file=Pipe(1)))
    train(Recipe.load(broken.out), resume=True, console=QUIET)
    one, two = dualform.load(whole).state_dict(), dualform.load(broken.out).state_dict()
    torch.manual_seed(recipe.seed)
    fresh = LanguageModel(ModelConfig.from_dict(recipe.model)).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    unmoved = {name for name in one if torch.equal(one[name], fresh[name])}
    assert unmoved == {name for name in one if name.startswith(("embed", "blocks.0.", "head"))}
    with pytest.raises(CheckpointError, match=r"a resumed run cannot change optim\.freeze"):
        train(replace(recipe, optim=replace(recipe.optim, freeze=())), resume=True, console=QUIET)


def test_the_folder_of_a_run_is_a_model(recipe):
    out = train(recipe, console=QUIET)
    final = dualform.load(out).state_dict()
    one = replace(recipe, out=recipe.out + "-next", model=str(out), steps=1, optim=Optim(lr=1e-30, weight_decay=0))
    assert all(torch.equal(t, final[name]) for name, t in dualform.load(train(one, console=QUIET)).state_dict().items())
    (out / "model").rename(out / "elsewhere")
    assert all(torch.equal(t, final[name]) for name, t in dualform.load(out).state_dict().items())
    assert load_model(str(out))[0].state_dict().keys() == final.keys()
    train(replace(one, out=recipe.out + "-more"), console=QUIET)
    (out / "checkpoints").rename(out / "other")
    with pytest.raises(CheckpointError, match="a training run that has not saved a model"):
        dualform.load(out)


def test_a_run_is_not_written_into_its_own_text(recipe):
    with pytest.raises(CheckpointError, match=r"lies in data.path .*next run would train on what this one writes"):
        train(replace(recipe, out=f"{recipe.data.path}/run"), console=QUIET)
    assert sorted(path.suffix for path in Path(recipe.data.path).iterdir()) == [".txt"] * 12


@pytest.mark.parametrize("change, told", [(0.1, True), (-0.1, False)])
def test_a_held_out_loss_that_rises_is_told(recipe, monkeypatch, change, told):
    read = iter(1 + change * n for n in range(100))
    monkeypatch.setattr(loop, "bits_per_byte", lambda *args, **kwargs: max(0.0, next(read)))
    out = StringIO()
    train(replace(recipe, eval_every=4, save_every=100), console=Console(file=out, width=500))
    assert ("held-out was lowest after step 4" in out.getvalue()) is told
    assert (
        "by heart" in out.getvalue()
    ) is told and f"{recipe.out}/best holds the model of that step" in out.getvalue()


def losing(monkeypatch, *bits):
    """Held-out losses of the evaluations in their order, the last one for all others; weights are probed as usual."""
    left, real = list(bits), loop.bits_per_byte

    def read(*args, limit, **options):
        if limit == loop._PROBE:
            return real(*args, limit=limit, **options)
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(loop, "bits_per_byte", read)


def same_model(one, two):
    a, b = (dualform.load(folder, verify=True).state_dict() for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_model_with_the_lowest_held_out_loss_is_kept(recipe, monkeypatch):
    recipe = replace(recipe, eval_every=2, keep=9)
    losing(monkeypatch, 5.0, 3.0, 4.0)
    out = train(recipe, console=QUIET)
    assert same_model(out / "best", out / "checkpoints" / "step-00000004" / "model")
    assert json.loads((out / "summary.json").read_text())["best"] == {"step": 4, "bits_per_byte": 3.0}
    assert same_model(out, out / "model") and not same_model(out, out / "best")
    assert load_model(str(out / "best"))[1].to_json() is None
    assert _history(str(out / "best")) == {"steps": 4, "bits_per_byte": 3.0}
    assert _history(str(out))["bits_per_byte"] == _history(str(out / "model"))["bits_per_byte"] == 4.0
    rows = list(_examined(out / "best"))
    assert {row.path.name for row in rows} == {"config.json", "model.safetensors", "evaluation.json"}
    assert {row.status for row in rows} == {"ok"} and set(rows) <= set(_examined(out))


def test_the_last_model_is_kept_where_it_is_the_best(recipe):
    out = train(recipe, console=QUIET)  # with no evaluation before the last
    assert same_model(out / "best", out / "model")


def test_a_resumed_run_knows_the_best_of_before(recipe, monkeypatch):
    recipe = replace(recipe, eval_every=2)
    losing(monkeypatch, 5.0, 3.0, 4.0)
    train(replace(recipe, steps=8), console=QUIET)
    kept = {path.name: path.read_bytes() for path in (Path(recipe.out) / "best").iterdir()}
    for steps, bits in ((12, 3.5), (16, 2.5)):
        monkeypatch.undo()
        losing(monkeypatch, bits)
        out = train(replace(recipe, steps=steps), resume=True, console=QUIET)
        now = {path.name: path.read_bytes() for path in (out / "best").iterdir()}
        assert (now == kept) is (bits > 3)
    assert json.loads((out / "summary.json").read_text())["best"] == {"step": 14, "bits_per_byte": 2.5}
    shutil.rmtree(out / "checkpoints")
    losing(monkeypatch, 7.0)
    train(recipe, resume=True, console=QUIET)  # from nothing: what is there is of another run
    assert json.loads((out / "best" / "evaluation.json").read_text()) == {"step": 2, "bits_per_byte": 7.0}


def test_a_disk_that_is_full_leaves_the_best_of_before(recipe, monkeypatch):
    losing(monkeypatch, 5.0, 3.0)
    recipe, real = replace(recipe, eval_every=4, save_every=100), dualform.models.saving.model.save_file

    def full(tensors, path, **options):
        real(tensors, path, **options)
        if "best" in str(path) and saved:
            raise OSError(28, "No space left on device")
        saved.append(path)

    saved = []
    monkeypatch.setattr(dualform.models.saving.model, "save_file", full)
    with pytest.raises(CheckpointError, match="best: cannot save: No space left"):
        train(recipe, console=QUIET)
    dualform.load(Path(recipe.out) / "best", verify=True)
    assert json.loads((Path(recipe.out) / "best" / "evaluation.json").read_text())["bits_per_byte"] == 5.0


@pytest.mark.parametrize("damage", ['{"step": 4}', '{"step": -1, "bits_per_byte": 3.0}', '{"step": 4, "bits_per'])
def test_a_damaged_evaluation_of_the_best_is_named(recipe, damage):
    out = train(recipe, console=QUIET)
    (out / "best" / "evaluation.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"evaluation\.json"):
        train(recipe, resume=True, console=QUIET)
    shutil.rmtree(out / "best")
    train(recipe, resume=True, console=QUIET)
    assert same_model(out / "best", out / "model")


def test_weights_with_a_bad_number_are_not_kept(recipe, monkeypatch):
    """One that the held-out text does not read."""
    real = loop.magnitude
    monkeypatch.setattr(loop, "magnitude", lambda model, optimizer: real(model, optimizer) * math.nan)
    with pytest.raises(DualformError, match="at step"):
        train(replace(recipe, eval_every=1, save_every=100), console=QUIET)
    assert not (Path(recipe.out) / "best").exists()
