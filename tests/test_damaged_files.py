"""Damaged files end in a refusal or in the right result, and in nothing else: flips, cuts, wrong types, absurd numbers.

``DUALFORM_DAMAGES=1000`` makes so many tries of each kind instead of a few; ``-s`` prints the counts.
"""

import json
import math
import os
import random
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dualform.cli.lines import Sample, columns_of
from dualform.cli.main import app
from dualform.cli.watched import Options, Watch, saved_columns
from dualform.core.errors import DualformError
from dualform.core.tree import leaves
from dualform.gaussian.model import LinearGaussian
from dualform.generation.engine import generate
from dualform.generation.session import Session
from dualform.layers.attention import AttentionConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.models.adapters import adapt, adapter_tensors
from dualform.models.chat import ChatTemplate
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.quantized import quantize
from dualform.models.saving.adapter import base_digests
from dualform.models.saving.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from dualform.models.saving.model import load, save
from dualform.models.saving.state import load_meta, load_state, save_state
from dualform.models.tokenizer import ByteTokenizer
from dualform.train.best import Best
from dualform.train.checkpoint import Position, restore_checkpoint, save_checkpoint
from dualform.train.data import open_dataset, prepare
from dualform.train.optim import build_optimizer
from dualform.train.recipe import Data, Recipe

try:
    import peft
except ImportError:
    peft = None

TRIES = int(os.environ.get("DUALFORM_DAMAGES", "20"))
CONFIG = ModelConfig(256, 4, {"L": (LSTMConfig(hidden=2),), "A": (AttentionConfig(heads=1),)}, "LA")
ABSURD = [-1, 0, 1, 2**31, 2**63, 10**30, -(10**18), 0.5, 1e308, "", "x", "F32", None, True, [], {}, [[]], {"a": {}}]

TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}")


def chat_data(root):
    return Data(path=str(root / "talks.jsonl"), chat=True, length=8, held_out=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One of each kind of file, as the library writes it."""
    root = tmp_path_factory.mktemp("made")
    (root / "text").mkdir()
    for i in range(5):
        (root / "text" / f"{i}.txt").write_text(f"document {i}\n" + "some words here\n" * 9)
    data = Data(path=str(root / "text"), length=8, packed=True, held_out=3)
    recipe = Recipe(model=CONFIG.to_dict(), steps=9, data=data)
    prepare(data, ByteTokenizer(), root / "data")
    torch.manual_seed(0)
    model = LanguageModel(CONFIG)
    optimizer = build_optimizer(model, recipe.optim)
    model.loss(torch.randint(256, (2, 9))).backward()
    optimizer.step()
    save_checkpoint(root, recipe, Position(1, 2.5, 3.5, 1), model, optimizer, ByteTokenizer())
    model.save(root / "model")
    quantize(load(root / "model")).save(root / "quantized")
    if peft:
        torch.manual_seed(1)
        adapted = load(root / "model")
        adapted.adaptation = adapt(adapted, root / "model", base_digests(root / "model"), rank=2, alpha=4.0)
        for matrix in adapter_tensors(adapted).values():
            torch.nn.init.normal_(matrix)
        adapted.save(root / "adapters")
    talk = [{"role": "user", "content": "some words"}, {"role": "assistant", "content": "an answer"}]
    (root / "talks.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 5)
    prepare(chat_data(root), ByteTokenizer(), root / "chat", TEMPLATE)
    Best(root / "best", resumed=False).offer(2.5, 7, model, ByteTokenizer())
    generate(model, b"import ", 0).state.save(root / "a.session", model)
    _, state = model(torch.randint(256, (2, 3)))
    save_state(state, root / "a.state", {"word": "kept"})
    level = LinearGaussian([[0.9]], [[1.0]], [[0.3]], [[0.2]], P0=1.0)
    save(level, root / "level")
    watching(level).save(root / "a.watch")
    for name in ("session", "state"):  # of the first version, without a digest
        words = {**load_meta(root / f"a.{name}"), "dualform_state": "1"}
        save_file(load_file(root / f"a.{name}"), root / f"old.{name}", words)
    return root, recipe, model


def watching(level):
    """A watch that has seen two streams."""
    watch = Watch(level, columns_of(["id", "at", "x"], id="id", time="at"), Options())
    list(watch.push([Sample(1, "a", 0.5, "0.5", [1.0]), Sample(2, "b", 1.5, "1.5", [2.0])]))
    return watch


class Reader:
    """Reads each kind of file; gives everything that came of it."""

    def __init__(self, root, recipe, model):
        self.root, self.recipe, self.model = root, recipe, model
        self.talks = Path(recipe.data.path).parent  # which is not copied
        self.like, self.fresh = model.init_state(1), LanguageModel(CONFIG)

    def weights(self):
        model = load(self.root / "model", verify=(self.root / "model" / "manifest.json").exists())
        return [model.config.to_dict(), *model.state_dict().values()]

    def quantized(self):
        model = load(self.root / "quantized", verify=(self.root / "quantized" / "manifest.json").exists())
        return [model.config.to_dict(), model.quantization, *model.state_dict().values()]

    def optimizer(self):
        optimizer = build_optimizer(self.fresh, self.recipe.optim)
        position, changed = restore_checkpoint(self.root / "step-00000001", self.recipe, self.fresh, optimizer)
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return [position, changed, *self.fresh.state_dict().values(), *moments]

    def prepared(self):
        found = open_dataset(self.recipe.data, ByteTokenizer(), self.root / "data")
        arrays = [found.train, found.held_out, found.nbytes, found.train_starts, found.held_out_starts]
        return [found.about, *(array.tolist() for array in arrays)]

    def chat(self):
        found = open_dataset(chat_data(self.talks), ByteTokenizer(), self.root / "chat", TEMPLATE)
        return [found.about, *(array.tolist() for array in (found.train, found.held_out, found.nbytes))]

    def adapters(self):
        model = load(self.root / "adapters", verify=(self.root / "adapters" / "manifest.json").exists())
        return [model.config.to_dict(), *model.state_dict().values()]

    def best(self):
        best = Best(self.root / "best", resumed=True)
        return [best.step, best.bits, *load(self.root / "best").state_dict().values()]

    def session(self, name="a.session"):
        return leaves(Session.load(self.root / name, self.model))

    def state(self, name="a.state"):
        return [load_meta(self.root / name), *leaves(load_state(self.root / name, self.like))]

    def level(self):
        model = load(self.root / "level", verify=(self.root / "level" / "manifest.json").exists())
        return [repr(model), model.prior, *model.state_dict().values()]

    def watch(self):
        watch = watching(load(self.root / "level"))
        watch.restore(self.root / "a.watch")
        next_ = [Sample(i, name, 3.0, "3", [0.5]) for i, name in enumerate("abc")]
        return [watch.samples, saved_columns(self.root / "a.watch"), *watch.push(next_)]

    def old_session(self):
        return self.session("old.session")

    def old_state(self):
        return self.state("old.state")


CHECKPOINT = "step-00000001"
KINDS = [  # the file that is damaged, and what reads it
    ("model/model.safetensors", "weights"),
    ("model/config.json", "weights"),
    ("model/manifest.json", "weights"),
    ("quantized/model.safetensors", "quantized"),
    ("quantized/config.json", "quantized"),
    (f"{CHECKPOINT}/optimizer.safetensors", "optimizer"),
    (f"{CHECKPOINT}/run.json", "optimizer"),
    (f"{CHECKPOINT}/manifest.json", "optimizer"),
    ("data/train.ids", "prepared"),
    ("data/train.starts", "prepared"),
    ("data/held_out.nbytes", "prepared"),
    ("data/about.json", "prepared"),
    ("data/manifest.json", "prepared"),
    ("chat/train.ids", "chat"),
    ("chat/about.json", "chat"),
    ("best/evaluation.json", "best"),
    ("best/model.safetensors", "best"),
    ("best/manifest.json", "best"),
    ("a.session", "session"),
    ("a.state", "state"),
    ("level/config.json", "level"),
    ("level/model.safetensors", "level"),
    ("a.watch", "watch"),
]
if peft:
    KINDS += [(f"adapters/{file}", "adapters") for file in (ADAPTER_CONFIG_FILE, ADAPTER_FILE, "manifest.json")]


def flipped(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(data, rng):
    return data[: rng.choice((0, 1, 7, 8, 9, len(data) - 1, rng.randrange(len(data))))]


def extended(data, rng):
    return data + rng.choice((b"\0", b" ", b"}", data, rng.randbytes(rng.randrange(1, 64))))


def blanked(data, rng):
    at = rng.randrange(len(data))
    size = rng.randrange(1, 64)
    return data[:at] + b"\0" * len(data[at : at + size]) + data[at + size :]


def edited(data, rng):
    """JSON, or the header of a safetensors file, with one value or one key replaced; numbers in other files."""
    if data[:1] in b"{[":
        return changed(data, rng)
    if data[8:10] == b'{"':
        (size,) = struct.unpack("<Q", data[:8])
        header = changed(data[8 : 8 + size], rng)
        size = rng.choice((len(header),) * 9 + (2**63, len(header) + 1))
        return (
            struct.pack("<Q", size) + header + data[8 + size :] if size < 2**40 else struct.pack("<Q", size) + data[8:]
        )
    at = rng.randrange(0, len(data), 8)
    return data[:at] + rng.choice((b"\xff" * 8, b"\0" * 8, b"\0" * 7 + b"\x7f", rng.randbytes(8))) + data[at + 8 :]


def changed(text, rng):
    value = json.loads(text)
    places = []

    def walk(node):
        if isinstance(node, dict | list):
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                walk(node[key])

    walk(value)
    if not places or rng.random() < 0.05:
        return rng.choice((json.dumps(rng.choice(ABSURD)).encode(), b"[" * 10**5, b'{"a":' * 1000, b"9" * 5000, b"NaN"))
    node, key = rng.choice(places)
    how = rng.randrange(4)
    if how == 0 and isinstance(node, dict):
        node[rng.choice(("x", "", "../up", str(key) * 2))] = node.pop(key)
    elif how == 1:
        del node[key]
    elif how == 2 and isinstance(node[key], int | float):
        node[key] = rng.choice((-node[key], node[key] + 1, node[key] * 2, node[key] * 10**9, math.nan, str(node[key])))
    else:
        node[key] = rng.choice(ABSURD)
    return json.dumps(value).encode()


DAMAGES = [flipped, flipped, cut, extended, blanked, edited, edited]


@dataclass
class Counts:
    """What became of the tries."""

    tries: int = 0
    refused: int = 0
    right: int = 0
    other: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.tries} tries, {self.refused} refused, {self.right} right, {len(self.other)} other"


def same(a, b):
    def equal(x, y):
        if isinstance(x, torch.Tensor):
            return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
        return x == y

    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


def damage(path: Path, read, seed: int, *, trusted: bool) -> Counts:
    """Damage a file in many ways, and read it.

    Args:
        path: the file; it is whole again afterwards.
        read: gives what came of it.
        seed: of the damages.
        trusted: whether nothing can tell that a value changed, so that another result is right, too.
    """
    whole, want, counts, rng = path.read_bytes(), read(), Counts(), random.Random(seed)
    for attempt in range(TRIES):
        how = rng.choice(DAMAGES)
        data = how(whole, rng)
        path.write_bytes(data)
        counts.tries += 1
        try:
            found = read()
        except DualformError as error:
            counts.refused += 1
            if not str(error).strip() or "Traceback" in str(error):
                counts.other.append(f"{attempt} {how.__name__}: says nothing: {error!r}")
        except BaseException as error:  # Rust's panics are no Exceptions
            counts.other.append(f"{attempt} {how.__name__}: {type(error).__name__}: {error}")
        else:
            counts.right += 1
            if not trusted and not same(found, want):
                counts.other.append(f"{attempt} {how.__name__}: another result")
    path.write_bytes(whole)
    assert same(read(), want)
    return counts


@pytest.mark.parametrize("file, reads", KINDS)
def test_a_damaged_file_is_refused_or_right(made, file, reads):
    root, recipe, model = made
    counts = damage(root / file, getattr(Reader(root, recipe, model), reads), seed=len(file), trusted=False)
    print(f"\n{file}: {counts}")
    assert counts.tries == counts.refused + counts.right and counts.refused > 0 and not counts.other, counts.other[:5]


ALONE = [(file, reads) for file, reads in KINDS if "/" in file and "manifest" not in file]
ALONE += [("old.session", "old_session"), ("old.state", "old_state")]


@pytest.mark.parametrize("file, reads", ALONE)
def test_without_a_digest_it_is_refused_or_taken_as_it_is(made, tmp_path, file, reads):
    """Of older versions: nothing tells a changed weight, but what is read fits, or is refused in a sentence."""
    root, recipe, model = made
    shutil.copytree(root, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("manifest.json"):
        path.unlink()
    reader = Reader(tmp_path / "copy", recipe, model)
    counts = damage(tmp_path / "copy" / file, getattr(reader, reads), seed=len(file), trusted=True)
    print(f"\n{file}, alone: {counts}")
    assert counts.tries == counts.refused + counts.right and counts.refused > 0 and not counts.other, counts.other[:5]


# --- folders of other libraries ---


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A small Mamba in the layout of transformers, in one file, in two with an index and as PyTorch writes it; and in
    that of mamba-ssm; what ``dualform convert`` makes of both; and a file of GGUF."""
    root = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(16, 4, {"M": (MambaConfig(d_state=2, dt_rank=1),)}, "MM"))
    for name, layout in (("hf", "hf"), ("ssm", "mamba_ssm")):
        save(model, root / name, layout=layout)
        CliRunner().invoke(app, ["convert", str(root / name), str(root / f"of_{name}")])
    tensors = load_file(root / "hf" / "model.safetensors")
    for name, suffix, write in (("shards", "safetensors", save_file), ("pickle", "bin", torch.save)):
        (root / name).mkdir()
        shutil.copy(root / "hf" / "config.json", root / name)
        parts = {f"{i}.{suffix}": dict(sorted(tensors.items())[i::2]) for i in (0, 1)}
        if name == "pickle":
            parts = {"pytorch_model.bin": tensors}
        for file, part in parts.items():
            write(part, root / name / file)
        if len(parts) == 2:
            places = {key: file for file, part in parts.items() for key in part}
            (root / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save(model, root / "gguf" / "model.gguf", layout="gguf")
    for path in (root / "hf", root / "ssm"):
        (path / "manifest.json").unlink()
    return root


FOREIGN = ["hf/config.json", "hf/model.safetensors", "ssm/config.json", "ssm/model.safetensors"]
FOREIGN += ["shards/model.safetensors.index.json", "shards/1.safetensors", "pickle/pytorch_model.bin"]
FOREIGN += ["gguf/model.gguf", "of_hf/config.json", "of_hf/model.safetensors", "of_ssm/manifest.json"]


@pytest.mark.parametrize("file", FOREIGN)
def test_a_damaged_file_of_another_library_is_refused_or_taken_as_it_is(foreign, file):
    folder = (foreign / file).parent
    whole = (folder / "manifest.json").exists()

    def read():
        place = folder if file != "gguf/model.gguf" else foreign / file
        model = load(place, verify=(folder / "manifest.json").exists())
        return [model.config.to_dict(), *model.state_dict().values()]

    counts = damage(foreign / file, read, seed=len(file), trusted=not whole)
    print(f"\n{file}: {counts}")
    assert counts.tries == counts.refused + counts.right and counts.refused > 0 and not counts.other, counts.other[:5]


def test_a_weight_that_changed_is_found_where_it_is_looked_for(made):
    """Without ``verify`` a flip inside of a tensor is not seen; with it, every one is."""
    root, _, model = made
    path = root / "model" / "model.safetensors"
    whole, rng = path.read_bytes(), random.Random(0)
    (size,) = struct.unpack("<Q", whole[:8])
    for _ in range(10):
        data = bytearray(whole)
        data[rng.randrange(8 + size, len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert not same([*load(root / "model").state_dict().values()], [*model.state_dict().values()])
        with pytest.raises(DualformError, match="damaged: its digest is"):
            load(root / "model", verify=True)
    path.write_bytes(whole)
