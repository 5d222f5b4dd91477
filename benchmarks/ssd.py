"""Mamba-2's scan on a GPU, beside mamba-ssm's where that is installed: bfloat16, heads of 64, 128 states, one group.

    python benchmarks/ssd.py [--shape 8,4096,32] [--out results]

Medians of calls captured in CUDA graphs, the cache flushed before each. Both libraries get steps, rates and maps alone:
no gate, no skip. Errors are those of the outputs and of the gradient of x against the float64 reference, relative, root
mean square; a float32 loop's, rounded to bfloat16, is 1.7e-3.
"""

import argparse
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from harness import on_gpu, report
from torch import Tensor

from dualform.ops import backend, ssd

WIDTH, STATES = 64, 128


def inputs(batch: int, length: int, heads: int) -> list[Tensor]:
    """x, dt, A, B, C with steps and rates as Mamba-2 has them."""
    x = torch.randn(batch, length, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
    dt, A = 0.1 * torch.rand(batch, length, heads, device="cuda"), -torch.empty(heads, device="cuda").uniform_(1, 16)
    maps = (torch.randn(batch, length, 1, STATES, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return [m.requires_grad_() for m in (x, dt, A, *maps)]


def cases() -> dict[str, Callable[..., Tensor]]:
    """Every implementation: x, dt, A, B, C -> y."""

    def ours(name: str) -> Callable[..., Tensor]:
        def run(*given: Tensor) -> Tensor:
            with backend(name):
                return ssd(*given)[0]

        return run

    found = {"dualform triton": ours("triton"), "dualform torch": ours("torch")}
    try:
        name = f"mamba-ssm {version('mamba-ssm')}"
    except PackageNotFoundError:
        return found
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return {**found, name: lambda x, dt, A, B, C: mamba_chunk_scan_combined(x, dt, A, B, C, 256)}


def results(run: Callable[..., Tensor], given: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The outputs, and the gradient of x."""
    leaves = [m.detach().to(dtype or m.dtype).requires_grad_() for m in given]
    y = run(*leaves)
    generator = torch.Generator("cuda").manual_seed(1)
    weights = torch.randn(y.shape, device="cuda", generator=generator).bfloat16().to(y.dtype)
    return [y.detach(), torch.autograd.grad(y, leaves[0], weights)[0]]


def measure(name: str, run: Callable[..., Tensor], given: list[Tensor]) -> dict[str, Any]:
    """One row: times, and errors on a shorter sequence."""
    dy = torch.randn_like(given[0])

    def forward() -> Tensor:
        with torch.no_grad():
            return run(*given)

    both = on_gpu(lambda: torch.autograd.grad(run(*given), given, dy), captured="torch" not in name)
    row = {"case": name, "forward ms": on_gpu(forward, captured="torch" not in name), "forward + backward ms": both}
    torch.manual_seed(0)
    short = inputs(2, 1000, 4)
    with backend("reference"):
        exact = results(lambda *m: ssd(*m)[0], short, torch.float64)
    for what, got, want in zip(("y", "dx"), results(run, short), exact, strict=True):
        row[f"error of {what}"] = f"{float((got.double() - want).norm() / want.norm()):.1e}"
    return row


def main() -> None:
    """Print one table per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="B,T,H", help="may be given again")
    parser.add_argument("--out", type=Path, help="a JSON file per shape, in this folder")
    options = parser.parse_args()
    for shape in options.shape or ("8,4096,32", "1,131072,32", "8,2048,24"):
        torch.manual_seed(0)
        given = inputs(*(int(size) for size in shape.split(",")))
        rows = [measure(name, run, given) for name, run in cases().items()]
        report(f"ssd ({shape} x {WIDTH}, N {STATES}), bfloat16", rows, options.out and options.out / f"{shape}.json")


if __name__ == "__main__":
    main()
