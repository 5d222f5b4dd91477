"""What every benchmark shares: interleaved timing, the machine's name, a table and a JSON file."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def machine() -> str:
    """The processor, its cores, PyTorch and its threads: a figure means nothing without them."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    vector = torch.backends.cpu.get_cpu_capability()
    return (
        f"{name} ({vector}), {os.cpu_count()} cores{gpu}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def interleaved(cases: dict[str, Callable[[], Any]], *, repeats: int = 9) -> dict[str, list[float]]:
    """Milliseconds of every case, one of each in turn after a warm-up: slow drifts hit all alike."""
    for run in cases.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            begin = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def on_gpu(run: Callable[[], Any], *, captured: bool = True) -> float:
    """Median milliseconds of a call, caches flushed before each.

    Captured in a CUDA graph it is the GPU's time alone; else the host may be what takes long.
    """
    from triton.testing import do_bench

    if captured:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    return do_bench(run, warmup=20, rep=100, return_mode="median")


def report(title: str, rows: list[dict[str, Any]], out: Path | None) -> None:
    """Print rows as a table; write them as JSON beside the machine's name where ``out`` is given."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console = Console(width=None if Console().is_terminal else 140)
    console.print(machine())
    console.print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"title": title, "machine": machine(), "rows": rows}, indent=1) + "\n")


def row(name: str, times: list[float], **more: Any) -> dict[str, Any]:
    """One line of a table: the median, and how far the runs spread."""
    return {"case": name, "median ms": statistics.median(times), "min": min(times), "max": max(times), **more}
