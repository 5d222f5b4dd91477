"""A state comes back from its file bit for bit; a file that does not fit is refused by the name of the leaf."""

import copy
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualform.core.errors import CheckpointError
from dualform.core.tree import leaves, named_leaves
from dualform.layers.attention import AttentionConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.s4d import S4DConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.saving import files
from dualform.models.saving.state import fingerprint, load_meta, load_state, save_state

PARTS = {
    "M": (Mamba2Config(d_state=4, d_head=4),),
    "m": (MambaConfig(d_state=3), MLPConfig(d_hidden=5)),
    "A": (AttentionConfig(heads=2),),
    "W": (AttentionConfig(heads=2, window=3),),
    "L": (LSTMConfig(hidden=3), MLPConfig(d_hidden=5)),
    "S": (S4DConfig(d_state=4),),
    "F": (MLPConfig(d_hidden=5),),
}


def build(pattern="MmAWLSF", seed=0, dtype=torch.float32, **change):
    torch.manual_seed(seed)
    parts = {**{letter: PARTS[letter] for letter in dict.fromkeys(pattern)}, **change}
    return LanguageModel(ModelConfig(7, 8, parts, pattern)).to(dtype)


def same(a, b):
    pairs = list(zip(named_leaves(a), named_leaves(b), strict=True))
    return all(n == m and x.dtype == y.dtype and torch.equal(x, y) for (n, x), (m, y) in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_and_the_same_continuation(tmp_path, dtype):
    model, path = build(dtype=dtype), tmp_path / "deep" / "a.state"
    x = torch.randint(7, (2, 9))
    _, state = model(x)  # with gradients, as views
    save_state(state, path, {"model": "this one"})
    assert load_meta(path) == {"model": "this one"} and os.listdir(path.parent) == ["a.state"]
    again = load_state(path, model.init_state(1))
    assert same(state, again) and type(again[0][0]) is type(state[0][0])
    assert not any(leaf.requires_grad for leaf in leaves(again))
    for _ in range(3):
        (want, state), (got, again) = model.step(x[:, 0], state), model.step(x[:, 0], again)
        assert torch.equal(want, got)


@pytest.mark.parametrize("state", [torch.ones(3, 2), (), (torch.ones(1), (torch.zeros(1, 2, dtype=torch.int64),))])
def test_any_tree(tmp_path, state):
    save_state(state, tmp_path / "s")
    assert same(load_state(tmp_path / "s", state), state) and load_meta(tmp_path / "s") == {}


def test_tensors_that_share_memory(tmp_path):
    whole = torch.arange(12.0).view(2, 6)
    state = (whole[:, :3], whole[:, 2:5], whole[:1].expand(2, -1), whole)
    save_state(state, tmp_path / "s")
    again = load_state(tmp_path / "s", state)
    assert same(again, state) and len({leaf.data_ptr() for leaf in again}) == 4


def test_rows_and_capacities_may_differ(tmp_path):
    model = build("AM")
    for length, like in ((5, model.init_state(1)), (2, model.init_state(4, max_len=16))):
        _, state = model(torch.randint(7, (3, length)))
        save_state(state, tmp_path / "s")
        assert same(load_state(tmp_path / "s", like), state)


def test_it_is_loaded_onto_the_device_of_the_template(tmp_path):
    model = build("MS")
    save_state(model.init_state(1), tmp_path / "s")
    again = load_state(tmp_path / "s", copy.deepcopy(model).to("meta").init_state(1))
    assert all(leaf.is_meta for leaf in leaves(again))


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = build("M"), tmp_path / "s"
    save_state(model.init_state(1), path)
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="cannot save: No space"):
            patch.setattr(files.os, name, lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            save_state(model(torch.ones(1, 3, dtype=torch.int64))[1], path)
        assert same(load_state(path, model.init_state(1)), model.init_state(1)) and os.listdir(tmp_path) == ["s"]
    with pytest.raises(CheckpointError, match="cannot save"):
        save_state(model.init_state(1), path / "below a file")


# --- refusals ---


@pytest.fixture
def saved(tmp_path):
    save_state(build("MA").init_state(1, max_len=4), tmp_path / "s")
    return tmp_path / "s"


@pytest.mark.parametrize(
    "pattern, change, message",
    [
        ("MAM", {}, "lacks '2.0.conv'"),
        ("M", {}, "has an unexpected '1.0.k'"),
        ("AM", {}, "lacks '0.0.k' and has an unexpected '0.0.conv'"),
        (
            "MA",
            {"M": (Mamba2Config(d_state=8, d_head=4),)},
            r"0.0.conv is torch.float32 \(1, 24, 3\), expected .* \(\*, 32, 3\)",
        ),
        ("MA", {"M": (Mamba2Config(d_state=4, d_head=8),)}, r"0.0.h is .* \(1, 4, 4, 4\), expected .* \(\*, 2, 8, 4\)"),
        ("MA", {"A": (AttentionConfig(heads=4),)}, r"1.0.k is .* \(1, 4, 2, 4\), expected .* \(\*, \*, 4, 2\)"),
    ],
)
def test_a_state_of_another_model(saved, pattern, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_state(saved, build(pattern, **change).init_state(1))


def test_a_state_of_another_dtype(saved):
    with pytest.raises(CheckpointError, match=r"is torch.float32 .*, expected torch.float64"):
        load_state(saved, build("MA").double().init_state(1))


def test_rows_that_disagree(tmp_path):
    state = (torch.ones(1, 2), torch.ones(2, 2))
    save_state(state, tmp_path / "s")
    with pytest.raises(CheckpointError, match="have 1 and 2 rows"):
        load_state(tmp_path / "s", state)


def test_damaged_files(saved, tmp_path):
    data = saved.read_bytes()
    for keep in (0, 7, 40, len(data) - 1):
        saved.write_bytes(data[:keep])
        for read in (lambda: load_state(saved, ()), lambda: load_meta(saved)):
            with pytest.raises(CheckpointError, match="cannot be read"):
                read()
    with pytest.raises(CheckpointError, match="no such file"):
        load_state(tmp_path / "nowhere", ())
    with pytest.raises(CheckpointError, match="no such file"):
        load_meta(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="not a state"):
        load_meta(tmp_path / "weights.safetensors")


def test_the_file_is_plain_safetensors(saved):
    assert load_file(saved).keys() == {"0.0.conv", "0.0.h", "1.0.k", "1.0.v", "1.0.length"}


# --- fingerprints ---


def test_a_fingerprint_tells_models_apart():
    model = build("MA")
    want = fingerprint(model)
    assert len(want) == 64 and fingerprint(copy.deepcopy(model)) == want == fingerprint(build("MA"))
    others = [
        build("MA", seed=1),
        build("MAM"),
        build("MA").double(),
        build("MA", A=(AttentionConfig(heads=2, rope=9.0),)),
    ]
    nudged = copy.deepcopy(model)
    with torch.no_grad():
        nudged.blocks[1].parts[0].out_proj.weight[-1, -1] += 1e-6
    prints = {fingerprint(other) for other in [*others, nudged]}
    assert len(prints) == 5 and want not in prints


def test_a_fingerprint_reads_a_sample_of_large_tensors(monkeypatch):
    model = LanguageModel(ModelConfig(9000, 16, {"F": PARTS["F"]}, "F"))
    want = fingerprint(model)
    with torch.no_grad():
        model.embed.weight.mul_(1.0001)
    assert fingerprint(model) != want
