"""The gated delta rule on a GPU, beside flash-linear-attention's where that is installed: bfloat16, heads of 128 x 128.

    python benchmarks/gated_delta_rule.py [--shape 8,4096,16] [--out results]

Medians of calls captured in CUDA graphs, the cache flushed before each. Errors are those of the outputs and of the
gradient of k against the float64 reference, relative, root mean square; rounding the outputs to bfloat16 is 1.7e-3.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from scans import Scan
from torch import Tensor

from dualform.ops import gated_delta_rule

KEYS = 128
SCALE = KEYS**-0.5


def inputs(batch: int, length: int, heads: int) -> list[Tensor]:
    """q, k, v, beta and logarithms of decays, as Gated DeltaNet has them."""
    q, k, v = (torch.randn(batch, length, heads, KEYS, device="cuda") for _ in range(3))
    beta = torch.rand(batch, length, heads, device="cuda")
    rates, step = torch.empty(heads, device="cuda").uniform_(1, 16), 0.1 * torch.rand_like(beta)
    given = [F.normalize(q, dim=-1).bfloat16(), F.normalize(k, dim=-1).bfloat16(), v.bfloat16(), beta, -rates * step]
    return [m.requires_grad_() for m in given]


def peers() -> dict[str, tuple[Callable[..., Tensor], bool]]:
    """flash-linear-attention's, where it is installed."""
    try:
        name = f"fla {version('flash-linear-attention')}"
    except PackageNotFoundError:
        return {}
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return {name: (lambda q, k, v, beta, g: chunk_gated_delta_rule(q, k, v, g, beta.to(q.dtype), SCALE)[0], True)}


SCAN = Scan(
    "gated delta rule",
    f"x {KEYS}",
    inputs,
    lambda *given: gated_delta_rule(*given, scale=SCALE)[0],
    like=2,
    errors={"dk": 1},
)

if __name__ == "__main__":
    SCAN.main(__doc__, peers(), ("8,4096,16", "1,32768,16"))
