"""CUDA kernels on the CPU: launches go to an emulator of threads; results are compared with a definition."""

import ctypes
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dualform.core.packing import Packing
from dualform.ops.cuda import compiler
from dualform.ops.op import as_grad

HOPPER = compiler.Limits(132, 227 * 1024)
HERE = Path(__file__).parent
SOURCES = Path(compiler.__file__).parent
FLAGS = ("-std=c++20", "-O0", "-w", "-fPIC", f"-I{SOURCES}")
HARNESS = """
#include "cuda_emulator.h"
#include "{source}"
template <class P>
struct Launch {{
  static void (*kernel)(P);
  static void body(const void* p) {{ kernel(*static_cast<const P*>(p)); }}
}};
template <class P>
void (*Launch<P>::kernel)(P);
template <class P>
void run(void (*)(P), void* kernel, unsigned grid, unsigned threads, const void* p) {{
  Launch<P>::kernel = reinterpret_cast<void (*)(P)>(kernel);
  emulator::launch(grid, threads, Launch<P>::body, p);
}}
extern "C" void go(void* kernel, unsigned grid, unsigned threads, const void* p) {{
  run({kernel}, kernel, grid, threads, p);
}}
"""
KERNEL = re.compile(r"__global__[^;{]*?(\w+)\(const __grid_constant__")  # those of a file take the same structure


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where launches compile, with the emulator and its header, half of a kernel's compilation, compiled in advance."""
    folder = tmp_path_factory.mktemp("emulated")
    if shutil.which("g++"):
        subprocess.run(["g++", *FLAGS, "-c", HERE / "cuda_emulator.cpp", "-o", folder / "emulator.o"], check=True)
        header = HERE / "cuda_emulator.h", "-o", folder / "cuda_emulator.h.gch"  # g++ finds it beside what includes it
        subprocess.run(["g++", *FLAGS, "-x", "c++-header", *header], check=True)
    return folder


@pytest.fixture
def emulated(monkeypatch, folder):
    """Launches run on the CPU, one thread after another, with shared memory full of NaN."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")

    def launch(file, kernel, defines, grid, threads, shared, structure):
        found = KERNEL.search((SOURCES / file).read_text())
        assert found, f"{file} has no kernel"
        text = HARNESS.format(source=SOURCES / file, kernel=found[1])
        flags = [f"-D{name}={compiler._macro(value)}" for name, value in defines.items()]
        name = hashlib.sha256(repr((text, flags)).encode()).hexdigest()[:16]
        library = folder / f"{name}.so"
        if not library.exists():
            source = folder / f"{name}.cpp"
            source.write_text(text)
            command = ["g++", *flags, *FLAGS, f"-I{HERE}", "-shared", source, folder / "emulator.o", "-o", library]
            subprocess.run(command, check=True)
        assert shared <= 227 * 1024
        kernels = ctypes.CDLL(str(library))
        kernels.go(ctypes.cast(kernels[kernel], ctypes.c_void_p), grid, threads, structure)

    monkeypatch.setattr(compiler, "launch", launch)
    monkeypatch.setattr(compiler, "limits", lambda: HOPPER)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def packing(borders) -> Packing | None:
    """That of sequences with these cumulative lengths."""
    if borders is None:
        return None
    cu_seqlens = torch.tensor(borders)
    return Packing.of_host(cu_seqlens, cu_seqlens.device)


def gradients(op, a, found):
    """Those that a backward has found, in the order of the record and in the dtype of its tensors."""
    return [as_grad(found[name], m) for name, m in op.differentiable(a)]


def definition(op, a, weights, dtype=torch.float64):
    """Outputs and gradients of an op, for weights of its outputs, by its reference in a wide dtype."""

    def leaf(m):
        return m.detach().to(dtype.to_complex() if m.is_complex() else dtype).requires_grad_()

    leaves = {name: leaf(m) for name, m in op.differentiable(a)}
    out = op.reference(a._replace(**leaves))
    weights = [w.to(y.dtype) for w, y in zip(weights, out, strict=True)]
    grads = torch.autograd.grad(out, list(leaves.values()), weights, materialize_grads=True)
    return [*(y.detach() for y in out), *grads]


def close(got, want, tolerance):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape, i
        a, b = (torch.view_as_real(x) if x.is_complex() else x for x in (a, b))
        error = float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)) if b.numel() else 0.0
        assert error <= tolerance, f"result {i}: {error:.3g}"
