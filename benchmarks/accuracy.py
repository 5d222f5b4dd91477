"""Errors of the selective scan against float64, beside those of a float32 loop on the same inputs.

    python benchmarks/accuracy.py [--device cuda] [--dtype bfloat16] [--shape 2,1000,256] [--out results.json]

Errors are relative, root mean square, of outputs and of all gradients; two runs of a backend are compared bit by bit.
A ratio near one says that nothing but rounding is lost; the loop's outputs are rounded to the dtype of the inputs, too.
"""

import argparse
from pathlib import Path

import torch
from harness import report
from torch import Tensor

from dualform.ops import backend, selective_scan
from dualform.ops.selective_scan import selective_scan_op


def inputs(batch: int, length: int, width: int, states: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """As a Mamba layer has them, with a state to start from."""

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    wide = torch.float32
    return {
        **{"u": normal(batch, length, width), "delta": 0.5 * normal(batch, length, width)},
        "A": -torch.arange(1, states + 1.0, device=device).repeat(width, 1),
        **{"B": normal(batch, length, 1, states), "C": normal(batch, length, 1, states)},
        **{"D": normal(width, dtype=wide), "z": normal(batch, length, width)},
        "delta_bias": 0.5 * normal(width, dtype=wide) - 4,
        "initial_state": normal(batch, width, states, dtype=wide),
    }


def results(given: dict[str, Tensor], chosen: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients by a backend; computed in another dtype and rounded back where one is given."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    cast = {name: x if dtype is None else x.to(dtype) for name, x in leaves.items()}
    if dtype == torch.float64:
        leaves = cast = {name: x.detach().requires_grad_() for name, x in cast.items()}
    with backend(chosen):
        y, final = selective_scan(**cast, delta_softplus=True)
        if dtype == torch.float32:
            y = y.to(given["u"].dtype)
        torch.manual_seed(1)
        weights = [torch.randn(x.shape, device=x.device).to(given["u"].dtype).to(x.dtype) for x in (y, final)]
        found = torch.autograd.grad([y, final], list(leaves.values()), weights)
    return {"y": y.detach(), "final": final.detach()} | {f"d{name}": x for name, x in zip(leaves, found, strict=True)}


def main() -> None:
    """Print one table per backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--shape", default="2,1000,256", metavar="B,T,D")
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--out", type=Path, help="a JSON file per backend, in this folder")
    options = parser.parse_args()
    torch.manual_seed(0)
    batch, length, width = (int(size) for size in options.shape.split(","))
    given = inputs(batch, length, width, options.states, options.device, getattr(torch, options.dtype))
    exact, loop = results(given, "reference", torch.float64), results(given, "reference", torch.float32)
    for each in selective_scan_op.backends:
        if not each.runs_on(torch.device(options.device).type) or each.missing():
            continue
        found, again = results(given, each.name), results(given, each.name)
        same = all(torch.equal(found[name], again[name]) for name in found)
        rows = []
        for name, want in exact.items():
            far, of_loop = (float((x[name].double() - want).norm() / want.norm()) for x in (found, loop))
            row = {"result": name, "dtype": str(found[name].dtype)[6:], "error": f"{far:.2e}", "loop": f"{of_loop:.2e}"}
            rows.append(row | {"ratio": far / of_loop})
        title = f"{each.name} ({options.shape}, N {options.states}), {options.dtype}; bits "
        title += "repeat" if same else "differ between two runs"
        report(title, rows, options.out / f"{each.name}.json" if options.out else None)


if __name__ == "__main__":
    main()
