"""The causal convolution with SiLU on a GPU, channels last: every backend, PyTorch, and causal-conv1d where installed.

    python benchmarks/conv.py [--shape 8,4096,4096] [--taps 4] [--out results.json]

Calls are captured in CUDA graphs, so that the host is not timed. A copy of the same bytes is the floor.
"""

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import on_gpu, report
from torch import Tensor

from dualform.ops import backend, causal_conv1d
from dualform.ops.causal_conv1d import causal_conv1d_op


def cases():
    """Name -> function of x (B, T, D), weight (D, W) and bias (D,)."""
    found = {}
    for each in causal_conv1d_op.backends:
        if each.runs_on("cuda") and not each.missing:

            def ours(x: Tensor, weight: Tensor, bias: Tensor, name: str = each.name) -> Tensor:
                with backend(name):
                    return causal_conv1d(x, weight, bias, activation="silu")[0]

            found[f"dualform {each.name}"] = ours

    def portable(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv1d(x.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
        return F.silu(y[..., : x.shape[1]]).mT

    found[f"torch {torch.__version__} conv1d"] = portable
    try:
        from causal_conv1d import causal_conv1d_fn

        def peer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT

        found[f"causal-conv1d {version('causal-conv1d')}"] = peer
    except (ImportError, PackageNotFoundError):
        pass
    return found


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8,4096,4096", metavar="B,T,D")
    parser.add_argument("--taps", type=int, default=4)
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    batch, length, width = (int(size) for size in options.shape.split(","))
    x, dy = torch.randn(2, batch, length, width, device="cuda", dtype=torch.bfloat16)
    weight, bias = (0.5 * torch.randn(*size, device="cuda") for size in ((width, options.taps), (width,)))
    leaves = [m.to(torch.bfloat16).requires_grad_() for m in (x, weight, bias)]
    rows = []
    for name, run in cases().items():

        def forward(run=run) -> None:
            with torch.no_grad():
                run(*leaves)

        def both(run=run) -> None:
            torch.autograd.grad(run(*leaves), leaves, dy)

        rows.append({"case": name, "forward ms": on_gpu(forward), "forward + backward ms": on_gpu(both)})
    copied = torch.empty_like(dy)
    copy = on_gpu(lambda: copied.copy_(dy))
    rows.append(
        {"case": "a copy: reads and writes once; 2.5 times", "forward ms": copy, "forward + backward ms": 2.5 * copy}
    )
    report(f"causal_conv1d ({batch}, {length}, {width}), {options.taps} taps, SiLU, bfloat16", rows, options.out)


if __name__ == "__main__":
    main()
