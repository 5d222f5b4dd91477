"""Whatever is in a file or on a command line: a right result or one sentence, and never a traceback."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import traceback
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import fields

import pytest
import tokenizers
import torch
from rich.console import Console

from damage import damaged
from dualform.cli import main as cli
from dualform.core.allocation import exceeded
from dualform.core.errors import ConfigError
from dualform.generation.session import Session
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.registry import MIXERS, config_of
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.tokenizer import SubwordTokenizer
from dualform.train.recipe import Recipe
from dualform.train.report import Report, read_metrics
from dualform.train.setup import build_accelerator, build_model

SUMMARY = {"bits_per_byte": 2.1, "gzip": 3.0, "xz": None, "steps": 5, "tokens": 160}


@pytest.fixture
def dualform(monkeypatch, capsys):
    """Run a command in this process: ``(exit code, standard output, standard error)``."""

    def run(*args):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        monkeypatch.setattr(sys, "argv", ["dualform", *args])
        monkeypatch.setenv("COLUMNS", "160")
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def run(tmp_path):
    """The folder of a run, as far as the commands that read one look into it."""
    torch.manual_seed(0)
    LanguageModel(ModelConfig(256, 4, {"L": (LSTMConfig(),)}, "L")).save(tmp_path / "run" / "model")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(SUMMARY))
    return tmp_path / "run"


def refused(answer, said):
    code, _, err = answer
    assert code == 2 and err.startswith("error: ") and said in err and "Traceback" not in err, answer
    assert "\nerror:" not in err and len(err) < 1000


@pytest.mark.parametrize(
    "change, said",
    [
        ({"steps": "5"}, "steps is '5', expected a whole number"),
        ({"tokens": None}, "tokens is None, expected a whole number"),
        ({"bits_per_byte": [2.1]}, "bits_per_byte is [2.1], expected a number"),
        ({"gzip": {}}, "gzip is {}, expected a number, or none"),
        ("[" * 10**5, "nested more than"),
        ("[]", "holds a list, expected an object"),
    ],
)
def test_a_damaged_summary_is_named(dualform, run, change, said):
    assert "160 tokens in 5 steps" in dualform("info", str(run))[1]
    text = change if isinstance(change, str) else json.dumps(SUMMARY | change)
    (run / "summary.json").write_text(text)
    refused(dualform("info", str(run)), f"{run}/summary.json: ")
    assert said in dualform("info", str(run))[2]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"d_model": 10**12}, "too large to be built"),
        ({"d_model": 10**18}, "too large to be built"),
        ({"vocab_size": 10**400}, "64 bits"),
        ({"norm_eps": [1]}, "norm_eps"),
        ({"parts": {"L": [{"kind": ["lstm"]}]}}, "unknown kind"),
        ({"shared": 3}, "shared is 3"),
        ({"pattern": "L" * 10**6}, "1,000,000 sub-layers"),
    ],
)
@pytest.mark.parametrize("command", ["info", "generate"])
def test_a_damaged_config_is_named(dualform, run, command, change, said):
    path = run / "model" / "config.json"
    about = json.loads(path.read_text())
    about["model"] |= change
    path.write_text(json.dumps(about))
    refused(dualform(command, str(run), *["x"][: command == "generate"]), f"{path}: ")
    assert said in dualform(command, str(run), *["x"][: command == "generate"])[2]


def test_a_head_of_the_wrong_kind_is_named(dualform, run):
    path = run / "model" / "config.json"
    for head in ({"kind": ["x"]}, {"kind": "SequenceClassifier", "outputs": 10**18, "inputs": None, "pooling": "mean"}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"head": head}))
        refused(dualform("info", str(run)), str(run / "model"))


@pytest.mark.parametrize("kind", [*MIXERS, "mlp"])
def test_an_option_of_a_layer_may_hold_anything(kind):
    """The layer is built, without memory for it, or refused; no option makes it loop a thousand million times."""
    for field in fields(config_of(kind)):
        for value in (0, -1, 3, 0.5, -0.5, 1e300, 10**12, 2**62, "x", None, True, [], [1, 2], [1.0, 0.0], "nan"):
            part = {"kind": kind, **({"d_head": 4} if kind == "mamba2" else {}), field.name: value}
            table = {"vocab_size": 16, "d_model": 8, "parts": {"A": [part]}, "pattern": "A"}
            with suppress(ConfigError), torch.device("meta"):
                LanguageModel(ModelConfig.from_dict(table))


def test_damaged_metrics_are_left_out(run):
    good = {"kind": "train", "step": 1, "elapsed": 0.5, "bits_per_byte": 3.0}
    bad = ["", "[", "[]", "3", "{}", '{"kind": "train"}', '{"kind": 1, "step": 1}', '{"kind": "train", "step": "1"}']
    bad += [json.dumps(good | {"step": 10**30}), json.dumps(good | {"bits_per_byte": "3"}), "[" * 10**5, "\ufffd"]
    bad += [json.dumps(good | {"bits_per_byte": float("nan")}), json.dumps(good)[:-4]]
    path = run / "metrics.jsonl"
    path.write_bytes("\n".join([json.dumps(good), *bad, json.dumps(good)]).encode() + b"\n\xff\xfe\n")
    assert read_metrics(run) == [good, good]


def test_a_recipe_may_hold_anything(dualform, tmp_path):
    for name, text in {
        "a.toml": "a = " + "[" * 10**5,
        "b.json": "[" * 10**5,
        "c.json": "[]",
        "d.toml": "\udcff",
        "e.json": '{"steps": ' + "9" * 10**4 + "}",
        "f.toml": "steps = 9999999999999999999",
        "g.toml": "steps = 1\n[optim]\nlr = 99999999999999999999999999",
        "h.toml": "out = 2020-01-01",
    }.items():
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        refused(dualform("train", str(tmp_path / name)), "recipe")


@pytest.mark.parametrize("device", ["meta", "mps:7", "cuda:99", "hpu", "mkldnn", "", "cpu:x"])
@pytest.mark.filterwarnings("ignore:.*no longer used as device type")
def test_a_device_that_cannot_be_used_is_said(dualform, run, device):
    for command in (["generate", str(run), "x"], ["check", "fft_conv"]):
        code, _, err = dualform(*command, "--device", device)
        assert code == 2 and "cannot be used" in err and "Traceback" not in err


def test_what_is_too_large_for_memory_is_said(dualform, monkeypatch):
    refused(dualform("inspect", "s4d", "--d-model", str(10**12)), "not enough memory: ")
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 800 bytes. x"),
        MemoryError(),
        RuntimeError("Storage size calculation overflowed with sizes=[9]"),
    ):
        assert exceeded(error) and "\n" not in exceeded(error)
    assert not exceeded(RuntimeError("something else")) and not exceeded(KeyError("out of memory"))


@pytest.mark.skipif(os.name == "nt", reason="the language of another shell")
def test_a_closed_standard_output_is_said(run):
    words = f"{sys.executable} -m dualform generate {run} x >&-"
    ended = subprocess.run(["sh", "-c", words], capture_output=True, stdin=subprocess.DEVNULL)
    assert ended.returncode == 2 and b"error: standard output is closed" in ended.stderr


def test_a_character_that_standard_output_lacks_is_escaped(dualform, run, monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert dualform("generate", str(run), "x", "-n", "40")[0] == 0 and b"\\ufffd" in ascii_only.buffer.getvalue()


@pytest.fixture
def words(tmp_path):
    """A model of words, whose tokenizer puts them between ``<s>`` and ``</s>``."""
    vocab = {word: i for i, word in enumerate(["<s>", "</s>", *"abcd", "<unk>"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["<s>", "</s>"])
    pair = [("<s>", 0), ("</s>", 1)]
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pair)
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(7, 4, {"L": (LSTMConfig(),)}, "L"))
    model.save(tmp_path / "words", SubwordTokenizer(raw))
    return tmp_path / "words", model.eval()


def test_a_session_begins_as_training_did_and_a_prompt_in_it_does_not(dualform, words, tmp_path):
    folder, model = words
    state = tmp_path / "a.state"
    for prompt, said in [("a b", [0, 2, 3]), ("c", [4]), ("</s> d", [6, 5])]:
        assert dualform("generate", str(folder), prompt, "-n", "0", "--state", str(state))[0] == 0
        history = Session.load(state, model).history[0].tolist()
        assert history[-len(said) :] == said and history.count(0) == 1 and history.count(1) == 0


def test_a_panic_of_the_tokenizer_is_a_sentence(dualform, words, monkeypatch):
    """Its class is no Exception."""

    class PanicException(BaseException):
        pass

    def panic(*_, **__):
        raise PanicException("index out of bounds: the len is 3\nnote: more")

    for call in ("text_only", "opening"):
        with monkeypatch.context() as patch:
            patch.setattr(f"dualform.models.tokenizer.{call}", panic)
            refused(dualform("generate", str(words[0]), "a"), "index out of bounds")


def test_words_that_a_tokenizer_cannot_encode_are_said(dualform, tmp_path):
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "<unk>"))
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b c\n" * 50)
    settings = [
        f"data.path={tmp_path / 'text.txt'}",
        f"data.tokenizer={tmp_path / 'tokenizer.json'}",
        "data.separator=a",
    ]
    settings += ["model=byte-lstm", "steps=1", f"out={tmp_path / 'run'}"]
    refused(dualform("train", *(word for one in settings for word in ("--set", one))), "data.tokenizer: ")


def test_a_name_of_kernels_may_be_any_bytes():
    environment = {**os.environ, "DUALFORM_NATIVE_ISA": "\udcff"}
    code = "import dualform.ops.native.library as native; print(native.choose('nothing'))"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# --- at random ---


WORDS = ["", "x", "-1", "0", "1", "3", "1e400", "nan", "-inf", str(10**12), str(2**62), str(10**30), "\udcff", "a\0b"]
WORDS += ["--help", "--", "-", "é" * 300, "lstm", "s4d", "hippo:legs", "hippo:", "byte-lstm", "fft_conv", "cpu", "meta"]
WORDS += ["float32", "int8", "stdlib", "a.b=c", "optim.lr=x", "data.path=", "steps=[", "model.d_model=0", "x" * 5000]
OPTIONS = {
    "generate": "--state -n --max-tokens -t --top-k --top-p --min-p --repetition-penalty --seed --stop --device",
    "info": "--json",
    "inspect": "--out --d-model --seed",
    "check": "--device --dtype --length --json",
    "doctor": "--json",
    "train": "--set --out --resume",
    "demo": "--minutes --out --seed",
    "verify": "--json",
}


@contextmanager
def time_limit(seconds):
    """Ends what does not end."""

    def late(*_):
        raise TimeoutError(f"still at work after {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def judged(dualform, args):
    """``"right"`` or ``"refused"``; fails for anything else, and shows the command."""
    try:
        with time_limit(60):
            code, out, err = dualform(*args)
    except BaseException as error:
        error.add_note(f"dualform {args!r}")
        raise
    assert "Traceback" not in out + err, (args, err)
    if code == 2:
        usage = "Usage: " in out + err or "─ Error ─" in err
        assert usage or (err.startswith("error: ") and "\nerror: " not in err and len(err) < 9000), (args, err)
        return "refused"
    assert code in (0, 1) and (code == 0 or args[0] == "check"), (args, code, err)
    return "right"


@pytest.fixture
def no_training(monkeypatch):
    """``train`` ends where the first step would begin."""

    def begin(recipe, **_):
        build_accelerator(recipe)
        build_model(recipe)

    monkeypatch.setattr("dualform.train.loop.train", begin)
    monkeypatch.setattr("dualform.cli.demo._claim", lambda out: None)
    monkeypatch.setattr("dualform.cli.demo._show", lambda *_: None)


@pytest.fixture
def layers(tmp_path):
    """A model of every mixer, and a feed-forward."""
    heads = {key: {"d_head": 4} for key in ("mamba2", "rwkv6", "rwkv7")}
    small = {**heads, "attention": {"heads": 2, "window": 3}, "hyena": {"order": 3}}
    parts = {chr(65 + i): (kind(**small.get(name, {})),) for i, (name, kind) in enumerate(MIXERS.items())}
    parts["A"] += (MLPConfig(),)
    LanguageModel(ModelConfig(256, 8, parts, "".join(parts))).save(tmp_path / "layers")
    return tmp_path / "layers"


@pytest.fixture
def tries(dualform, run, words, layers, tmp_path, monkeypatch, no_training):
    """Functions of a source of randomness, one for each kind of file and for command lines; each makes one try."""
    monkeypatch.chdir(tmp_path)
    config, summary = run / "model" / "config.json", run / "summary.json"
    tokenizer, recipe = words[0] / "tokenizer.json", tmp_path / "recipe.json"
    recipe.write_text(
        json.dumps(Recipe(steps=1, model=ModelConfig(256, 4, {"L": (LSTMConfig(),)}, "L"), device="cpu").to_dict())
    )
    every = layers / "config.json"
    whole = {path: path.read_text() for path in (every, config, summary, tokenizer, recipe)}

    def of_file(path, *commands):
        def one(rng):
            path.write_bytes(damaged(whole[path], rng))
            answer = judged(dualform, list(rng.choice(commands)))
            path.write_text(whole[path])
            return answer

        return one

    def of_metrics(rng):
        rows = [{"kind": k, "step": i, "elapsed": 0.1, "bits_per_byte": 2.0} for i in range(3) for k in ("train", "x")]
        lines = [damaged(json.dumps(row), rng) if rng.random() < 0.5 else json.dumps(row).encode() for row in rows]
        (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
        rows = read_metrics(run)
        if rng.random() < 0.05:  # a picture takes long
            with Report(run, 2, Console(quiet=True), {"gzip": 2.0}) as report:
                report.record("train", 3, 0.1, bits_per_byte=1.0)
            assert read_metrics(run) == [*(row for row in rows if row["step"] <= 2), read_metrics(run)[-1]]
        return "right"

    def of_words(rng):
        command = rng.choice(list(OPTIONS))
        args = [command]
        if command in ("generate", "info") and rng.random() < 0.7:
            args += [str(run), "x", "-n", "2"][: 4 if command == "generate" else 1]
        if command == "check":
            args += ["fft_conv", "--length", "5"]
        for _ in range(rng.randrange(4)):
            args += [rng.choice(OPTIONS[command].split())] if rng.random() < 0.7 else []
            args += [rng.choice(WORDS)] if rng.random() < 0.8 else []
        if command == "generate":
            args += ["-n", "2"]  # whatever stands before
        return judged(dualform, args)

    return {
        "config.json": of_file(config, ["info", str(run)], ["generate", str(run), "x", "-n", "2"]),
        "config.json of all layers": of_file(every, ["info", str(layers)], ["generate", str(layers), "x", "-n", "1"]),
        "summary.json": of_file(summary, ["info", str(run)]),
        "tokenizer.json": of_file(tokenizer, ["generate", str(words[0]), "a b c", "-n", "2"]),
        "recipe": of_file(recipe, ["train", str(recipe)]),
        "metrics.jsonl": of_metrics,
        "command lines": of_words,
    }


KINDS = [
    "config.json",
    "config.json of all layers",
    "summary.json",
    "tokenizer.json",
    "recipe",
    "metrics.jsonl",
    "command lines",
]


@pytest.mark.skipif(os.name == "nt", reason="a limit of time by a signal")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_damage_at_random_is_refused_or_right(tries, kind, capsys):
    """``DUALFORM_TRIES`` makes as many of each kind, from the seed ``DUALFORM_SEED`` on."""
    count, first = int(os.environ.get("DUALFORM_TRIES", "25")), int(os.environ.get("DUALFORM_SEED", "0"))
    counts, faults = Counter(), []
    for seed in range(first, first + count):
        try:
            counts[tries[kind](random.Random(seed))] += 1
        except (Exception, BaseExceptionGroup) as error:
            faults.append(f"seed {seed}: {''.join(traceback.format_exception(error, limit=-4))}")
    with capsys.disabled():
        if count > 25:
            print(f"\n{kind}: {dict(counts)}, {len(faults)} others")
    assert not faults, "\n".join(faults[:20])
