"""One step of a model as an ONNX file: run by onnxruntime it is the model, step after step, for any batch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dualform as df
from dualform.core.errors import ArgumentError, CheckpointError, DualformError
from dualform.layers.attention import AttentionConfig
from dualform.layers.bidirectional import BidirectionalConfig
from dualform.layers.block import SublayerConfig
from dualform.layers.gated_delta_net import GatedDeltaNetConfig
from dualform.layers.lru import LRUConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.moe import MoEConfig
from dualform.layers.rwkv4 import RWKV4Config, RWKVChannelConfig
from dualform.layers.rwkv7 import RWKV7Config
from dualform.layers.s4 import S4Config
from dualform.layers.s4d import S4DConfig
from dualform.models.config import ModelConfig
from dualform.models.heads import SequenceRegressor
from dualform.models.lm import LanguageModel
from dualform.models.saving import onnx_file
from dualform.models.saving.onnx_file import _number, _place, export_onnx

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

V, D, STEPS = 13, 12, 24
RANKS = {"d_head": 4, "decay_rank": 2, "rate_rank": 3, "gate_rank": 4}
MLP = MLPConfig(d_hidden=8)


def config(pattern: str, vocab: int = V, **parts) -> ModelConfig:
    return ModelConfig(vocab, D, parts, pattern)


def drawn(model):
    """A model with weights that matter, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def opened(path):
    session = runtime.InferenceSession(path)
    return session, json.loads(session.get_modelmeta().custom_metadata_map["dualform"])


def zero(about, batch):
    """The state at the start, as the file describes it."""
    leaves = about["state"]
    return {m["input"]: np.full([batch, *m["shape"][1:]], m["start"], m["dtype"]) for m in leaves}


def agrees(model, path, max_len=0):
    """The file computes what the model does, and says what there is."""
    session, about = opened(path)
    assert all(module.training for module in model.modules())  # it was left as it was
    model.eval()
    assert [one.name for one in session.get_inputs()] == [about["input"], *(m["input"] for m in about["state"])]
    assert [one.name for one in session.get_outputs()] == [about["output"], *(m["output"] for m in about["state"])]
    assert [one.shape for one in session.get_inputs()[1:]] == [m["shape"] for m in about["state"]]
    assert type(model.config).from_dict(about["model"]) == model.config
    draw = torch.Generator().manual_seed(1)
    for batch in (1, 3):
        state, fed = model.init_state(batch, max_len=max_len), zero(about, batch)
        for _ in range(STEPS):
            x = torch.randint(V, (batch,), generator=draw)
            if model.inputs is not None:
                x = torch.randn(batch, model.inputs, generator=draw)
            with torch.no_grad():
                want, state = model.step(x, state)
            found, *after = session.run(None, {about["input"]: x.numpy(), **fed})
            fed = dict(zip(fed, after, strict=True))
            np.testing.assert_allclose(found, want.numpy(), rtol=1e-4, atol=1e-5)


def test_a_hybrid_of_scans_and_windows(tmp_path):
    window = AttentionConfig(heads=2, window=5)
    parts = {"M": (MambaConfig(d_state=4),), "N": (Mamba2Config(d_state=4, d_head=4), MLP), "W": (window,)}
    model = drawn(LanguageModel(config("MNWG", **parts, G=(GatedDeltaNetConfig(heads=2, d_key=3),))))
    df.export_onnx(model, tmp_path / "a" / "model.onnx")
    agrees(model, tmp_path / "a" / "model.onnx")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model.onnx"]
    written = (tmp_path / "a" / "model.onnx").read_bytes()
    assert str(Path(df.__file__).parent).encode() not in written and b".py" not in written


def test_rwkv7_whose_layers_read_the_first_value(tmp_path):
    channel = SublayerConfig(RWKVChannelConfig(d_hidden=9, receptance=False, previous=True), norm="layer")
    parts = {
        "F": (SublayerConfig(RWKV7Config(**RANKS), norm="layer"), channel),
        "R": (SublayerConfig(RWKV7Config(**RANKS, value_rank=2), norm="layer"), channel),
    }
    given = ModelConfig(V, D, parts, "FR", embed_norm="layer", norm="layer", tie_embeddings=False)
    model = drawn(LanguageModel(given))
    export_onnx(model, tmp_path / "a.onnx")
    agrees(model, tmp_path / "a.onnx")


def test_complex_states_are_pairs_and_a_regressor_reads_features(tmp_path):
    parts = {"S": (S4DConfig(d_state=4),), "L": (LRUConfig(d_state=3),), "4": (S4Config(d_state=4),)}
    model = drawn(SequenceRegressor(config("SL4", 0, **parts), 2, inputs=3))
    export_onnx(model, tmp_path / "a.onnx")
    agrees(model, tmp_path / "a.onnx")
    state = {m["input"]: m for m in opened(tmp_path / "a.onnx")[1]["state"]}
    assert state["state.blocks.0.0"] == {
        "input": "state.blocks.0.0",
        "output": "next.blocks.0.0",
        "shape": ["batch", D, 2, 2],
        "dtype": "float32",
        "complex": True,
        "start": 0.0,
    }
    assert state["state.pooled"]["dtype"] == "float64" and state["state.seen"]["dtype"] == "int64"


def test_a_growing_cache_has_the_room_that_it_is_given(tmp_path):
    """And a state that does not start at zero says with what: RWKV-4's average of nothing."""
    model = drawn(LanguageModel(config("AR", A=(AttentionConfig(heads=2),), R=(RWKV4Config(),))))
    with pytest.raises(ArgumentError, match=r"0\.0\.k, 0\.0\.v grow with the context, and max_len is 0\n.*--max-len"):
        export_onnx(model, tmp_path / "a.onnx")
    export_onnx(model, tmp_path / "a.onnx", max_len=STEPS)
    agrees(model, tmp_path / "a.onnx", max_len=STEPS)
    session, about = opened(tmp_path / "a.onnx")
    assert any("-inf" in str(m["start"]) for m in about["state"])
    fed = zero(about, 1)
    for t in range(STEPS + 1):
        found, *after = session.run(None, {"tokens": np.array([1]), **fed})
        fed = dict(zip(fed, after, strict=True))
        assert np.isnan(found).any() == (t == STEPS)


def test_starts_are_numbers_words_or_rows():
    assert [_number(value) for value in (0, 0.5, float("inf"), -float("inf"))] == [0, 0.5, "inf", "-inf"]
    assert onnx_file._start(torch.full((2, 3), -torch.inf)) == "-inf"
    assert onnx_file._start(torch.tensor([[0.0, -torch.inf]] * 2)) == [0.0, "-inf"]
    assert onnx_file._start(torch.zeros(2, 0)) == 0
    np.testing.assert_array_equal(np.full((1, 2), [0.0, "-inf"], "float32"), [[0, -np.inf]])


def test_what_has_no_form_is_named_with_its_layer(tmp_path):
    model = LanguageModel(config("E", E=(MoEConfig(experts=2, top_k=1, d_hidden=4),)))
    with pytest.raises(DualformError, match=r"aten\.sort\.stable of layers/moe has no form in ONNX\n.*torch\.export"):
        export_onnx(model, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir()) and model.training
    assert _place(None, "aten.sort.stable") == ""


def test_what_cannot_be_traced_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *args, strict, **options: 1 / 0)
    with pytest.raises(DualformError, match=r"the step cannot be traced: division by zero\n.*torch\.export"):
        export_onnx(LanguageModel(config("F", F=(MLP,))), tmp_path / "b.onnx")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: LanguageModel(config("F", F=(MLP,))).double(), r"weights are torch\.float64 on cpu, expected float32"),
        (lambda: LanguageModel(config("F", F=(MLP,))).bfloat16(), r"torch\.bfloat16 on cpu.*\n.*--dtype float32"),
        (lambda: LanguageModel(config("F", F=(MLP,))).to("meta"), r"torch\.float32 on meta"),
        (lambda: MLP.build(4), r"model is MLP, expected a model of this library"),
        (
            lambda: SequenceRegressor(config("B", 0, B=(BidirectionalConfig(MambaConfig()),)), 1, inputs=2),
            "a bidirectional model has no state",
        ),
    ],
)
def test_other_models_are_refused(tmp_path, made, said):
    with pytest.raises(ArgumentError, match=said):
        export_onnx(made(), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_library_that_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_file, "_NEEDED", ("onnx", "nowhere_to_be_found"))
    with pytest.raises(DualformError, match=r"needs nowhere_to_be_found\n.*pip install 'dualform\[onnx\]'"):
        export_onnx(LanguageModel(config("F", F=(MLP,))), tmp_path / "a.onnx")


def test_the_command_writes_a_file_that_replaces_none(dualform, tmp_path, monkeypatch):
    """Large weights lie beside it; a file stands whole in its place, or not at all."""
    torch.manual_seed(0)
    drawn(LanguageModel(config("L", 256, L=(LSTMConfig(hidden=3),)))).bfloat16().save(tmp_path / "model")
    monkeypatch.setattr(onnx_file, "_LARGE", 1000)
    code, out, err = dualform("convert", tmp_path / "model", tmp_path / "a.onnx", "--to", "onnx")
    assert (code, err) == (0, "") and "in the layout of onnx" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data", "model"]
    agrees(df.load(tmp_path / "model", dtype="float32"), tmp_path / "a.onnx")
    code, _, err = dualform("convert", tmp_path / "model", tmp_path / "a.onnx", "--to", "onnx")
    assert code == 2 and "is there already" in err
    with pytest.raises(CheckpointError, match="cannot save"):
        export_onnx(df.load(tmp_path / "model", dtype="float32"), tmp_path / "a.onnx" / "b.onnx")
    LanguageModel(config("A", 256, A=(AttentionConfig(heads=2),))).save(tmp_path / "attention")
    code, _, err = dualform("convert", tmp_path / "attention", tmp_path / "b.onnx", "--to", "onnx")
    assert (
        code == 2 and re.search(r"0\.0\.k, 0\.0\.v grow with the context", err) and not (tmp_path / "b.onnx").exists()
    )


def test_running_a_file_needs_neither_torch_nor_dualform():
    code = "import sys, onnxruntime; print('torch' in sys.modules)"
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=paths).stdout == "False\n"
