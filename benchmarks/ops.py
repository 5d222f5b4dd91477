"""The ops on a CPU in float32: each against its definition as a time loop, or against its matrix products alone.

Run it as ``python benchmarks/ops.py [--repeats 9] [--threads 2] [--out results.json]``.
"""

import argparse
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from harness import interleaved, report, row
from torch import Tensor

from dualform.ops import backend, causal_conv1d, fft_conv, linear_scan, selective_scan, ssd


def selective_scan_inputs(batch: int, length: int, width: int, states: int) -> tuple[Tensor, ...]:
    """u, delta, A, B, C with steps and rates as Mamba has them."""
    return (
        torch.randn(batch, length, width),
        torch.rand(batch, length, width) * 0.1,
        -torch.arange(1, states + 1.0).repeat(width, 1),
        torch.randn(batch, length, 1, states),
        torch.randn(batch, length, 1, states),
    )


def ssd_inputs(batch: int, length: int, heads: int, width: int, states: int) -> tuple[Tensor, ...]:
    """x, dt, A, B, C with steps and rates as Mamba-2 has them."""
    return (
        torch.randn(batch, length, heads, width),
        torch.rand(batch, length, heads) * 0.1,
        -torch.empty(heads).uniform_(1, 16),
        torch.randn(batch, length, 1, states),
        torch.randn(batch, length, 1, states),
    )


def matrix_products(length: int, heads: int, width: int, states: int, chunk: int) -> list[tuple[Tensor, Tensor]]:
    """The four families of products in a chunked SSD: C B^T, masked times x, the chunks' states, states to outputs."""
    n = length // chunk
    maps, square = torch.randn(n, chunk, states), torch.randn(n * heads, chunk, chunk)
    by_head, wide = torch.randn(n * heads, chunk, width), torch.randn(n, chunk, heads * width)
    return [(maps, maps.mT), (square, by_head), (maps.mT, wide), (maps, torch.randn(n, states, heads * width))]


def transformers_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> dict[str, Any]:
    """The chunked scan that transformers runs without extensions, at its layers' chunk, where it is installed."""
    try:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    except ImportError:
        return {}
    return {f"ssd, transformers {version('transformers')}": lambda: mamba2_chunk_scan(x, dt, A, B, C, 256)}


def forced(name: str, run, *args, **kwargs):
    """``run`` on one backend."""

    def call():
        with backend(name):
            return run(*args, **kwargs)

    return call


def with_gradients(run, args: tuple[Tensor, ...], **options):
    """Forward and backward through every argument."""
    leaves = [a.clone().requires_grad_() for a in args]
    named = {k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in options.items()}
    wanted = [*leaves, *(v for v in named.values() if isinstance(v, Tensor))]

    def call():
        with torch.enable_grad():
            y, *_ = run(*leaves, **named)
            return torch.autograd.grad(y, wanted, torch.ones_like(y))

    return call


@torch.no_grad()
def main() -> None:
    """Run every case in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    scan, dual = selective_scan_inputs(1, 2048, 1536, 16), ssd_inputs(1, 2048, 24, 64, 128)
    x, decay = torch.randn(1, 2048, 1536), torch.rand(1, 2048, 1536)
    around = {"D": torch.randn(1536), "z": x, "delta_bias": torch.randn(1536) - 4, "delta_softplus": True}
    taps, kernel = torch.randn(1536, 4), torch.randn(1536, 2048)
    products = matrix_products(2048, 24, 64, 128, 64)
    loop = "selective_scan (1, 2048, 1536, N 16), time loop"
    gemm = "ssd's matrix products alone, chunk 64"
    cases = {
        loop: forced("reference", selective_scan, *scan),
        "selective_scan (1, 2048, 1536, N 16)": lambda: selective_scan(*scan),
        "selective_scan forward + backward": with_gradients(selective_scan, scan),
        "selective_scan with all around it": lambda: selective_scan(*scan, **around),
        "selective_scan with all, forward + backward": with_gradients(selective_scan, scan, **around),
        gemm: lambda: [a @ b for a, b in products],
        "ssd (1, 2048, 24 x 64, N 128)": lambda: ssd(*dual),
        "ssd in PyTorch": forced("torch", ssd, *dual),
        **transformers_ssd(*dual),
        "ssd forward + backward": with_gradients(ssd, dual),
        "ssd in PyTorch, forward + backward": forced("torch", with_gradients(ssd, dual)),
        "causal_conv1d (1, 2048, 1536), width 4": lambda: causal_conv1d(x, taps, activation="silu"),
        "causal_conv1d forward + backward": with_gradients(causal_conv1d, (x, taps), activation="silu"),
        "linear_scan (1, 2048, 1536)": lambda: linear_scan(decay, x),
        "fft_conv (1, 2048, 1536)": lambda: fft_conv(x, kernel),
    }
    times = interleaved(cases, repeats=options.repeats)
    base = {name: statistics.median(times[name]) for name in (loop, gemm)}
    rows = []
    for name, found in times.items():
        against = loop if name.startswith("selective") else gemm if name.startswith("ssd") else name
        ratio = base[against] / statistics.median(found) if against in base else float("nan")
        rows.append(row(name, found, **{"times faster than the loop / products": ratio}))
    report("ops, CPU, float32", rows, options.out)


if __name__ == "__main__":
    main()
