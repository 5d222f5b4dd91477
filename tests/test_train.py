"""A run trains, and one that is broken off and resumed is the same run; evaluation counts every byte once."""

import errno
import io
import json
import math
import re
import shutil
import signal
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import dualform
from dualform.core.errors import ArgumentError, CheckpointError, ConfigError, DataError, DualformError
from dualform.layers.attention import AttentionConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.registry import FEEDFORWARDS
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.tokenizer import ByteTokenizer
from dualform.ops.device import chosen_device
from dualform.train import checkpoint, evaluate, loop, setup
from dualform.train.data import Dataset, open_dataset
from dualform.train.evaluate import bits_per_byte
from dualform.train.events import EventFile, _checksum
from dualform.train.interrupt import Interrupts
from dualform.train.loop import train
from dualform.train.recipe import Data, Optim, Recipe
from dualform.train.report import Report, amount, duration, read_metrics

QUIET = Console(quiet=True)


@dataclass(frozen=True)
class NoiseConfig:
    """Dropout as a sub-layer: a run with it can only be repeated if its random numbers are."""

    p: float = 0.5

    def build(self, d_model):
        return nn.Dropout(self.p)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for i in range(30):
        lines = [f"the {random.choice(['cat', 'dog', 'bird'])} sat on mat {random.integers(9)}\n" for _ in range(12)]
        (folder / f"{i}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def recipe(text, tmp_path, monkeypatch):
    monkeypatch.setitem(FEEDFORWARDS, "noise", NoiseConfig)
    parts = {"M": (Mamba2Config(d_state=4, d_head=4), NoiseConfig()), "A": (AttentionConfig(heads=2, window=8),)}
    return Recipe(
        model=ModelConfig(256, 8, parts, "MA").to_dict(),
        out=str(tmp_path / "run"),
        steps=12,
        eval_every=5,
        save_every=3,
        log_every=4,
        device="cpu",
        data=Data(path=str(text), held_out=6, length=24, batch=4),
        optim=Optim(lr=0.02, warmup=2),
    )


def losses(out):
    return [{k: v for k, v in row.items() if k not in ("elapsed", "tokens_per_second")} for row in read_metrics(out)]


def same_weights(a, b):
    one, two = (dualform.load(Path(folder) / "model").state_dict() for folder in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def interrupting(monkeypatch, at, number=signal.SIGINT):
    """Send this process a signal in the middle of a step, once."""
    windows, sent = Dataset.windows, []

    def interrupted(self, data, seed, step, *ranks):
        if step == at and not sent:
            sent.append(signal.raise_signal(number))
        return windows(self, data, seed, step, *ranks)

    monkeypatch.setattr(Dataset, "windows", interrupted)


# --- a whole run ---


def test_a_run_learns_and_leaves_everything(recipe, monkeypatch):
    monkeypatch.setattr("dualform.train.data.COMPARABLE", 1)
    recipe = replace(recipe, steps=60, model=ModelConfig(256, 16, {"L": (LSTMConfig(),)}, "L").to_dict())
    shown = io.StringIO()
    out = train(recipe, console=Console(file=shown, width=80))
    assert out == Path(recipe.out)
    model, summary = dualform.load(out / "model"), json.loads((out / "summary.json").read_text())
    dataset = open_dataset(recipe.data, ByteTokenizer(), out / "data")
    assert summary["bits_per_byte"] == pytest.approx(bits_per_byte(model, dataset, length=24), rel=1e-6)
    assert summary["steps"] == 60 and summary["tokens"] == 60 * 4 * 24
    assert summary["parameters"] == model.parameter_count()
    rows = [row for row in read_metrics(out) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(4, 61, 4))
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"] and summary["bits_per_byte"] < 5
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG") and (out / "loss.png").stat().st_size > 10_000
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000057", "step-00000060"]
    assert len(list((out / "tensorboard").iterdir())) == 1 and Recipe.load(out) == recipe
    lines = shown.getvalue().splitlines()
    assert re.fullmatch(r"held-out: \d\.\d\d bits per byte \(gzip \d\.\d\d, xz \d\.\d\d\)", lines[-2])
    assert "\x1b" not in shown.getvalue() and "\r" not in shown.getvalue()
    assert sum("held-out" in line and line.startswith("step ") for line in lines) == 11


def test_a_line_on_the_way_says_what_was_measured_until_then(recipe):
    """Also between two lines of metrics.jsonl, and where there are none yet."""
    shown = io.StringIO()
    recipe = replace(recipe, model=ModelConfig(256, 8, {"L": (LSTMConfig(),)}, "L").to_dict(), steps=10)
    noted = replace(recipe, log_every=1, eval_every=100)
    one = [row["bits_per_byte"] for row in read_metrics(train(noted, console=QUIET)) if row["kind"] == "train"]
    for log_every, means in ((100, [one[:3], one[:6], one[:9]]), (4, [one[:3], one[4:6], one[8:9]])):
        shown = io.StringIO()
        coarse = replace(recipe, log_every=log_every, eval_every=3, out=f"{recipe.out}-{log_every}")
        train(coarse, console=Console(file=shown, width=500))
        said = re.findall(r"held-out \d\.\d+, training (\d\.\d+) bits per byte  [1-9][\d,]* tokens/s", shown.getvalue())
        assert list(map(float, said)) == pytest.approx([sum(some) / len(some) for some in means], abs=1e-3)


def test_a_terminal_gets_a_progress_bar(recipe):
    shown = io.StringIO()
    train(replace(recipe, steps=4), console=Console(file=shown, force_terminal=True, width=120))
    assert "training" in shown.getvalue() and "tokens/s" in shown.getvalue() and "left" in shown.getvalue()


def test_a_run_can_be_repeated(recipe, tmp_path):
    one, two = train(recipe, console=QUIET), train(replace(recipe, out=str(tmp_path / "two")), console=QUIET)
    assert losses(one) == losses(two) and same_weights(one, two)
    other = train(replace(recipe, out=str(tmp_path / "three"), seed=1), console=QUIET)
    assert losses(one) != losses(other)


def test_portions_of_a_batch_give_the_same_losses(recipe, tmp_path):
    recipe = replace(recipe, model=ModelConfig(256, 8, {"L": (LSTMConfig(),)}, "L").to_dict(), steps=8)
    one = losses(train(recipe, console=QUIET))
    portions = replace(recipe, out=str(tmp_path / "two"), data=replace(recipe.data, accumulate=2))
    two = losses(train(portions, console=QUIET))
    assert [a["loss"] for a in one if "loss" in a] == pytest.approx([b["loss"] for b in two if "loss" in b], rel=1e-5)


def test_a_run_that_recomputes_is_the_same_run(recipe, tmp_path, monkeypatch):
    seen, run = [], loop.LanguageModel.loss
    monkeypatch.setattr(loop.LanguageModel, "loss", lambda model, *a: seen.append(model.recompute) or run(model, *a))
    one = train(recipe, console=QUIET)
    two = train(replace(recipe, recompute=True, out=str(tmp_path / "two")), console=QUIET)
    assert losses(one) == losses(two) and same_weights(one, two)
    assert set(seen) == {False, True}


def test_bfloat16_trains_float32_weights(recipe):
    out = train(replace(recipe, precision="bfloat16"), console=QUIET)
    assert {p.dtype for p in dualform.load(out / "model").parameters()} == {torch.float32}
    assert json.loads((out / "summary.json").read_text())["bits_per_byte"] < 8
    assert not setup.uses_bfloat16(recipe, torch.device("cpu"))


def test_a_run_goes_on_from_a_saved_model(recipe, tmp_path):
    first = train(recipe, console=QUIET)
    calm = replace(recipe, model=str(first / "model"), out=str(tmp_path / "two"), steps=1, log_every=1)
    calm = replace(calm, optim=Optim(lr=1e-30, warmup=0, weight_decay=0))
    second = train(calm, console=QUIET)
    assert same_weights(first, second)


# --- breaking off and going on ---


@pytest.mark.parametrize("at", [0, 5, 8, 11])
def test_a_resumed_run_is_the_unbroken_run(recipe, tmp_path, monkeypatch, at):
    whole = train(recipe, console=QUIET)
    broken, shown = replace(recipe, out=str(tmp_path / "broken")), io.StringIO()
    interrupting(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        train(broken, console=Console(file=shown, width=500))
    assert f"stopped after step {at + 1}" in shown.getvalue()
    assert f"resume with: dualform train {broken.out} --resume" in shown.getvalue()
    assert (Path(broken.out) / "model" / "config.json").exists()
    resumed = train(Recipe.load(broken.out), resume=True, console=QUIET)
    assert losses(whole) == losses(resumed) and same_weights(whole, resumed)


def test_a_longer_run_goes_on_where_a_shorter_one_ended(recipe):
    out = train(replace(recipe, optim=Optim(floor=1.0)), console=QUIET)
    shown = io.StringIO()
    longer = replace(recipe, steps=20, optim=Optim(floor=1.0, lr=0.01))
    train(longer, resume=True, console=Console(file=shown, width=200))
    assert "resumed after step 12" in shown.getvalue() and "changed: steps: 12, now 20" in shown.getvalue()
    assert "changed: optim.lr: 0.004, now 0.01" in shown.getvalue()
    assert [row["step"] for row in read_metrics(out) if row["kind"] == "train"] == [4, 8, 12, 16, 20]
    assert Recipe.load(out) == replace(longer, optim=replace(longer.optim, warmup=1))  # that of the 12 steps


def test_a_resumed_run_may_change_what_its_result_does_not_depend_on(recipe):
    """Memory that ran out is when one asks for ``recompute``."""
    out = train(replace(recipe, steps=2), console=QUIET)
    again = replace(Recipe.load(out), steps=4, recompute=True, graphs=False)
    train(again, resume=True, console=QUIET)
    assert read_metrics(out)[-1]["step"] == 4
    assert Recipe.load(out).recompute and not Recipe.load(out).graphs


def test_a_run_that_had_ended_says_so_and_how_to_go_on(recipe, monkeypatch):
    out, shown = train(recipe, console=QUIET), io.StringIO()
    before = (out / "metrics.jsonl").read_bytes()
    train(recipe, resume=True, console=Console(file=shown, width=500))
    assert f"nothing is trained now; to train on: dualform train {out} --resume --set steps=24\n" in shown.getvalue()
    assert "resumed" not in shown.getvalue() and "tokens in" not in shown.getvalue()
    assert "held-out: " in shown.getvalue() and (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129)])
def test_other_signals_end_a_run_as_schedulers_expect(recipe, monkeypatch, name, code):
    if not hasattr(signal, name):
        pytest.skip(f"no {name} here")
    number = getattr(signal, name)
    interrupting(monkeypatch, 2, number)
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup, which ignores one
    try:
        with pytest.raises(SystemExit) as ended:
            train(recipe, console=QUIET)
    finally:
        signal.signal(number, before)
    assert ended.value.code == code
    assert checkpoint.checkpoints(Path(recipe.out) / "checkpoints")[-1].name == "step-00000003"


@pytest.fixture
def listening():
    """SIGINT raises KeyboardInterrupt, though a shell may have started this process with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_signal_acts_as_usual(listening):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.signal == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert interrupts.signal == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals to hang up")
def test_a_closed_terminal_may_say_so_again():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Interrupts() as interrupts:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
                signal.raise_signal(number)
            assert interrupts.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert interrupts.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_full_disk_leaves_the_checkpoint_before(recipe, tmp_path, monkeypatch, file):
    whole = train(recipe, console=QUIET)
    broken = replace(recipe, out=str(tmp_path / "broken"))
    for module in (checkpoint, dualform.models.saving.model):
        real = module.save_file

        def full(tensors, path, *args, real=real, **kwargs):
            if path.name == file and "step-00000006" in str(path):
                path.write_bytes(b"cut sho")
                raise OSError(errno.ENOSPC, "No space left on device")
            real(tensors, path, *args, **kwargs)

        monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(broken, console=QUIET)
    assert [p.name for p in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    monkeypatch.setitem(FEEDFORWARDS, "noise", NoiseConfig)
    resumed = train(broken, resume=True, console=QUIET)
    assert losses(whole) == losses(resumed) and same_weights(whole, resumed)


def test_a_kill_while_saving_leaves_the_checkpoint_before(recipe, monkeypatch):
    """What a kill leaves behind: a folder beside its place that is not complete, and a line cut short."""
    interrupting(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, console=QUIET)
    out = Path(recipe.out)
    shutil.copytree(out / "checkpoints" / "step-00000005" / "model", out / "checkpoints" / ".step-00000006.incoming")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    train(recipe, resume=True, console=QUIET)
    assert [row["step"] for row in read_metrics(out) if row["kind"] == "train"] == [4, 8, 12]
    assert not list((out / "checkpoints").glob(".*"))


def test_a_run_without_a_checkpoint_starts_again(recipe):
    whole = losses(train(recipe, console=QUIET))
    shutil.rmtree(Path(recipe.out) / "checkpoints")
    assert losses(train(recipe, resume=True, console=QUIET)) == whole


# --- the clock ---


def test_minutes_follow_the_clock_and_a_resume_counts_what_was_before(recipe, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    timed = replace(recipe, steps=None, minutes=1, log_every=1, eval_every=10**6, save_every=10**6)
    interrupting(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(timed, console=QUIET)
    next(clock for _ in range(1000))  # time passes between the two
    out = train(timed, resume=True, console=QUIET)
    rows = [row for row in read_metrics(out) if row["kind"] == "train"]
    times, rates = [row["elapsed"] for row in rows], [row["learning_rate"] for row in rows]
    assert times == sorted(times) and times[-1] == pytest.approx(60, abs=4)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    for before, row in zip(times[2:], rows[3:], strict=False):
        progress = before / 60
        ended = timed.optim.warmup * progress / (row["step"] - 1)  # of the warm-up, at the pace until now
        fall = (1 + math.cos(math.pi * (progress - ended) / (1 - ended))) / 2
        want = timed.optim.floor + (1 - timed.optim.floor) * fall
        assert row["learning_rate"] == pytest.approx(timed.optim.lr * want)


# --- refusals ---


def test_a_run_is_never_overwritten(recipe):
    out = train(recipe, console=QUIET)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="a run is there already") as error:
        train(recipe, console=QUIET)
    assert "resume" in str(error.value) and (out / "metrics.jsonl").read_bytes() == before


def test_nothing_to_resume_is_said(recipe):
    with pytest.raises(CheckpointError, match="no run to resume"):
        train(recipe, resume=True, console=QUIET)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda r: replace(r, model=r.model | {"d_model": 16}), "of another model: d_model: 8, now 16"),
        (lambda r: replace(r, model=r.model | {"pattern": "AM"}), "of another model: pattern: 'MA', now 'AM'"),
        (lambda r: replace(r, seed=3), "cannot change seed: 0, now 3"),
        (lambda r: replace(r, data=replace(r.data, batch=8)), "cannot change data.batch: 4, now 8"),
        (lambda r: replace(r, data=replace(r.data, length=8)), "cannot change data.length: 24, now 8"),
    ],
)
def test_a_resumed_run_must_be_the_same(recipe, change, said):
    train(recipe, console=QUIET)
    with pytest.raises(CheckpointError) as error:
        train(change(recipe), resume=True, console=QUIET)
    assert said in str(error.value)


@pytest.mark.parametrize("file", ["optimizer.safetensors", "run.json", "model/model.safetensors"])
def test_a_damaged_checkpoint_is_named(recipe, file):
    path = train(recipe, console=QUIET) / "checkpoints" / "step-00000012" / file
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="step-00000012"):
        train(recipe, resume=True, console=QUIET)


def test_a_folder_that_cannot_be_written_is_said(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        train(replace(recipe, out=str(tmp_path / "file" / "run")), console=QUIET)


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({"data": Data(path="nowhere")}, DataError, "'nowhere' does not exist"),
        ({"data": Data(batch=3, accumulate=2)}, ConfigError, "data.batch is 3"),
        ({"model": "byte-hybird"}, ConfigError, "did you mean 'byte-hybrid'"),
        ({"model": {"d_modle": 3}}, ConfigError, "'d_modle'"),
        ({"model": ModelConfig(300, 8, {"L": (LSTMConfig(),)}, "L").to_dict()}, ConfigError, "300 tokens, but bytes"),
        ({"data": Data(tokenizer="nowhere.json")}, CheckpointError, "nowhere.json"),
        ({"device": "abacus"}, ArgumentError, "recipe: device 'abacus' cannot be used"),
        ({"device": "cuda:99"}, ArgumentError, "recipe: device 'cuda:99' cannot be used"),
    ],
)
def test_what_cannot_be_trained_is_said_and_leaves_no_run(recipe, change, error, said):
    with pytest.raises(error) as raised:
        train(replace(recipe, **change), console=QUIET)
    assert said in str(raised.value) and not (Path(recipe.out) / "recipe.json").exists()


def test_a_device_is_chosen_by_one_rule(recipe, monkeypatch):
    for there, found in (({"cuda", "xpu"}, "cuda"), ({"xpu"}, "xpu"), (set(), "cpu")):
        for kind in ("cuda", "xpu"):
            monkeypatch.setattr(getattr(torch, kind), "is_available", lambda there=there, kind=kind: kind in there)
        assert chosen_device("auto", "here") == setup._wanted(replace(recipe, device="auto")) == torch.device(found)
    out = train(replace(recipe, device="cpu:0", steps=1), console=QUIET)
    assert Recipe.load(out).device == "cpu:0"

    class Two:
        distributed_type, num_processes = setup.DistributedType.MULTI_GPU, 2

    monkeypatch.setattr(setup, "Accelerator", lambda **options: Two())
    monkeypatch.setattr(setup, "chosen_device", lambda name, where: torch.device(name))
    with pytest.raises(ConfigError, match=r"'cuda:1', one for 2 processes\n.*--set device=cuda"):
        setup.build_accelerator(replace(recipe, device="cuda:1"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert setup._wanted(replace(recipe, device="cuda")) == torch.device("cuda:1")


def test_a_short_text_leaves_no_run(recipe):
    with pytest.raises(DataError, match="fewer than one window of 100000"):
        train(replace(recipe, data=replace(recipe.data, length=100_000)), console=QUIET)
    assert not (Path(recipe.out) / "recipe.json").exists()
    train(recipe, console=QUIET)


def test_a_loss_that_is_no_number_ends_the_run(recipe, monkeypatch):
    real = LanguageModel.loss
    monkeypatch.setattr(LanguageModel, "loss", lambda self, *args: real(self, *args) * math.nan)
    with pytest.raises(DualformError, match="the loss is nan at step 3"):
        train(recipe, console=QUIET)


# --- evaluation ---


def held_out(n, vocab=11, separators=(0,)):
    random = np.random.default_rng(0)
    nbytes = random.integers(1, 4, n).astype(np.uint32)
    nbytes[list(separators)] = 0
    return Dataset(np.zeros(0), random.integers(0, vocab, n).astype(np.uint16), nbytes, {})


def small(**parts):
    torch.manual_seed(1)
    return LanguageModel(ModelConfig(11, 8, parts, "".join(parts))).double()


def stream_bits(model, ids, context=None):
    """Bits of every token but the first; with ``context`` the model forgets everything after so many tokens."""
    size = context or len(ids)
    bits = []
    for at in range(0, len(ids) - 1, size):
        x = torch.from_numpy(ids[at : at + size + 1].astype(np.int64))
        bits.append(F.cross_entropy(model(x[None, :-1])[0][0], x[1:], reduction="none") / math.log(2))
    return torch.cat(bits).detach()


HYBRID = {"M": (Mamba2Config(d_state=4, d_head=4),), "A": (AttentionConfig(heads=2, window=5),)}


def test_a_short_text_is_one_stream():
    model, data = small(**HYBRID), held_out(230)
    want = stream_bits(model, data.held_out).sum() / data.nbytes[1:].sum()
    assert bits_per_byte(model, data, length=7) == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("n", [203, 204, 208])
def test_a_long_text_is_several_streams_and_every_token_counts_once(monkeypatch, n):
    monkeypatch.setattr(evaluate, "_TOGETHER", 40)
    monkeypatch.setattr(evaluate, "_STREAMS", 4)
    model, data = small(**HYBRID), held_out(n, separators=(0, 50))
    borders = [k * (n - 1) // 4 for k in range(5)]
    pieces = [stream_bits(model, data.held_out[a : b + 1]) for a, b in pairwise(borders)]
    assert sum(map(len, pieces)) == n - 1
    want = torch.cat(pieces).sum() / data.nbytes[1:].sum()
    assert bits_per_byte(model, data, length=7) == pytest.approx(want.item(), rel=1e-6)
    bits = torch.cat([piece[:23] for piece in pieces]).sum()
    text = sum(int(data.nbytes[a + 1 : a + 24].sum()) for a in borders[:-1])
    assert bits_per_byte(model, data, length=7, limit=92) == pytest.approx(bits.item() / text, rel=1e-6)


def test_a_growing_state_restarts_after_every_window():
    model, data = small(A=(AttentionConfig(heads=2),)), held_out(8)
    want = stream_bits(model, data.held_out, context=7).sum() / data.nbytes[1:].sum()
    assert bits_per_byte(model, data, length=7) == pytest.approx(want.item(), rel=1e-6)
    data = held_out(141)  # 16 streams of 8 or 9 tokens
    borders = [k * 140 // 16 for k in range(17)]
    pieces = [stream_bits(model, data.held_out[a : b + 1], 7) for a, b in pairwise(borders)]
    want = torch.cat(pieces).sum() / data.nbytes[1:].sum()
    assert bits_per_byte(model, data, length=7) == pytest.approx(want.item(), rel=1e-6)


# --- the record ---


def test_checksums_are_crc32c_masked():
    """The check value of CRC-32C is 0xE3069283; TFRecord rotates and adds."""
    crc = 0xE3069283
    assert _checksum(b"123456789") == (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def test_tensorboard_reads_the_events(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = EventFile(tmp_path)
    for step in range(5):
        first.add(step, {"train/loss": step + 0.5, "held_out/bits": -float(step)})
    first.close()
    resumed = EventFile(tmp_path, 3)
    resumed.add(300, {"train/loss": 9.0})
    resumed.close()
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["held_out/bits", "train/loss"]
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert found == [(0, 0.5), (1, 1.5), (2, 2.5), (300, 9.0)]


def test_a_resumed_record_drops_what_came_after(tmp_path):
    with Report(tmp_path, 0, QUIET, {"gzip": 2.0, "xz": None}) as report:
        for step in (1, 2, 3):
            report.record("train", step, 0.1, loss=1.0, bits_per_byte=1.4)
    with Report(tmp_path, 2, QUIET, {}) as report:
        report.record("held_out", 3, 0.1, bits_per_byte=1.2)
    assert [(row["kind"], row["step"]) for row in read_metrics(tmp_path)] == [
        ("train", 1),
        ("train", 2),
        ("held_out", 3),
    ]


def test_durations_are_read_at_a_glance():
    assert [duration(s) for s in (0, 59.6, 61, 3599, 7265)] == ["0:00", "1:00", "1:01", "59:59", "2:01:05"]
    assert [amount(n, "B") for n in (768, 49_400, 7_339_000, 1_240_000_000)] == ["768 B", "49 kB", "7.3 MB", "1.2 GB"]
    assert [amount(n, " tokens") for n in (768, 7_339_000)] == ["768 tokens", "7.3 M tokens"]
