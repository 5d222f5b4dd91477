"""The operators as code for mamba-ssm calls them, on a GPU: its own, ours by its names, and ours by our own.

    python benchmarks/compat.py [--only scan] [--out results]

bfloat16, tensors contiguous in the layout that mamba-ssm asks for: time last for its scan and its convolution. "By our
own" is the same call on tensors in our layout, so the difference to "by its names" is what the names cost. Medians of
calls captured in CUDA graphs, the cache flushed before each; mamba-ssm's where it is installed.
"""

import argparse
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import on_gpu, report
from torch import Tensor

from dualform import ops


class Case(NamedTuple):
    """One operator: its inputs by mamba-ssm's names, the same in our layout, and how each is called."""

    given: dict[str, Any]
    ours: Callable[..., Any]  # given in our layout
    turned: Callable[[dict[str, Any]], dict[str, Any]]
    home: str  # the module of mamba-ssm, and the function
    name: str
    compat: str  # the file of dualform.compat
    gradients: bool = True


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A random leaf."""
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


def time_second(given: dict[str, Any]) -> dict[str, Any]:
    """``(B, D, T)`` and ``(B, N, T)`` laid out anew as ``(B, T, D)`` and ``(B, T, 1, N)``."""
    found = dict(given)
    for name in ("u", "delta", "z", "x"):
        if name in found:
            found[name] = found[name].detach().transpose(1, 2).contiguous().requires_grad_()
    for name in ("B", "C"):
        if name in found:
            found[name] = found[name].detach().transpose(1, 2).contiguous()[:, :, None].requires_grad_()
    return found


def scan() -> Case:
    """The selective scan of a Mamba layer, (8, 2048, 2048), 16 states."""
    batch, width, length, states = 8, 2048, 2048, 16
    given = {
        "u": normal(batch, width, length),
        "delta": normal(batch, width, length),
        "A": (-torch.rand(width, states, device="cuda") - 0.1).requires_grad_(),
        "B": normal(batch, states, length),
        "C": normal(batch, states, length),
        "D": normal(width, dtype=torch.float32),
        "z": normal(batch, width, length),
        "delta_bias": normal(width, dtype=torch.float32),
        "delta_softplus": True,
    }
    home = "mamba_ssm.ops.selective_scan_interface"
    return Case(given, ops.selective_scan, time_second, home, "selective_scan_fn", "scan")


def convolution() -> Case:
    """The convolution of a Mamba layer, (8, 2048, 2048), 4 taps, with SiLU."""
    given = {"x": normal(8, 2048, 2048), "weight": normal(2048, 4), "bias": normal(2048), "activation": "silu"}
    home = "causal_conv1d.causal_conv1d_interface"
    return Case(given, ops.causal_conv1d, time_second, home, "causal_conv1d_fn", "conv")


def dual() -> Case:
    """The scan of a Mamba-2 layer, (8, 4096, 32 heads of 64), 128 states, one group."""
    batch, length, heads = 8, 4096, 32
    given = {
        "x": normal(batch, length, heads, 64),
        "dt": normal(batch, length, heads),
        "A": (-torch.empty(heads, device="cuda").uniform_(1, 16)).requires_grad_(),
        "B": normal(batch, length, 1, 128),
        "C": normal(batch, length, 1, 128),
        "chunk_size": 256,
        "D": normal(heads, dtype=torch.float32),
        "dt_bias": normal(heads, dtype=torch.float32),
        "dt_softplus": True,
    }

    def ours(chunk_size: int, **rest: Any) -> Any:
        return ops.ssd(**rest)

    return Case(given, ours, dict, "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", "ssd")


def step() -> Case:
    """One step of Mamba's scan that writes its state in place, 64 rows of width 4096, 16 states."""
    rows, width, states = 64, 4096, 16
    with torch.no_grad():
        given = {
            "state": normal(rows, width, states, dtype=torch.float32).detach(),
            "x": normal(rows, width).detach(),
            "dt": normal(rows, width).detach(),
            "A": -torch.rand(width, states, device="cuda"),
            "B": normal(rows, states).detach(),
            "C": normal(rows, states).detach(),
            "D": normal(width, dtype=torch.float32).detach(),
            "z": normal(rows, width).detach(),
            "dt_bias": normal(width, dtype=torch.float32).detach(),
            "dt_softplus": True,
        }

    def ours(B: Tensor, C: Tensor, **rest: Any) -> Any:
        return ops.selective_state_update(B=B[:, None], C=C[:, None], out_state=rest["state"], **rest)

    home = "mamba_ssm.ops.triton.selective_state_update"
    return Case(given, ours, dict, home, "selective_state_update", "step", gradients=False)


def norm() -> Case:
    """The norm before a block with the sum of the residual stream, 16384 rows of 2048, the residual in float32."""
    given = {
        "x": normal(16384, 2048),
        "weight": normal(2048, dtype=torch.float32),
        "bias": None,
        "residual": normal(16384, 2048, dtype=torch.float32),
        "prenorm": True,
    }

    def ours(prenorm: bool, **rest: Any) -> Any:
        return ops.add_norm(**rest)

    return Case(given, ours, dict, "mamba_ssm.ops.triton.layer_norm", "rms_norm_fn", "norms")


def gated() -> Case:
    """The gated norm of a Mamba-2 layer, 16384 rows of 4096."""
    given = {
        "x": normal(16384, 4096),
        "weight": normal(4096, dtype=torch.float32),
        "bias": None,
        "z": normal(16384, 4096),
        "norm_before_gate": False,
    }
    home = "mamba_ssm.ops.triton.layernorm_gated"
    return Case(given, ops.gated_norm, dict, home, "rmsnorm_fn", "gated_norms")


CASES = {"scan": scan, "conv": convolution, "ssd": dual, "step": step, "norm": norm, "gated norm": gated}


def outputs(found: Any) -> list[Tensor]:
    """What has a gradient, or all of it where nothing has."""
    found = [found] if isinstance(found, Tensor) else list(found)
    return [y for y in found if y.requires_grad] or found


def measure(name: str, run: Callable[..., Any], given: dict[str, Any], gradients: bool) -> dict[str, Any]:
    """One row."""
    leaves = [m for m in given.values() if isinstance(m, Tensor) and m.requires_grad]

    def forward() -> Any:
        with torch.no_grad():
            return run(**given)

    row: dict[str, Any] = {"case": name, "forward ms": on_gpu(forward)}
    if gradients:
        weights = [torch.randn_like(y) for y in outputs(run(**given))[:1]]  # no graph of this stream may stay
        row["forward + backward ms"] = on_gpu(
            lambda: torch.autograd.grad(outputs(run(**given))[:1], leaves, weights, allow_unused=True)
        )
    return row


def main() -> None:
    """Print one table per operator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CASES, help="may be given again")
    parser.add_argument("--out", type=Path, help="a JSON file per operator, in this folder")
    options = parser.parse_args()
    for name in options.only or CASES:
        torch.manual_seed(0)
        case = CASES[name]()
        rows = []
        try:
            title = f"mamba-ssm {version('mamba-ssm')}"
            rows.append(measure(title, getattr(import_module(case.home), case.name), case.given, case.gradients))
        except (ImportError, PackageNotFoundError) as error:
            print(f"{case.home} is left out: {error}")
        theirs = getattr(import_module(f"dualform.compat.{case.compat}"), case.name)
        rows.append(measure("dualform by its names", theirs, case.given, case.gradients))
        rows.append(measure("dualform by our own", case.ours, case.turned(case.given), case.gradients))
        report(
            f"{case.name}, bfloat16: {(CASES[name].__doc__ or '').strip()}",
            rows,
            options.out and options.out / f"{case.name}.json",
        )


if __name__ == "__main__":
    main()
