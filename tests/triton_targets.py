"""Compiles the kernels that wrappers launch, for processors that need not be here."""

import re
import subprocess
from collections import Counter
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
    """Every launch inside the block, on tensors of any device, only compiles: names and Triton's compiled kernels.

    Raises:
        AssertionError: at the end, where a kernel has one of :func:`faults`.
    """
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
    wrong = {name: found for name, kernel in kernels if (found := faults(kernel))}
    assert not wrong, wrong


def faults(kernel: Any) -> list[str]:
    """Two faults of compilers that make wrong numbers, in a kernel for NVIDIA's processors; none where it is right.

    Products that still run while copies overwrite what they read: Triton (3.6, 3.7) gives a matrix that is also read
    into registers fewer places in shared memory, and does not wait for its products. And registers that are read before
    anything is written to them, in the addresses of matrices: by NVIDIA's assembler (12.8).
    """
    if "cubin" not in kernel.asm:
        return []
    return [*overwritten(kernel.asm["ttgir"]), *read_before_written(_dump(kernel.asm["cubin"], "-sass"))]


def overwritten(program: str) -> list[str]:
    """Products that are not waited for, of matrices with fewer places than copies are made of them in a round's time.

    A loop with n places has n - 1 copies before it and one in it, which fills a place that no running product reads.
    """
    allocated = re.findall(r"(%\S+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", program)
    of = dict(re.findall(r"(%\S+) = ttg\.memdesc_(?:index|trans) (%\w+)", program))

    def memory(name: str) -> str:
        while name in of:
            name = of[name]
        return name

    copies = Counter(memory(name) for name in re.findall(r"async_copy_global_to_local \S+, (%\S+)", program))
    few = {name: int(places) for name, places in allocated if int(places) < copies[name]}
    found = []
    for names, running in re.findall(r"warp_group_dot_wait (.*?) \{pendings = (\d+)", program):
        read = {name: few[name] for name in sorted({memory(name) for name in names.split(", ")} & few.keys())}
        if int(running) and read:
            found.append(f"overwritten while {running} products run: {read}")
    return found


def read_before_written(instructions: str) -> list[str]:
    """The first uniform register that an instruction reads and none before it writes."""
    written: set[int] = set()
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?(.*?) *;", instructions, re.MULTILINE)
    assert lines, "no instructions are found: cuobjdump writes them in another way"
    for line in lines:
        name, _, rest = line.partition(" ")
        first, *others = re.split(r",\s*", rest.strip())
        target = re.fullmatch(r"UR(\d+)", first)
        pair = 2 if ".64" in name else 1
        for operand in others if target else [first, *others]:
            for matrices, number in re.findall(r"(gdesc\[)?UR(\d+)", operand):
                count = 4 if matrices else pair if name.startswith("U") else 1
                skipped = 2 if matrices and re.match(r"R\d+$", others[0]) else 0  # the left matrix is in registers
                if unknown := set(range(int(number) + skipped, int(number) + count)) - written:
                    return [f"UR{min(unknown)} is read before it is written: {line}"]
        if target:
            written |= set(range(int(target[1]), int(target[1]) + (2 if "WIDE" in name else pair)))
    return []


def resources(kernel: Any) -> dict[str, int]:
    """Registers of a thread, and what of them was spilled: bytes of memory (NVIDIA) or registers (AMD)."""
    if "amdgcn" in kernel.asm:
        found = {k: re.search(rf"\.{k}:\s+(\d+)", kernel.asm["amdgcn"]) for k in ("vgpr_count", "vgpr_spill_count")}
    else:
        used = _dump(kernel.asm["cubin"], "-res-usage")
        found = {k: re.search(rf"{k}:(\d+)", used) for k in ("REG", "STACK")}
    registers, spilled = (int(m[1]) for m in found.values() if m)
    return {"registers": registers, "spilled": spilled}


def _dump(cubin: bytes, what: str) -> str:
    """What NVIDIA's tool says of machine code."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        return subprocess.run([tool, what, file], capture_output=True, text=True, check=True).stdout
