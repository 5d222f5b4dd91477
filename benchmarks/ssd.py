"""Mamba-2's scan on a GPU, beside mamba-ssm's where that is installed: bfloat16, heads of 64, 128 states, one group.

    python benchmarks/ssd.py [--shape 8,4096,32] [--out results]

Medians of calls captured in CUDA graphs, the cache flushed before each. Both libraries get steps, rates and maps alone:
no gate, no skip. Errors are those of the outputs and of the gradient of x against the float64 reference, relative, root
mean square; a float32 loop's, rounded to bfloat16, is 1.7e-3.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from scans import Scan
from torch import Tensor

from dualform.ops import ssd

WIDTH, STATES = 64, 128


def inputs(batch: int, length: int, heads: int) -> list[Tensor]:
    """x, dt, A, B, C with steps and rates as Mamba-2 has them."""
    x = torch.randn(batch, length, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
    dt, A = 0.1 * torch.rand(batch, length, heads, device="cuda"), -torch.empty(heads, device="cuda").uniform_(1, 16)
    maps = (torch.randn(batch, length, 1, STATES, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return [m.requires_grad_() for m in (x, dt, A, *maps)]


def peers() -> dict[str, tuple[Callable[..., Tensor], bool]]:
    """mamba-ssm's, where it is installed."""
    try:
        name = f"mamba-ssm {version('mamba-ssm')}"
    except PackageNotFoundError:
        return {}
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return {name: (lambda x, dt, A, B, C: mamba_chunk_scan_combined(x, dt, A, B, C, 256), True)}


SCAN = Scan("ssd", f"x {WIDTH}, N {STATES}", inputs, lambda *given: ssd(*given)[0], like=0, errors={"dx": 0})

if __name__ == "__main__":
    SCAN.main(__doc__, peers(), ("8,4096,32", "1,131072,32", "8,2048,24"))
