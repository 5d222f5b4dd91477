"""Ops that a GPU's memory limits: every backend, PyTorch and peers where installed, beside a copy of the same bytes.

    python benchmarks/memory_bound.py [--op causal_conv1d --op linear_scan] [--shape 8,4096,4096] [--out folder]

Channels last, bfloat16 for the convolution (4 taps, SiLU) and float32 for the scan. Calls are captured in CUDA graphs,
so that the host is not timed.
"""

import argparse
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import on_gpu, report
from torch import Tensor

from dualform.ops import OPS, backend, causal_conv1d, linear_scan

Case = Callable[..., Tensor]


def conv_cases() -> dict[str, Case]:
    """Other implementations: name -> function of x (B, T, D), weight (D, W) and bias (D,)."""

    def portable(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv1d(x.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
        return F.silu(y[..., : x.shape[1]]).mT

    found: dict[str, Case] = {f"torch {torch.__version__} conv1d": portable}
    if find_spec("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn

        def peer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT

        found[f"causal-conv1d {version('causal-conv1d')}"] = peer
    return found


def conv_inputs(batch: int, length: int, width: int) -> list[Tensor]:
    """x, weight, bias."""
    sizes = ((batch, length, width), (width, 4), (width,))
    return [torch.randn(*size, device="cuda", dtype=torch.bfloat16) * 0.5 for size in sizes]


def scan_inputs(batch: int, length: int, width: int) -> list[Tensor]:
    """a, b."""
    return [torch.rand(batch, length, width, device="cuda"), torch.randn(batch, length, width, device="cuda")]


# Name -> our function, other cases, inputs, and how many tensors pass through memory: forward, then the backward too.
MEASURED = {
    "causal_conv1d": (lambda *args: causal_conv1d(*args, activation="silu")[0], conv_cases, conv_inputs, 2, 5),
    "linear_scan": (lambda *args: linear_scan(*args)[0], dict, scan_inputs, 3, 8),
}


def main() -> None:
    """Print one table per op."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=tuple(MEASURED))
    parser.add_argument("--shape", default="8,4096,4096", metavar="B,T,D")
    parser.add_argument("--only", action="append", help="cases whose name holds this word; may be given again")
    parser.add_argument("--out", type=Path, help="a JSON file per op, in this folder")
    options = parser.parse_args()
    for name in options.op or MEASURED:
        ours, others, inputs, through, through_both = MEASURED[name]
        given = inputs(*(int(size) for size in options.shape.split(",")))
        leaves, dy = [x.requires_grad_() for x in given], torch.randn_like(given[0])

        def forced(*args: Tensor, chosen: str, run: Case = ours) -> Tensor:
            with backend(chosen):
                return run(*args)

        cases = {
            f"dualform {each.name}": lambda *args, chosen=each.name, run=forced: run(*args, chosen=chosen)
            for each in OPS[name].backends
            if each.runs_on("cuda") and not each.missing()
        } | others()
        rows = []
        for title, run in cases.items():
            if options.only and not any(word in title for word in options.only):
                continue

            def forward(run: Case = run, leaves: list[Tensor] = leaves) -> None:
                with torch.no_grad():
                    run(*leaves)

            def both(run: Case = run, leaves: list[Tensor] = leaves, dy: Tensor = dy) -> None:
                torch.autograd.grad(run(*leaves), leaves, dy)

            rows.append({"case": title, "forward ms": on_gpu(forward), "forward + backward ms": on_gpu(both)})
        to = torch.empty_like(dy)
        copy = on_gpu(lambda dy=dy, to=to: to.copy_(dy)) / 2
        floor = {"forward ms": through * copy, "forward + backward ms": through_both * copy}
        rows.append({"case": "the same bytes, copied", **floor})
        report(
            f"{name} ({options.shape}), {given[0].dtype}", rows, options.out / f"{name}.json" if options.out else None
        )


if __name__ == "__main__":
    main()
