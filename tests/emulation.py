"""CUDA kernels on the CPU: launches go to an emulator of threads; results are compared with a definition."""

import ctypes
import hashlib
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dualform.ops.cuda import compiler

HOPPER = compiler.Limits(132, 227 * 1024)
HERE = Path(__file__).parent
SOURCES = Path(compiler.__file__).parent
HARNESS = """
#include "{emulator}"
#include "{source}"
template <class P>
void run(void (*kernel)(P), unsigned grid, unsigned threads, const void* p) {{
  emulator::launch(grid, threads, [&] {{ kernel(*static_cast<const std::remove_const_t<P>*>(p)); }});
}}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulated(monkeypatch, folder):
    """Launches run on the CPU, one thread after another, with shared memory full of NaN."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")

    def launch(file, kernel, defines, grid, threads, shared, fields):
        text = HARNESS.format(emulator=HERE / "cuda_emulator.h", source=SOURCES / file)
        text += (
            f'extern "C" void go(unsigned grid, unsigned threads, const void* p) {{ run({kernel}, grid, threads, p); }}'
        )
        flags = [f"-D{name}={compiler._macro(value)}" for name, value in defines.items()]
        name = hashlib.sha256(repr((text, flags)).encode()).hexdigest()[:16]
        library = folder / f"{name}.so"
        if not library.exists():
            (folder / f"{name}.cpp").write_text(text)
            flags += ["-std=c++20", "-O0", "-w", "-shared", "-fPIC", f"-I{SOURCES}"]
            subprocess.run(["g++", *flags, str(folder / f"{name}.cpp"), "-o", str(library)], check=True)
        assert shared <= 227 * 1024
        ctypes.CDLL(str(library)).go(grid, threads, struct.pack(f"{len(fields)}q", *fields))

    monkeypatch.setattr(compiler, "launch", launch)
    monkeypatch.setattr(compiler, "limits", lambda: HOPPER)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def differentiable(x):
    return isinstance(x, Tensor) and x.is_floating_point()


def double(x):
    return x.double() if differentiable(x) else x


def leaf(x, dtype=torch.float64):
    """A differentiable tensor again, for the definition to differentiate."""
    return x.to(dtype).detach().requires_grad_() if differentiable(x) else x


def close(got, want, tolerance):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape, i
        error = float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)) if b.numel() else 0.0
        assert error <= tolerance, f"result {i}: {error:.3g}"
