"""The command line: what reaches standard output, what reaches a person, and with which exit code."""

import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dualform.check.run import TOLERANCE, Result, run_checks
from dualform.cli import main as cli
from dualform.cli.check import _failures
from dualform.cli.check import check as check_command
from dualform.cli.generate import generate as generate_command
from dualform.cli.text import Until, printable
from dualform.generation.engine import generate
from dualform.generation.options import Sampling
from dualform.layers.mamba2 import Mamba2Config
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.tokenizer import ByteTokenizer
from dualform.ops.op import OPS, Backend, backend
from dualform.train.recipe import Recipe

COMMANDS = [
    "demo",
    "train",
    "generate",
    "eval",
    "compare",
    "forecast",
    "info",
    "convert",
    "watch",
    "verify",
    "check",
    "doctor",
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(256, 12, {"M": (Mamba2Config(d_state=8, d_head=4),)}, "MM")).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save(path)
    return str(path)


def process(*args):
    return subprocess.Popen(
        [sys.executable, "-m", "dualform", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        bufsize=0,  # communicate does not see what a buffer holds
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in this process: bit for bit is for equal threads
    )


@pytest.mark.skipif(sys.platform != "linux", reason="for GNU's OpenMP")
@pytest.mark.parametrize(
    "asked, found",
    [
        ({}, "GOMP_SPINCOUNT = '5000'"),
        ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'"),
        ({"OMP_WAIT_POLICY": "passive"}, "GOMP_SPINCOUNT = '0'"),
    ],
)
def test_waiting_threads_soon_sleep_unless_asked_otherwise(asked, found):
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run(
        [sys.executable, "-m", "dualform", "doctor"],
        capture_output=True,
        text=True,
        env=env | asked | {"OMP_DISPLAY_ENV": "verbose"},
    )
    assert run.returncode == 0, run.stderr
    assert found in run.stderr


def test_help_never_loads_torch():
    code = (
        "import sys; from dualform.cli.main import app\n"
        f"for command in [[], *([c] for c in {COMMANDS})]:\n"
        "    app([*command, '--help'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(f"dualform {command}" in run.stdout for command in COMMANDS)


def test_what_examples_run_as_a_module_does_something():
    modules = re.findall(r"-m (dualform[\w.]*)", "".join(sys.modules[c.__module__].EPILOG for c in commands()))
    assert modules and all(find_spec(f"{module}.__main__") for module in modules)


@pytest.mark.parametrize("module", ["dualform", "dualform.cli.main"])  # torchrun is given either
def test_a_module_runs_the_command(module):
    run = subprocess.run([sys.executable, "-m", module, "train", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "--resume" in run.stdout, run.stderr


def test_the_printed_recipe_is_the_built_in_one(dualform, tmp_path):
    code, out, err = dualform("train", "--print-recipe")
    assert (code, err) == (0, "") and "# the peak learning rate" in out
    (tmp_path / "mine.toml").write_text(out)
    assert Recipe.load(tmp_path / "mine.toml") == Recipe.load() == Recipe(minutes=2)


def commands():
    return [command.callback for command in cli.app.registered_commands]


def test_version_and_unknown_options(dualform):
    assert dualform("--version")[1].startswith("dualform 0.")
    code, out, err = dualform("generate", "--colour")
    assert code == 2 and out == "" and "--colour" in err


def test_a_default_is_the_same_here_and_in_python():
    defaults = {name: p.default for name, p in inspect.signature(generate_command).parameters.items()}
    options = asdict(Sampling())
    assert options.pop("presence_penalty") == 0  # in Python alone
    assert {name: defaults[name] for name in options} == options
    here, there = (inspect.signature(f).parameters for f in (check_command, run_checks))
    assert [here[name].default for name in ("device", "dtype", "length")] == [
        there[name].default for name in ("device", "dtype", "length")
    ]


def test_generate_writes_the_text_alone(dualform, folder, model):
    code, out, err = dualform("generate", folder, "import os", "-n", "40", "-t", "0.9", "--seed", "3")
    tokens = generate(model, b"import os", 40, sampling=Sampling(0.9), seed=3)
    assert (code, out, err) == (0, ByteTokenizer().decode(list(tokens)), "")


@pytest.mark.parametrize("argument", [[], ["-"]])
def test_generate_reads_standard_input(dualform, folder, argument):
    given = dualform("generate", folder, "déjà\n", "-n", "20")
    assert dualform("generate", folder, *argument, "-n", "20", stdin="déjà\n".encode()) == given


def test_every_sampling_option_reaches_the_engine(dualform, folder, model):
    options = ["--top-k", "50", "--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.3"]
    out = dualform("generate", folder, "x", "-n", "30", *options)[1]
    sampling = Sampling(1.0, 50, 0.9, 0.01, 1.3)
    assert out == ByteTokenizer().decode(list(generate(model, b"x", 30, sampling=sampling)))


def test_state_continues_as_if_never_interrupted(dualform, folder, tmp_path):
    """Characters cut in two by the interruption included: the untrained model writes any bytes."""
    unbroken = dualform("generate", folder, "x", "-n", "60", "--seed", "4", "--state", str(tmp_path / "whole"))[1]
    state = str(tmp_path / "parts")
    parts = [dualform("generate", folder, "x", "-n", "17", "--seed", "4", "--state", state)]
    parts += [dualform("generate", folder, "-n", n, "--state", state) for n in ("1", "0", "42")]
    assert all(code == 0 and err == "" for code, _, err in parts)
    assert "".join(out for _, out, _ in parts) == unbroken


def test_state_with_more_prompt(dualform, folder, model, tmp_path):
    state = str(tmp_path / "a.state")
    dualform("generate", folder, "one ", "-n", "0", "--state", state)
    out = dualform("generate", folder, "two", "-n", "20", "-t", "0", "--state", state)[1]
    assert out == ByteTokenizer().decode(list(generate(model, b"one two", 20, sampling=Sampling(0.0))))


def test_stop_text_is_held_back(dualform, folder):
    free = dualform("generate", folder, "x", "-n", "60")[1]
    stop = free[20:23]
    assert dualform("generate", folder, "x", "-n", "60", "--stop", stop)[1] == free[: free.index(stop)]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "endings, want", [(["abc"], "xxab"), (["c", "ab"], "xx"), (["zz"], None), (["bcxz"], None), ([""], None)]
)
def test_until(endings, want, size):
    text, until, out = "xxababcabd", Until(endings), ""
    want = text if want is None else want
    for i in range(0, len(text), size):
        piece = until.push(text[i : i + size])
        out += piece
        assert want.startswith(out)
    assert out + until.flush() == want and until.found == (want != text)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "before, text, want",
    [
        ("xab", "cxx", ""),  # an ending that began earlier
        ("xab", "xabc", "x"),
        ("xab", "ab", "ab"),
        ("xabc", "cabcx", "c"),  # one that was complete earlier
        ("", "xabcx", "x"),
        ("ab", "", ""),
    ],
)
def test_until_goes_on_where_text_before_it_ended(before, text, want, size):
    until, out = Until(["abc"], before), ""
    for i in range(0, len(text), size):
        out += until.push(text[i : i + size])
    assert out + until.flush() == want and until.found == ("abc" in before[-2:] + text)


def test_a_stop_text_is_found_across_runs(dualform, folder, tmp_path):
    """Wherever the first run ends inside of it; what that run has shown stays, and nothing more comes."""
    free = dualform("generate", folder, "x", "-n", "60")[1]
    stop = free[20:24]
    cut = free.index(stop)
    for at in range(17, 31, 3):
        state = str(tmp_path / f"{at}.state")
        first = dualform("generate", folder, "x", "-n", str(at), "--stop", stop, "--state", state)[1]
        if first != free[:cut]:
            rest = dualform("generate", folder, "-n", "60", "--stop", stop, "--state", state)[1]
            assert first + rest == free[: max(cut, len(first))]
    unbroken = dualform("generate", folder, "x", "-n", "60", "--stop", stop, "--state", str(tmp_path / "a"))[1]
    assert unbroken == free[:cut] and dualform("generate", folder, "-n", "9", "--state", str(tmp_path / "a"))[1]


def test_printable_leaves_text_and_disarms_escapes():
    assert printable("a\tb\nc é 😀") == "a\tb\nc é 😀"
    assert printable("\x1b[2J\r\x9b\x7f") == "\ufffd[2J\ufffd\ufffd\ufffd"


@pytest.mark.parametrize(
    "args, stdin, message",
    [
        (["generate", "FOLDER", ""], None, "prompt is empty"),
        (["generate", "FOLDER"], None, "prompt is empty"),
        (["generate", "FOLDER"], b"", "prompt is empty"),
        (["generate", "FOLDER", "-"], b"ab\xffcd", "byte 0xff at position 2 is not UTF-8"),
        (["generate", "FOLDER", "-"], b"ab\0cd", "NUL byte at position 2"),
        (["generate", "FOLDER", "x\udcff"], None, "not UTF-8"),
        (["generate", "FOLDER", "x", "--temperature", "-1"], None, "temperature"),
        (["generate", "FOLDER", "x", "--seed", "-1"], None, "seed"),
        (["generate", "FOLDER", "x", "--device", "abacus"], None, "--device abacus"),
        (["generate", "mamba-130m", "x"], None, "without weights"),
        (["generate", "no/such", "x"], None, "no/such"),
        (["generate", "FOLDER", "x", "--state", "FOLDER/config.json"], None, "config.json"),
        (["generate", "FOLDER", "x", "--state", "FOLDER"], None, "state"),
        (["info", "mamba-130"], None, "mamba-130"),
        (["train", "no-such-recipe"], None, "no-such-recipe"),
        (["train", "--set", "optim.lrr=1"], None, "optim.lrr"),
        (["train", "--set", "data.path=/no/such/file", "--out", "OUT"], None, "/no/such/file"),
        (["demo", "--out", "FOLDER"], None, "not made by a demo"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(dualform, folder, tmp_path, args, stdin, message):
    args = [a.replace("FOLDER", folder).replace("OUT", str(tmp_path / "run")) for a in args]
    code, out, err = dualform(*args, stdin=stdin)
    assert code == 2 and out == "" and err.startswith("error: ") and message in err
    assert "Traceback" not in err and len(err.splitlines()) <= 3


def test_a_state_of_another_model_is_refused(dualform, folder, tmp_path):
    state, other = str(tmp_path / "a.state"), str(tmp_path / "other")
    torch.manual_seed(1)
    LanguageModel(ModelConfig(256, 12, {"M": (Mamba2Config(d_state=8, d_head=4),)}, "MM")).save(other)
    dualform("generate", folder, "x", "-n", "3", "--state", state)
    before = Path(state).read_bytes()
    code, out, err = dualform("generate", other, "--state", state)
    assert code == 2 and out == "" and "saved with model" in err and Path(state).read_bytes() == before


def test_a_closed_pipe_is_quiet(folder):
    with process("generate", folder, "x", "-n", "100000") as run:
        assert run.stdout.read(20)
        run.stdout.close()
        assert run.stderr.read() == b"" and run.wait(60) != 0


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to one process")
def test_interrupt_saves_the_state_and_is_quiet(dualform, folder, tmp_path):
    state = str(tmp_path / "a.state")
    run = process("generate", folder, "x", "-n", "100000", "--state", state)
    first = run.stdout.read(20)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and err == b""
    written = (first + out).decode()
    unbroken = dualform("generate", folder, "x", "-n", str(len(first + out) + 40))[1]
    goes_on = dualform("generate", folder, "-n", "20", "--state", state)[1]
    assert goes_on and unbroken.startswith(written + goes_on)


def test_train_resume_and_use_a_run(dualform, tmp_path):
    text, run = tmp_path / "text.txt", str(tmp_path / "run")
    text.write_text("to be or not to be, that is the question.\n" * 40)
    small = [f"data.path={text}", "data.length=16", "data.batch=2", "model=byte-lstm", "model.d_model=16"]
    small += ["model.pattern=L", "steps=3", "seed=1"]
    code, out, err = dualform("train", *(x for one in small for x in ("--set", one)), "--out", run)
    assert code == 0 and "held-out: " in out and err == ""
    code, out, err = dualform("train", run, "--set", "steps=5", "--resume")
    assert code == 0 and "resumed after step 3" in out
    out = dualform("info", run)[1]
    assert "160 tokens in 5 steps" in out and "bits per byte" in out
    code, out, _ = dualform("generate", run, "to be", "-n", "5")
    assert code == 0 and 1 <= len(out) <= 5
    code, out, err = dualform("train", *(x for one in small for x in ("--set", one)), "--out", run)
    assert code == 2 and "a run is there already" in err


@pytest.mark.parametrize(
    "args, meant",
    [
        (["--lr", "3"], "--set optim.lr=3"),
        (["my.toml", "--batch=4", "--resume"], "my.toml --set data.batch=4 --resume"),
        (["my.toml", "data.path=a b", "--out", "x=y"], "my.toml --set 'data.path=a b' --out x=y"),
        (["length=64", "--set", "seed=1"], "--set data.length=64 --set seed=1"),
        (["--recompute", "--d-model", "8"], "--set recompute=true --set model.d_model=8"),
        (["--set", "optim.lr", "3"], "--set optim.lr=3"),
        (["my.toml", "FOLDER"], "my.toml --set data.path=FOLDER"),
        (["--model", "byte-lstm", "--minutes", "-1"], "--set model=byte-lstm --set minutes=-1"),
    ],
)
def test_a_key_without_set_gets_the_command_that_was_meant(dualform, folder, args, meant):
    args, meant = [a.replace("FOLDER", folder) for a in args], meant.replace("FOLDER", folder)
    code, out, err = dualform("train", *args)
    assert code == 2 and out == "" and f"hint: write: dualform train {meant}\n" in err


def test_a_wrong_option_of_train_is_still_refused(dualform):
    for wrong in ("--colour", "--resum"):
        code, _, err = dualform("train", wrong, "red")
        assert code == 2 and "No such option" in err


def test_a_limit_that_set_replaces_is_told(dualform, tmp_path, monkeypatch):
    monkeypatch.setattr("dualform.train.loop.train", lambda recipe, resume: None)
    code, out, err = dualform("train", "--set", "steps=5")
    assert (code, err) == (0, "") and out.startswith("steps = 5 replaces minutes = 2 of stdlib")


def test_demo_shows_what_it_promises(dualform, folder, model, tmp_path, monkeypatch):
    """All but the training, which the tests of train/ cover."""
    out = tmp_path / "demo"
    monkeypatch.setattr("dualform.train.loop.train", lambda recipe, console: model.save(f"{recipe.out}/model"))
    monkeypatch.setattr("dualform.cli.demo._LONG", 2_000)
    for _ in range(2):  # the second replaces what the first made
        code, text, err = dualform("demo", "--out", str(out), "--minutes", "0.1")
        assert code == 0 and err == "" and "class Reader:" in text and "tokens/s" in text
        size = next(line.split()[3] for line in text.splitlines() if "after  2,000 tokens" in line)
        assert f"after    100 tokens  {size} bytes" in text and "the same as without the interruption" in text
        assert f"dualform generate {out} --state {out}/demo.state" in text
    (out / "made-by-dualform-demo").unlink()
    code, text, err = dualform("demo", "--out", str(out))
    assert code == 2 and "not made by a demo" in err and (out / "demo.state").exists()


def test_check_prints_tables_and_judges(dualform, monkeypatch):
    code, out, err = dualform("check", "fft_conv", "lstm d=1", "--dtype", "float64", "--length", "9")
    assert code == 0 and err == "" and "lstm d=1" in out and "fft_conv [torch]" in out and "checks passed" in out
    monkeypatch.setitem(TOLERANCE, torch.float64, 0.0)
    code, out, _ = dualform("check", "fft_conv", "--dtype", "float64", "--length", "9")
    assert code == 1 and "failed: fft_conv" in out and "checks failed" in out
    code, out, err = dualform("check", "mamba2b")
    assert code == 2 and out == "" and "did you mean 'mamba2'" in err


def test_check_says_one_failure_once(dualform, monkeypatch):
    """However many checks end in it; numbers that are too large have a line each."""

    def fails(*args, **options):
        raise ValueError("no such thing")

    monkeypatch.setattr("dualform.check.run.compare", fails)
    code, out, _ = dualform("check", "fft_conv", "--length", "9")
    lines = [line for line in out.splitlines() if line.startswith("failed: ")]
    assert code == 1 and len(lines) == 1 and lines[0].endswith(": broken; ValueError: no such thing")
    assert "fft_conv [torch], forward, backward" in lines[0] and lines[0].count("forward") > 1
    found = [Result("laws", "s5", law, 0.5, 0.1, False, 0.0, "y") for law in ("split", "step")]
    assert _failures(found) == [f"s5, {law}: 5e-01, allowed 0.1; y" for law in ("split", "step")]


def test_check_does_not_pass_where_nothing_ran(dualform, monkeypatch):
    """A backend for GPUs refuses every call on the CPU."""
    with backend("cuda"):
        code, out, _ = dualform("check", "mamba2 d=1", "--length", "9")
    assert code == 1 and re.search(r"^0 of \d+ checks ran", out, re.M) and "passed" not in out
    absent = Backend("absent", lambda *a: [], lambda *a: [], refuses=lambda *a: "not today")
    monkeypatch.setattr(OPS["fft_conv"], "backends", [absent, *OPS["fft_conv"].backends])
    code, out, _ = dualform("check", "fft_conv", "--length", "9")
    assert code == 0 and "all 12 checks passed, 6 not run" in out


def strict(text):
    """A JSON document, in which NaN and Infinity are faults."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_what_is_found_is_there_as_json(dualform, folder, model, tmp_path, monkeypatch):
    code, out, err = dualform("info", folder, "--json")
    found = strict(out)
    assert code == 0 and err == "" and found["parameters"] == model.parameter_count() and found["run"] is None
    assert ModelConfig.from_dict(found["config"]) == model.config and found["kind"] == "LanguageModel"
    assert found["weights"]["bytes"] == Path(found["weights"]["path"]).stat().st_size
    assert found["active_parameters"] == found["parameters"]
    code, out, _ = dualform("info", "byte-jamba")
    experts = strict(dualform("info", "byte-jamba", "--json")[1])
    assert code == 0 and f"{experts['active_parameters']:,} of them" in out
    assert strict(dualform("info", "byte-transformer", "--json")[1])["state"]["bytes_per_token"] > 0
    versions = strict(dualform("doctor", "--json")[1])
    assert versions["versions"]["torch"] == torch.__version__ and versions["backend"] is None
    assert {row["op"] for row in versions["ops"]} == set(OPS) and "cpu" in versions["devices"]
    asked = ("check", "fft_conv", "--length", "9", "--json")
    found = strict(dualform(*asked)[1])
    assert found["ok"] and found["length"] == 9 and all(check["error"] <= 1e-4 for check in found["checks"])
    broken = Backend("broken", lambda *a: [torch.full_like(a[0].u, math.nan)], lambda *a: 1 / 0)
    monkeypatch.setattr(OPS["fft_conv"], "backends", [broken, *OPS["fft_conv"].backends])
    code, out, _ = dualform(*asked)
    assert code == 1 and not strict(out)["ok"] and any(check["error"] is None for check in strict(out)["checks"])


def test_names_mean_nothing_to_a_terminal(dualform, tmp_path):
    """Neither to the markup of Rich: letters of a pattern and names of folders may be any."""
    parts = {letter: (Mamba2Config(d_state=8, d_head=4),) for letter in "[/b]"}
    name = tmp_path / "[red]\x1b[/x]"
    LanguageModel(ModelConfig(256, 4, parts, "[/b]")).save(name)
    code, out, _ = dualform("info", str(name))
    assert code == 0 and "[/b] (4 blocks)" in out and "\x1b" not in out and "[red]\ufffd[/x]" in out
    code, _, err = dualform("info", str(name) + "\x1b")
    assert code == 2 and "\x1b" not in err


def test_info_of_a_preset(dualform):
    code, out, _ = dualform("info", "mamba2-130m")
    assert code == 0 and "M x 24" in out and "per token" not in out and "a preset is a shape" in out
    assert "per token" in dualform("info", "byte-transformer")[1]


def test_info_of_a_model(dualform, folder, model):
    code, out, _ = dualform("info", folder)
    size = generate(model, b"x", 1).state.state
    want = sum(leaf.numel() * leaf.element_size() for block in size for part in block for leaf in part)
    assert code == 0 and f"{model.parameter_count():,}" in out and f"{want:,} bytes per sequence" in out


@pytest.mark.parametrize("bidirectional", [False, True])
def test_info_of_a_classifier(dualform, tmp_path, bidirectional):
    from dualform.layers.s5 import S5Config
    from dualform.models.config import ModelConfig
    from dualform.models.heads import SequenceClassifier

    parts = {"S": (S5Config(d_state=4, bidirectional=bidirectional),)}
    model = SequenceClassifier(ModelConfig(0, 4, parts, "S"), 3, inputs=2)
    model.save(tmp_path / "model")
    code, out, err = dualform("info", str(tmp_path / "model"))
    assert code == 0 and err == "" and f"{model.parameter_count():,}" in out and "2 features" in out
    assert ("bidirectional model reads whole sequences" if bidirectional else "bytes per sequence") in out
    code, _, err = dualform("generate", str(tmp_path / "model"), "x")
    assert code == 2 and "a SequenceClassifier, expected a LanguageModel" in err


def test_doctor_names_every_op(dualform):
    code, out, _ = dualform("doctor")
    assert code == 0 and torch.__version__ in out and OPS and all(name in out for name in OPS)


def test_doctor_says_why_not(dualform, monkeypatch):
    from dualform.ops.op import Backend

    backend = Backend("abacus", lambda: [], lambda: [], devices=("cpu",), missing=lambda: "no beads")
    fake = SimpleNamespace(backends=[backend])
    monkeypatch.setitem(OPS, "counting", fake)
    out = dualform("doctor")[1]
    assert "counting" in out and "abacus: no beads" in out


def test_doctor_asks_each_backend_what_is_missing_now(dualform, monkeypatch):
    """What was missing may have been installed since, and a backend that is missing is never said to run."""
    missing = ["no beads"]
    backends = [
        Backend("abacus", lambda a: [], devices=("cpu",), missing=lambda: missing[0]),
        Backend("torch", lambda a: []),
    ]
    monkeypatch.setitem(OPS, "counting", SimpleNamespace(backends=backends))
    (row,) = [line for line in dualform("doctor")[1].splitlines() if "counting" in line and "cpu" in line]
    assert row.split()[:3] == ["counting", "cpu", "torch"] and "abacus: no beads" in row
    missing[0] = ""
    (row,) = [line for line in dualform("doctor")[1].splitlines() if "counting" in line and "cpu" in line]
    assert row.split()[:3] == ["counting", "cpu", "abacus"]
