"""Compiles the kernels that wrappers launch, for processors that need not be here."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "NVIDIA Hopper": GPUTarget("cuda", 90, 32),
    "AMD MI300": GPUTarget("hip", "gfx942", 64),
}


class _Elsewhere:
    """A driver of a processor for which Triton compiles but which it never asks to run anything."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # kernels are kept by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiled(target: GPUTarget) -> Iterator[list[tuple[str, Any]]]:
    """Every launch inside the block, on tensors of any device, only compiles: names and Triton's compiled kernels."""
    kernels, run = [], JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    driver.set_active(_Elsewhere(target))
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run
        if torch.cuda.is_available():
            driver.reset_active()


def resources(kernel: Any) -> dict[str, int]:
    """Registers of a thread, and what of them was spilled: bytes of memory (NVIDIA) or registers (AMD)."""
    if "amdgcn" in kernel.asm:
        found = {k: re.search(rf"\.{k}:\s+(\d+)", kernel.asm["amdgcn"]) for k in ("vgpr_count", "vgpr_spill_count")}
    else:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(kernel.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            done = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
        found = {k: re.search(rf"{k}:(\d+)", done.stdout) for k in ("REG", "STACK")}
    registers, spilled = (int(m[1]) for m in found.values() if m)
    return {"registers": registers, "spilled": spilled}
