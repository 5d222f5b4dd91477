"""The selective scan: every backend and every peer that is installed, side by side.

    python benchmarks/selective_scan.py                    # on a CPU: (1, 2048, 1536), float32, y = scan + D u
    python benchmarks/selective_scan.py --device cuda      # on a GPU: bfloat16 with gate, bias and softplus
    python benchmarks/selective_scan.py --shape 1,512,768  # another one

Medians, one run of each in turn; cases that need many seconds a call run once. On a GPU the calls are captured in CUDA
graphs, so that the host is not timed; "called" is forward + backward from Python as it stands. Peak memory is what a
call adds beyond its inputs, outputs and gradients included.
"""

import argparse
import gc
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import interleaved, on_gpu, report
from peers import leaves, peers
from torch import Tensor

from dualform.ops import backend, selective_scan
from dualform.ops.selective_scan import selective_scan_op

CPU_SHAPES = ["1,2048,1536"]
GPU_SHAPES = ["8,2048,2048", "1,65536,2048", "1,131072,4096", "64,1024,1536"]
SLOW = 3000.0  # milliseconds: run once


def inputs(shape: tuple[int, int, int], states: int, device: str, gated: bool) -> dict[str, Any]:
    """As a Mamba layer has them; half precision on a GPU."""
    batch, length, width = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    rates = -torch.arange(1, states + 1.0, device=device).repeat(width, 1)
    delta = 0.5 * normal(batch, length, width) if gated else 0.1 * torch.rand(batch, length, width, device=device)
    found = {
        **{"u": normal(batch, length, width), "delta": delta, "A": rates},
        **{"B": normal(batch, length, states), "C": normal(batch, length, states)},
        "D": normal(width, dtype=torch.float32),
    }
    if gated:
        found |= {"z": normal(batch, length, width), "bias": 0.5 * normal(width, dtype=torch.float32) - 4}
    return {name: x.requires_grad_() for name, x in found.items()} | {"softplus": gated}


def ours(u, delta, A, B, C, D, z=None, bias=None, softplus=False) -> Tensor:
    """The public function."""
    B, C = B.unsqueeze(2), C.unsqueeze(2)
    return selective_scan(u, delta, A, B, C, D, z, delta_bias=bias, delta_softplus=softplus)[0]


def cases(given: dict[str, Any], device: str) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Name -> (forward, forward and backward)."""
    found = {}

    def add(name: str, run: Callable[..., Tensor], kwargs: dict[str, Any], chosen: str = "") -> None:
        def forward() -> Tensor:
            with backend(chosen), torch.no_grad():
                return run(**kwargs)

        dy = torch.ones_like(given["u"]).detach()

        def both() -> tuple[Tensor, ...]:
            with backend(chosen):
                return torch.autograd.grad(run(**kwargs), leaves(kwargs), dy)

        found[name] = forward, both

    for each in selective_scan_op.backends:
        if each.runs_on(device) and not each.missing():
            add(f"dualform {each.name}", ours, given, each.name)
    for name, (prepare, run) in peers(device).items():
        add(name, run, prepare(**given))
    return found


def peak_memory(run: Callable[[], Any], device: str) -> float:
    """MiB that a call adds while it runs."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of this process starts anew
    except OSError:
        return float("nan")
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def timed(runs: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, float]:
    """Milliseconds."""
    if device == "cuda":
        return {name: on_gpu(run) for name, run in runs.items()}
    first = {name: statistics.median(interleaved({name: run}, repeats=1)[name]) for name, run in runs.items()}
    again = interleaved({name: run for name, run in runs.items() if first[name] < SLOW}, repeats=repeats)
    return {name: statistics.median(again[name]) if name in again else first[name] for name in runs}


def main() -> None:
    """Print one table per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", action="append", metavar="B,T,D")
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--gated", action=argparse.BooleanOptionalAction, help="z, bias and softplus; default on a GPU")
    parser.add_argument("--backward", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--only", action="append", help="cases whose name holds this word; may be given again")
    parser.add_argument("--out", type=Path, help="a JSON file per shape, in this folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, gated = options.device, options.device == "cuda" if options.gated is None else options.gated
    for text in options.shape or (GPU_SHAPES if device == "cuda" else CPU_SHAPES):
        torch.manual_seed(0)
        batch, length, width = (int(size) for size in text.split(","))
        given = inputs((batch, length, width), options.states, device, gated)
        runs = {
            n: r for n, r in cases(given, device).items() if not options.only or any(word in n for word in options.only)
        }
        forward = timed({name: run for name, (run, _) in runs.items()}, device, options.repeats)
        both = (
            timed({name: run for name, (_, run) in runs.items()}, device, options.repeats) if options.backward else {}
        )
        called = {n: on_gpu(run, captured=False) for n, (_, run) in runs.items()} if device == "cuda" and both else {}
        memory = {name: peak_memory(r[1] if options.backward else r[0], device) for name, r in runs.items()}
        size = given["u"].numel() * given["u"].element_size() / 2**20
        rows = [
            {
                "case": name,
                "forward ms": forward[name],
                "forward + backward ms": both.get(name, float("nan")),
                **({"called ms": called[name]} if called else {}),
                "peak MiB": memory[name],
                "peak / size of u": memory[name] / size,
            }
            for name in runs
        ]
        kind = "bfloat16, gated" if device == "cuda" else f"float32, {'gated' if gated else 'y = scan + D u'}"
        title = f"selective_scan ({batch}, {length}, {width}, N {options.states}), {kind}"
        report(title, rows, options.out / f"{text.replace(',', 'x')}.json" if options.out else None)


if __name__ == "__main__":
    main()
