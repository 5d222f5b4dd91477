"""Files of RWKV-7 as its authors publish them: a loop of the paper on the names of the file, and the way back."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import dualform as df
from damage import damaged_bytes
from dualform.core.errors import ArgumentError, CheckpointError, ConfigError, DualformError
from dualform.layers.block import SublayerConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.rwkv4 import RWKVChannel, RWKVChannelConfig
from dualform.models.tokenizer import load_tokenizer, read_tokenizer
from dualform.models.usage import read_ends
from dualform.models.world_tokenizer import VOCABULARY_FILE, WorldTokenizer
from dualform.train.loop import train
from dualform.train.recipe import Data, Lora, Optim, Recipe

V, D, N, BLOCKS = 11, 6, 3, 3
RANKS = {"w": 2, "a": 3, "g": 4, "v": 2}
QUIET = Console(quiet=True)


def file(dtype=torch.float64, vocab=V, unused=True) -> dict[str, Tensor]:
    """Random tensors under the names and in the shapes of a published file."""
    draw = torch.Generator().manual_seed(7)

    def normal(*shape: int, scale: float = 0.5) -> Tensor:
        return (scale * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + normal(D), f"{name}.bias": normal(D)}

    tensors = {"emb.weight": normal(vocab, D), **norm("blocks.0.ln0")}
    for i in range(BLOCKS):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        tensors |= {**norm(f"blocks.{i}.ln1"), **norm(f"blocks.{i}.ln2")}
        tensors |= {f"{att}x_{kind}": normal(1, 1, D) for kind in "rwkvag"}
        for kind, rank in RANKS.items():
            if kind == "v" and i == 0 and not unused:
                continue
            tensors |= {f"{att}{kind}1": normal(D, rank), f"{att}{kind}2": normal(rank, D)}
            if kind != "g":
                tensors[f"{att}{kind}0"] = normal(1, 1, D)
        tensors |= {f"{att}{name}": normal(1, 1, D) for name in ("k_k", "k_a")}
        tensors |= {f"{att}{name}.weight": normal(D, D) for name in ("receptance", "key", "value", "output")}
        tensors |= {f"{att}r_k": normal(D // N, N), **norm(f"{att}ln_x")}
        tensors |= {f"{ffn}x_k": normal(1, 1, D), f"{ffn}key.weight": normal(9, D), f"{ffn}value.weight": normal(D, 9)}
    return tensors | norm("ln_out") | {"head.weight": normal(vocab, D)}


def loop(z: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The logits of one sequence: arXiv:2503.14456, equations 3 to 21 and figure 1, a token at a time."""
    heads, logits = D // N, []
    before = torch.zeros(BLOCKS, 2, D, dtype=z["emb.weight"].dtype)
    states = torch.zeros(BLOCKS, heads, N, N, dtype=z["emb.weight"].dtype)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), z[f"{name}.weight"], z[f"{name}.bias"], 1e-5)

    for token in tokens:
        x, first = norm(z["emb.weight"][token], "blocks.0.ln0"), None
        for i in range(BLOCKS):
            p = {
                name.removeprefix(f"blocks.{i}.att."): t.squeeze() for name, t in z.items() if f"blocks.{i}.att" in name
            }
            u = norm(x, f"blocks.{i}.ln1")
            r, w, k, v, a, g = (u + (before[i, 0] - u) * p[f"x_{kind}"] for kind in "rwkvag")
            before[i, 0] = u
            w = torch.exp(-math.exp(-0.5) * torch.sigmoid(p["w0"] + torch.tanh(w @ p["w1"]) @ p["w2"]))
            a = torch.sigmoid(p["a0"] + a @ p["a1"] @ p["a2"])
            g = torch.sigmoid(g @ p["g1"]) @ p["g2"]
            r, k, value = p["receptance.weight"] @ r, p["key.weight"] @ k, p["value.weight"] @ v
            if first is None:
                first = value
            else:
                value = value + (first - value) * torch.sigmoid(p["v0"] + v @ p["v1"] @ p["v2"])
            removed = (k * p["k_k"]).view(heads, N)
            removed = removed / removed.norm(dim=1, keepdim=True)
            k = k * (1 + (a - 1) * p["k_a"])
            r, w, k, value, a = (m.view(heads, N) for m in (r, w, k, value, a))
            outs = []
            for h in range(heads):
                s = states[i, h]  # values by keys
                s = s * w[h] - (s @ removed[h])[:, None] * (removed[h] * a[h]) + value[h][:, None] * k[h]
                states[i, h], out = s, s @ r[h]
                outs.append((out - out.mean()) / (out.var(correction=0) + 64e-5).sqrt())
            y = torch.cat(outs) * p["ln_x.weight"] + p["ln_x.bias"]
            y = y + ((r * k * z[f"blocks.{i}.att.r_k"]).sum(1, keepdim=True) * value).flatten()
            x = x + p["output.weight"] @ (y * g)
            u = norm(x, f"blocks.{i}.ln2")
            mixed = u + (before[i, 1] - u) * z[f"blocks.{i}.ffn.x_k"].squeeze()
            before[i, 1] = u
            x = x + z[f"blocks.{i}.ffn.value.weight"] @ (z[f"blocks.{i}.ffn.key.weight"] @ mixed).relu().square()
        logits.append(z["head.weight"] @ norm(x, "ln_out"))
    return torch.stack(logits)


def put(path: Path, tensors: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def read(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_file_is_the_model_of_the_paper(tmp_path, suffix, dtype, tolerance):
    tensors = file(dtype)
    model = df.load(put(tmp_path / f"RWKV-x070-Test.{suffix}", tensors)).eval()
    tokens = torch.randint(V, (9,), generator=torch.Generator().manual_seed(1))
    want = loop(tensors, tokens)
    with torch.no_grad():
        got, state = model(tokens[None])
        torch.testing.assert_close(got[0], want, rtol=tolerance, atol=tolerance)
        _, state = model(tokens[None, :4])
        for t in range(4, 9):
            got, state = model.step(tokens[None, t], state)
            torch.testing.assert_close(got[0], want[t], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_there_and_back_every_bit_is_the_same(tmp_path, dtype):
    tensors = file(dtype)
    model = df.load(put(tmp_path / "a.pth", tensors))
    df.save(model, tmp_path / "own")
    for name in ("b.pth", "b.safetensors"):
        df.save(df.load(tmp_path / "own"), tmp_path / name, layout="rwkv7")
        again = read(tmp_path / name)
        assert set(tensors) - set(again) == {f"blocks.0.att.v{i}" for i in range(3)}  # which mean nothing
        assert all(torch.equal(again[key], tensors[key]) and again[key].dtype is dtype for key in again)
        assert df.load(tmp_path / name).config == model.config


def test_blocks_may_differ_in_size(tmp_path):
    tensors = file(unused=False)
    tensors["blocks.2.att.g1"], tensors["blocks.2.att.g2"] = torch.randn(D, 7).double(), torch.randn(7, D).double()
    model = df.load(put(tmp_path / "a.pth", tensors))
    assert model.config.pattern == "ABC" and model.config.parts["C"][0].part.gate_rank == 7
    tokens = torch.arange(5)
    torch.testing.assert_close(model(tokens[None])[0][0], loop(tensors, tokens))
    df.save(model, tmp_path / "b.pth", layout="rwkv7")
    assert read(tmp_path / "b.pth").keys() == tensors.keys()


def test_a_mix_is_the_share_of_the_previous_input():
    torch.manual_seed(0)
    layer = RWKVChannel(4, d_hidden=5, previous=True).double()
    other = RWKVChannel(4, d_hidden=5).double()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.mix_key, 1 - RWKVChannel(4).mix_key.double())
    with torch.no_grad():
        other.mix_key.copy_(1 - layer.mix_key)
        other.mix_receptance.copy_(1 - layer.mix_receptance)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), other(x))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda z: z.pop("blocks.1.att.w1"), ConfigError, r"a\.pth: blocks\.1\.att\.w1 is missing"),
        (lambda z: z.pop("blocks.1.att.k_a"), CheckpointError, r"1 missing, first 'blocks\.1\.att\.k_a'"),
        (lambda z: z.update({"blocks.1.ffn.s_emb.weight": z["emb.weight"]}), CheckpointError, "1 too many, first"),
        (lambda z: z.update({"blocks.1.att.r_k": torch.ones(D)}), ConfigError, r"has shape \(6,\), expected 2 axes"),
        (lambda z: z.update({"blocks.1.ln1.bias": torch.ones(2)}), CheckpointError, r"blocks\.1\.ln1\.bias"),
        (lambda z: z.update({"blocks.99999.ln1.bias": torch.ones(2)}), ConfigError, "at most 10,000 blocks"),
        (
            lambda z: (z.clear(), z.update({"a": torch.ones(1)})),
            CheckpointError,
            "tensors such as 'a', which do not say",
        ),
        (lambda z: z.clear(), CheckpointError, "holds no tensors"),
        (
            lambda z: (z.pop("blocks.0.att.r_k"), z.update({"blocks.0.att.time_faaaa": torch.ones(2)})),
            CheckpointError,
            "a model of RWKV before version 7",
        ),
        (lambda z: z.update({"more": "text"}), CheckpointError, "holds 'str', expected tensors"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, change, error, said):
    tensors = file()
    change(tensors)
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(error, match=said):
        df.load(tmp_path / "a.pth")


def test_a_file_that_could_run_code_is_refused(tmp_path):
    torch.save({**file(), "more": print}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="it holds more than tensors"):
        df.load(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"a\.pth: cannot be read"):
        df.load(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"no config\.json\n.*give the file: .*a\.pth"):
        df.load(tmp_path)


def test_what_the_layout_does_not_have_is_refused(tmp_path):
    model = df.load(put(tmp_path / "a.pth", file()))
    config = model.config
    first, channel = config.parts["A"]
    plain = RWKVChannelConfig(d_hidden=9, receptance=False)
    for change, said in (
        ({"tie_embeddings": True}, "tie_embeddings = True"),
        ({"embed_scale": 2.0}, "embed_scale = 2"),
        ({"norm": "rms"}, "norm"),
        ({"parts": {**config.parts, "B": (first, channel)}}, r"blocks\.1\.att\.v1 is missing"),
        ({"parts": {**config.parts, "B": (config.parts["B"][0], plain)}}, "RWKVChannel"),
        ({"parts": {**config.parts, "B": (MLPConfig(),)}}, "a block other than rwkv7 and rwkv_channel"),
        ({"parts": {**config.parts, "B": (SublayerConfig(config.parts["B"][0].part), channel)}}, "norm = 'rms'"),
    ):
        other = df.LanguageModel(replace(config, **change))
        with pytest.raises(ConfigError, match=said):
            df.save(other, tmp_path / "b.pth", layout="rwkv7")
    with pytest.raises(ArgumentError, match=r"ends in \.pth or \.safetensors"):
        df.save(model, tmp_path / "b", layout="rwkv7")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def vocabulary() -> str:
    """A small one in the form of the published file."""
    tokens: list[str | bytes] = [chr(i) if i < 128 else bytes([i]) for i in range(256)]
    tokens += ["th", "the", " the", " there", "é", "日本", b"\xe6\x97", "\n\n", "\u2028x"]
    lines = [f"{i} {t!r} {len(t.encode() if isinstance(t, str) else t)}" for i, t in enumerate(tokens, 1)]
    return "\n".join([*lines, '300 "\'s" 2']) + "\n"


def test_the_tokenizer_takes_the_longest_token():
    tokenizer = WorldTokenizer(vocabulary())
    assert tokenizer.vocab_size == 301 and tokenizer.begin == (0,)
    assert tokenizer.encode("the there's") == [258, 260, 300]
    assert tokenizer.encode("thé 日本日\n\n\n") == [257, 261, 33, 262, 263, 1 + 0xA5, 264, 11]
    for text in ("", "the é日本語\u2028x\r\x85", "<|endoftext|>", "\udcff"):
        ids = tokenizer.encode(text)
        want = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        assert tokenizer.decode(ids) == want and 0 not in ids
        stream = tokenizer.stream()
        assert "".join(stream.push(token) for token in ids) + stream.flush() == want
    assert tokenizer.encode("the<|endoftext|>the", special=True) == [258, 0, 258]
    assert tokenizer.decode([258, 0, 70000, 258]) == "thethe"
    with pytest.raises(ArgumentError, match="lone surrogate"):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("258 'the' 3", "258 'the' 4"), "line 258 is \"258 'the' 4\", expected"),
        (lambda text: text.replace("258 'the' 3", "257 'the' 3"), "line 258"),
        (lambda text: text.replace("258 'the' 3", "258 print 3"), "line 258"),
        (lambda text: text.replace("258 'the' 3", "258 {} 3"), "line 258"),
        (lambda text: "".join(text.splitlines(True)[1:]), "no token for the byte 0"),
        (lambda text: "", "line 1"),
    ],
)
def test_a_damaged_vocabulary_is_named(tmp_path, change, said):
    (tmp_path / VOCABULARY_FILE).write_text(change(vocabulary()))
    with pytest.raises(CheckpointError, match=said):
        read_tokenizer(tmp_path / VOCABULARY_FILE)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", VOCABULARY_FILE])
def test_damage_is_refused_in_a_sentence_or_read(tmp_path, name):
    path, draw, refused = tmp_path / name, random.Random(0), 0
    if name == VOCABULARY_FILE:
        path.write_text(vocabulary())
    else:
        put(path, file(torch.float32))
    whole = path.read_bytes()
    for _ in range(30):
        path.write_bytes(damaged_bytes(whole, draw))
        try:
            read_tokenizer(path) if name == VOCABULARY_FILE else df.load(path)
        except DualformError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused


@pytest.fixture
def world(tmp_path) -> Path:
    """A file with its vocabulary beside it."""
    (tmp_path / VOCABULARY_FILE).write_text(vocabulary())
    return put(tmp_path / "RWKV-x070-World-Test.pth", file(torch.float32, vocab=304))


def test_commands_take_a_file(dualform, world, tmp_path):
    code, out, _ = dualform("info", world)
    assert code == 0 and "rwkv7" in out and "304" in out
    code, direct, err = dualform("generate", world, "the ", "-n", 5, "--seed", 1)
    assert (code, err) == (0, "")
    for target, to in (("own", "dualform"), ("back.safetensors", "rwkv7")):
        source = world if to == "dualform" else tmp_path / "own"
        code, out, err = dualform("convert", source, tmp_path / target, "--to", to)
        assert (code, err) == (0, "") and f"in the layout of {to}" in out
    assert dualform("generate", tmp_path / "own", "the ", "-n", 5, "--seed", 1)[1] == direct
    assert json.loads((tmp_path / "own" / "generation_config.json").read_text()) == {"eos_token_id": [0]}
    assert load_tokenizer(tmp_path / "own", 304).encode("the") == [258]
    assert dualform("verify", tmp_path / "own")[0] == 0
    back, given = read(tmp_path / "back.safetensors"), read(world)
    assert all(torch.equal(back[name], given[name]) for name in back)
    text = tmp_path / "text.txt"
    text.write_text("the there\n" * 30)
    assert dualform("eval", world, "--set", f"data.path={text}")[0] == 0
    assert read_ends(world, 304) == [0]


def test_a_missing_vocabulary_is_said(dualform, world):
    world.with_name(VOCABULARY_FILE).unlink()
    code, _, err = dualform("generate", world, "a")
    assert code == 2 and f"no {VOCABULARY_FILE} beside it, and a vocabulary of 304 is not bytes" in err


@pytest.mark.parametrize("rank", [0, 2])
def test_training_goes_on_from_a_file(world, tmp_path, rank):
    if rank:
        pytest.importorskip("peft")
    text = tmp_path / "text.txt"
    text.write_text("the there the cat's é\n" * 200)
    recipe = Recipe(
        model=str(world),
        out=str(tmp_path / "run"),
        steps=2,
        device="cpu",
        data=Data(path=str(text), length=16, batch=2, separator="<|endoftext|>"),
        optim=Optim(lr=0.01, warmup=1),
        lora=Lora(rank=rank),
    )
    train(recipe, console=QUIET)
    train(replace(recipe, steps=3), console=QUIET, resume=True)
    before, after = (df.load(path).state_dict() for path in (world, tmp_path / "run"))
    assert not torch.equal(before["blocks.1.parts.0.key.weight"], after["blocks.1.parts.0.key.weight"])
    assert load_tokenizer(tmp_path / "run" / "model", 304).encode("the") == [258]
