"""The CUDA sources in the hands of NVIDIA's own compiler, which needs no GPU."""

import pytest
import torch

import test_cuda
import test_cuda_conv
import test_cuda_diagonal
from dualform.ops.cuda import causal_conv1d, compiler, diagonal_ssm, selective_scan
from emulation import HOPPER

TARGETS = [("sm_80", torch.float16), ("sm_90", torch.bfloat16)]
EVERY_LAYOUT = torch.bfloat16  # the dtype, and so the target, that sources are compiled with for every layout


def scan(dtype):
    for last in [(), test_cuda.EACH][: 1 + (dtype == EVERY_LAYOUT)]:
        a = test_cuda.arguments(1, 132, 32, 16, dtype=dtype, last=last)
        y, final, *saved = selective_scan._forward(a)
        selective_scan._backward([y, final], saved, a)


def convolution(dtype):
    variants = [{}, {"last": True, "ids": 9}, {"last": True}, {"ids": 9}]
    for more in variants[: 4 if dtype == EVERY_LAYOUT else 2]:
        a = test_cuda_conv.arguments(1, 130, 64, 4, dtype=dtype, like=dtype, **more)
        y, final = causal_conv1d._forward(a)
        causal_conv1d._backward([y, final], [], a)


def diagonal(dtype):
    a = test_cuda_diagonal.arguments(1, 130, 32, 32, dtype=dtype)
    y, final = diagonal_ssm._forward(a)
    diagonal_ssm._backward([y, final], [], a)


USERS = {
    "causal_conv1d_backward.cu": convolution,
    "causal_conv1d_forward.cu": convolution,
    "causal_conv1d_time_last.cu": convolution,
    "diagonal_ssm_backward.cu": diagonal,
    "diagonal_ssm_forward.cu": diagonal,
    "selective_scan_backward.cu": scan,
    "selective_scan_forward.cu": scan,
}


def test_every_source_is_compiled():
    assert {path.name for path in compiler._FOLDER.glob("*.cu")} == set(USERS)


@pytest.mark.parametrize("arch, dtype", TARGETS, ids=str)
@pytest.mark.parametrize("file", USERS)
def test_a_source_compiles(file, arch, dtype, monkeypatch):
    pytest.importorskip("cuda.bindings.nvrtc")
    launched = []
    monkeypatch.setattr(compiler, "launch", lambda *call: launched.append(call[:3]))
    monkeypatch.setattr(compiler, "limits", lambda: HOPPER)
    USERS[file](dtype)
    macros = {tuple(defines.items()) for name, _, defines in launched if name == file}
    code = b"".join(compiler.compile_source(file, dict(defines), arch) for defines in macros)
    assert all(kernel.encode() in code for name, kernel, _ in launched if name == file)


SMALL = {"A100": compiler.Limits(108, 163 * 1024), "L4": compiler.Limits(58, 99 * 1024)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gpu", SMALL)
def test_blocks_fit_on_smaller_gpus(gpu, dtype, monkeypatch):
    shared = []
    monkeypatch.setattr(compiler, "launch", lambda *call: shared.append(call[5]))
    monkeypatch.setattr(compiler, "limits", lambda: SMALL[gpu])
    for run in {*USERS.values()}:
        run(dtype)
    for batch, length, width, states in [(1, 500, 256, 16), (4, 500, 1024, 16), (8, 100, 1024, 16), (1, 100, 2048, 32)]:
        a = test_cuda.arguments(batch, length, width, states, dtype=dtype)
        y, final, *saved = selective_scan._forward(a)
        selective_scan._backward([y, final], saved, a)
    assert max(shared) <= SMALL[gpu].shared


def test_what_does_not_compile_says_why():
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(RuntimeError, match=r"does not compile for sm_90 with \{\}:\n.*error: identifier"):
        compiler.compile_source("causal_conv1d_forward.cu", {}, "sm_90")
