"""The gated delta rule on a GPU, beside flash-linear-attention's where that is installed: bfloat16, heads of 128 x 128.

    python benchmarks/gated_delta_rule.py [--shape 8,4096,16] [--out results]

Medians of calls captured in CUDA graphs, the cache flushed before each. Errors are those of the outputs and of the
gradient of k against the float64 reference, relative, root mean square; rounding the outputs to bfloat16 is 1.7e-3.
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

from dualform.ops import backend, gated_delta_rule

KEYS, WIDTH = 128, 128
SCALE = KEYS**-0.5


def inputs(batch: int, length: int, heads: int) -> list[Tensor]:
    """q, k, v, beta and logarithms of decays, as Gated DeltaNet has them."""
    q, k, v = (torch.randn(batch, length, heads, KEYS, device="cuda") for _ in range(3))
    beta = torch.rand(batch, length, heads, device="cuda")
    rates, step = torch.empty(heads, device="cuda").uniform_(1, 16), 0.1 * torch.rand_like(beta)
    given = [F.normalize(q, dim=-1).bfloat16(), F.normalize(k, dim=-1).bfloat16(), v.bfloat16(), beta, -rates * step]
    return [m.requires_grad_() for m in given]


def cases() -> dict[str, Callable[..., Tensor]]:
    """Every implementation: q, k, v, beta, logarithms -> y."""

    def ours(name: str) -> Callable[..., Tensor]:
        def run(*given: Tensor) -> Tensor:
            with backend(name):
                return gated_delta_rule(*given, scale=SCALE)[0]

        return run

    found = {"dualform triton": ours("triton"), "dualform torch": ours("torch")}
    try:
        name = f"fla {version('flash-linear-attention')}"
    except PackageNotFoundError:
        return found
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return {**found, name: lambda q, k, v, beta, g: chunk_gated_delta_rule(q, k, v, g, beta.to(q.dtype), SCALE)[0]}


def results(run: Callable[..., Tensor], given: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The outputs, and the gradient of k."""
    leaves = [m.detach().to(dtype or m.dtype).requires_grad_() for m in given]
    y = run(*leaves)
    generator = torch.Generator("cuda").manual_seed(1)
    weights = torch.randn(y.shape, device="cuda", generator=generator).bfloat16().to(y.dtype)
    return [y.detach(), torch.autograd.grad(y, leaves[1], weights)[0]]


def measure(name: str, run: Callable[..., Tensor], given: list[Tensor]) -> dict[str, Any]:
    """One row: times, and errors on a shorter sequence."""
    dy = torch.randn_like(given[2])

    def forward() -> Tensor:
        with torch.no_grad():
            return run(*given)

    captured = "torch" not in name
    both = on_gpu(lambda: torch.autograd.grad(run(*given), given, dy), captured=captured)
    row = {"case": name, "forward ms": on_gpu(forward, captured=captured), "forward + backward ms": both}
    torch.manual_seed(0)
    short = inputs(2, 1000, 4)
    with backend("reference"):
        exact = results(lambda *m: gated_delta_rule(*m, scale=SCALE)[0], short, torch.float64)
    for what, got, want in zip(("y", "dk"), results(run, short), exact, strict=True):
        row[f"error of {what}"] = f"{float((got.double() - want).norm() / want.norm()):.1e}"
    return row


def main() -> None:
    """Print one table per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="B,T,H", help="may be given again")
    parser.add_argument("--out", type=Path, help="a JSON file per shape, in this folder")
    options = parser.parse_args()
    for shape in options.shape or ("8,4096,16", "1,32768,16"):
        torch.manual_seed(0)
        given = inputs(*(int(size) for size in shape.split(",")))
        rows = [measure(name, run, given) for name, run in cases().items()]
        report(f"gated delta rule ({shape} x {KEYS}), bfloat16", rows, options.out and options.out / f"{shape}.json")


if __name__ == "__main__":
    main()
