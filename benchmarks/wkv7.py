"""RWKV-7's recurrence on a GPU, beside flash-linear-attention's where that is installed: bfloat16, heads of 64.

    python benchmarks/wkv7.py [--shape 8,4096,16] [--out results]

Medians of calls captured in CUDA graphs, the cache flushed before each; those of flash-linear-attention are launched
one by one, as its autotuning cannot be captured. Errors are those of the outputs and of the gradients of r and of the
logarithms of decays against the float64 reference, relative, root mean square; a float32 loop's, rounded to bfloat16,
is 1.7e-3.
"""

import argparse
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import on_gpu, report
from torch import Tensor

from dualform.ops import backend, wkv7

WIDTH = 64


def inputs(batch: int, length: int, heads: int) -> list[Tensor]:
    """r, log_decay, k, v, a, b with decays, keys and rates as RWKV-7 has them."""
    shape = (batch, length, heads, WIDTH)
    r, k, v, key, w, rate = (torch.randn(shape, device="cuda") for _ in range(6))
    key, log_decay = F.normalize(key, dim=-1), -0.6065306597126334 * torch.sigmoid(w - 1)
    found = [r, log_decay, 0.3 * k, v, -key, key * rate.sigmoid()]
    return [m.bfloat16().requires_grad_() for m in found]


def cases() -> dict[str, tuple[Callable[..., Tensor], bool]]:
    """Every implementation, r, log_decay, k, v, a, b -> y, and whether a CUDA graph can hold it."""

    def ours(name: str) -> Callable[..., Tensor]:
        def run(*given: Tensor) -> Tensor:
            with backend(name):
                return wkv7(*given)[0]

        return run

    found = {"dualform triton": (ours("triton"), True), "dualform torch": (ours("torch"), False)}
    try:
        name = f"flash-linear-attention {version('flash-linear-attention')}"
    except PackageNotFoundError:
        return found
    from fla.ops.rwkv7 import chunk_rwkv7

    return {**found, name: (lambda r, w, k, v, a, b: chunk_rwkv7(r, w, k, v, a, b, scale=1.0)[0], False)}


def results(run: Callable[..., Tensor], given: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The outputs, and the gradients of r and log_decay."""
    leaves = [m.detach().to(dtype or m.dtype).requires_grad_() for m in given]
    y = run(*leaves)
    generator = torch.Generator("cuda").manual_seed(1)
    weights = torch.randn(y.shape, device="cuda", generator=generator).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves[:2], weights)]


def measure(name: str, run: Callable[..., Tensor], captured: bool, given: list[Tensor]) -> dict[str, Any]:
    """One row: times, and errors on a shorter sequence."""
    dy = torch.randn_like(given[3])

    def forward() -> Tensor:
        with torch.no_grad():
            return run(*given)

    both = on_gpu(lambda: torch.autograd.grad(run(*given), given, dy), captured=captured)
    row = {"case": name, "forward ms": on_gpu(forward, captured=captured), "forward + backward ms": both}
    torch.manual_seed(0)
    short = inputs(2, 500, 2)
    with backend("reference"):
        exact = results(lambda *m: wkv7(*m)[0], short, torch.float64)
    for what, got, want in zip(("y", "dr", "dg"), results(run, short), exact, strict=True):
        row[f"error of {what}"] = f"{float((got.double() - want).norm() / want.norm()):.1e}"
    return row


def main() -> None:
    """Print one table per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="B,T,H", help="may be given again")
    parser.add_argument("--out", type=Path, help="a JSON file per shape, in this folder")
    options = parser.parse_args()
    for shape in options.shape or ("8,4096,16", "1,65536,32", "8,2048,32"):
        torch.manual_seed(0)
        given = inputs(*(int(size) for size in shape.split(",")))
        rows = [measure(name, *how, given) for name, how in cases().items()]
        report(f"wkv7 ({shape} x {WIDTH}), bfloat16", rows, options.out and options.out / f"{shape}.json")


if __name__ == "__main__":
    main()
