"""RWKV-7's recurrence on a GPU, beside flash-linear-attention's where that is installed: bfloat16, heads of 64.

    python benchmarks/wkv7.py [--shape 8,4096,16] [--out results]

Medians of calls captured in CUDA graphs, the cache flushed before each; those of flash-linear-attention are launched
one by one, as its autotuning cannot be captured. Errors are those of the outputs and of the gradients of r and of the
logarithms of decays against the float64 reference, relative, root mean square; a float32 loop's, rounded to bfloat16,
is 1.7e-3.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from scans import Scan
from torch import Tensor

from dualform.ops import wkv7

WIDTH = 64


def inputs(batch: int, length: int, heads: int) -> list[Tensor]:
    """r, log_decay, k, v, a, b with decays, keys and rates as RWKV-7 has them."""
    shape = (batch, length, heads, WIDTH)
    r, k, v, key, w, rate = (torch.randn(shape, device="cuda") for _ in range(6))
    key, log_decay = F.normalize(key, dim=-1), -0.6065306597126334 * torch.sigmoid(w - 1)
    found = [r, log_decay, 0.3 * k, v, -key, key * rate.sigmoid()]
    return [m.bfloat16().requires_grad_() for m in found]


def peers() -> dict[str, tuple[Callable[..., Tensor], bool]]:
    """flash-linear-attention's, where it is installed."""
    try:
        name = f"flash-linear-attention {version('flash-linear-attention')}"
    except PackageNotFoundError:
        return {}
    from fla.ops.rwkv7 import chunk_rwkv7

    return {name: (lambda r, w, k, v, a, b: chunk_rwkv7(r, w, k, v, a, b, scale=1.0)[0], False)}


SCAN = Scan(
    "wkv7",
    f"x {WIDTH}",
    inputs,
    lambda *given: wkv7(*given)[0],
    like=3,
    errors={"dr": 0, "dg": 1},
    short=(2, 500, 2),
)

if __name__ == "__main__":
    SCAN.main(__doc__, peers(), ("8,4096,16", "1,65536,32", "8,2048,32"))
