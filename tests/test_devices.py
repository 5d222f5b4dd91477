"""A device that is not there is told in a sentence, with the remedy, by all that takes one; and names of dtypes."""

import pytest
import torch
from torch import nn

import dualform as df
from dualform.compat.gated_norms import LayerNorm
from dualform.compat.gated_norms import RMSNorm as GatedRMSNorm
from dualform.compat.mamba import Mamba
from dualform.compat.mamba2 import Mamba2
from dualform.compat.mamba2_simple import Mamba2Simple
from dualform.compat.mha import MHA
from dualform.compat.mixer_seq import MambaLMHeadModel, MixerModel, create_block
from dualform.compat.mlp import GatedMLP
from dualform.compat.model_config import MambaConfig
from dualform.compat.norms import RMSNorm
from dualform.core.errors import ArgumentError
from dualform.layers import LSTM, LSTMConfig
from dualform.ops.device import explains_device, usable_device

ABSENT = "cuda:99"  # no machine has it


@pytest.fixture
def folder(tmp_path):
    df.save(df.LanguageModel(df.ModelConfig(16, 4, {"L": (LSTMConfig(),)}, "L")), tmp_path)
    return tmp_path


TAKES = {
    "load": lambda folder: df.load(folder, device=ABSENT),
    "Session.to": lambda folder: df.Session.start(df.load(folder)).to(ABSENT),
    "LinearGaussian.to": lambda folder: df.LinearGaussian(*[[[1.0]]] * 4, [0.0], [[1.0]]).to(ABSENT),
    "Mamba": lambda folder: Mamba(8, device=ABSENT),
    "Mamba2": lambda folder: Mamba2(8, headdim=4, device=ABSENT),
    "Mamba2Simple": lambda folder: Mamba2Simple(8, headdim=4, device=ABSENT),
    "MHA": lambda folder: MHA(8, 2, device=ABSENT),
    "GatedMLP": lambda folder: GatedMLP(8, device=ABSENT),
    "RMSNorm": lambda folder: RMSNorm(8, device=ABSENT),
    "gated RMSNorm": lambda folder: GatedRMSNorm(8, device=ABSENT),
    "gated LayerNorm": lambda folder: LayerNorm(8, device=ABSENT),
    "create_block": lambda folder: create_block(8, device=ABSENT),
    "MixerModel": lambda folder: MixerModel(8, 1, 0, 16, device=ABSENT),
    "MambaLMHeadModel": lambda folder: MambaLMHeadModel(MambaConfig(8, 0, 1, 16), device=ABSENT),
}


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
def test_a_device_that_is_not_there_is_told(take, folder):
    with pytest.raises(ArgumentError, match=r"device 'cuda:99' cannot be used: .*\n  hint: .*cpu is always there"):
        take(folder)


@pytest.mark.parametrize(
    ("built", "count", "said"),
    [
        (False, 0, r"this PyTorch, .*, is built without CUDA\n  hint: install a PyTorch with CUDA"),
        (True, 0, r"no GPU is visible to PyTorch\n.*nvidia-smi.*CUDA_VISIBLE_DEVICES"),
        (True, 2, "PyTorch sees 2 of them, from cuda:0 to cuda:1"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, built, count, said):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ArgumentError, match=said):
        usable_device(ABSENT, f"device {ABSENT}")


def test_meta_is_a_device_where_no_numbers_are_asked_for(folder):
    assert next(df.load(folder, device="meta").parameters()).is_meta
    assert next(Mamba2(8, headdim=4, device="meta").parameters()).is_meta
    with pytest.raises(ArgumentError, match="device meta cannot be used"):
        usable_device("meta", "device meta")


def test_a_failure_for_another_reason_stays_what_it_is():
    @explains_device
    class Broken(nn.Module):
        def __init__(self, device: str | None = None):
            raise RuntimeError("for another reason")

    for device in (None, "cpu"):
        with pytest.raises(RuntimeError, match="for another reason"):
            Broken(device)


@pytest.mark.parametrize("dtype", ["float16", "torch.bfloat16", torch.float64])
def test_a_dtype_may_be_a_name(folder, dtype):
    found = next(df.load(folder, dtype=dtype).parameters()).dtype
    assert str(found).removeprefix("torch.") == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", ["float17", "int8", torch.int8, "Tensor"])
def test_a_dtype_that_is_not_floating_is_refused(folder, dtype):
    with pytest.raises(ArgumentError, match=r"load: dtype is .*, expected one of float64, float32, bfloat16, float16"):
        df.load(folder, dtype=dtype)


def test_saving_a_layer_says_how(tmp_path):
    with pytest.raises(
        ArgumentError, match=r"save: model is LSTM, expected one of LanguageModel.*\n.*load_model\(layer"
    ):
        df.save(LSTM(4), tmp_path / "layer")
    assert not (tmp_path / "layer").exists()
