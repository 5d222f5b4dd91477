"""Whatever is in a file or on a command line: a right result or one sentence, and never a traceback."""

import io
import json
import os
import subprocess
import sys

import pytest
import tokenizers
import torch

from dualform.cli import main as cli
from dualform.core.allocation import exceeded
from dualform.generation.session import Session
from dualform.layers.lstm import LSTMConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.tokenizer import SubwordTokenizer
from dualform.train.report import read_metrics

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
    assert err.count("error:") == 1 and len(err) < 1000


@pytest.mark.parametrize(
    "change, said",
    [
        ({"steps": "5"}, "steps is '5', expected int"),
        ({"tokens": None}, "tokens is None, expected int"),
        ({"bits_per_byte": [2.1]}, "bits_per_byte is [2.1], expected float"),
        ({"gzip": {}}, "gzip is {}, expected float | None"),
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


def shell(command, **environment):
    """A command in a shell of its own, where it has its standard streams to itself."""
    words = command.replace("dualform", f"{sys.executable} -m dualform", 1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["sh", "-c", words], capture_output=True, env=environment, stdin=subprocess.DEVNULL)


@pytest.mark.skipif(os.name == "nt", reason="the language of another shell")
def test_standard_output_may_be_closed_or_ascii(run):
    ended = shell(f"dualform generate {run} x >&-")
    assert ended.returncode == 2 and b"error: standard output is closed" in ended.stderr
    ended = shell(f"dualform generate {run} x -n 40", PYTHONIOENCODING="ascii")
    assert ended.returncode == 0 and ended.stderr == b"" and b"\\ufffd" in ended.stdout


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
