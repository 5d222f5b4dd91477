"""``dualform doctor``: what is installed, what was found, and what every op would run on."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

EPILOG = """[bold]Examples[/bold]
  dualform doctor                                paste it into a bug report
  DUALFORM_BACKEND=torch dualform check mamba2   force a backend once"""

_PACKAGES = ("torch", "triton", "numpy", "accelerate", "safetensors", "tokenizers", "huggingface_hub")


def doctor() -> None:
    """Show versions, devices, and which backend every op would use, with the reason where one cannot."""
    from rich.console import Console

    console = Console()
    console.print(_versions())
    console.print(_devices())
    console.print(_backends())


def _versions() -> "Table":
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from dualform import __version__
    from dualform.compat import status

    table = _table("Versions", "package", "version")
    table.add_row("dualform", __version__)
    table.add_row("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    for package in _PACKAGES:
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "[dim]not installed[/dim]")
    for imitated in status():
        if imitated.active:
            text = f"{imitated.version}, by dualform.compat in this process"
        elif imitated.real:
            text = f"{imitated.version}; dualform.compat is not active"
        else:
            text = "[dim]not installed; dualform.compat is not active: python -m dualform.compat script.py[/dim]"
        table.add_row(imitated.distribution, text)
    return table


def _devices() -> "Table":
    import torch

    table = _table("Devices", "device", "what")
    omp = os.environ.get("OMP_NUM_THREADS")
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    table.add_row("cpu", threads + (f" (OMP_NUM_THREADS={omp})" if omp else "") + f", {_memory()}")
    for kind in _accelerators():
        module = getattr(torch, kind)
        for i in range(module.device_count()):
            table.add_row(f"{kind}:{i}", _accelerator(module, i))
    return table


def _accelerator(module: object, i: int) -> str:
    try:
        properties = module.get_device_properties(i)  # pyright: ignore[reportAttributeAccessIssue]
    except AttributeError:
        return "available"
    architecture = getattr(properties, "gcnArchName", "")  # AMD
    if not architecture and hasattr(properties, "major"):
        architecture = f"sm_{properties.major}{properties.minor}"
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return ", ".join(filter(None, (properties.name, memory, architecture)))


def _accelerators() -> list[str]:
    """Device types beyond the CPU that torch can use here."""
    import torch

    found = {
        "cuda": torch.cuda.is_available(),
        "xpu": torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    return [kind for kind, available in found.items() if available]


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError, OSError):
        return "memory unknown"


def _backends() -> "Table":
    import dualform.ops  # noqa: F401  (registers the ops)
    from dualform.ops.op import OPS

    forced = os.environ.get("DUALFORM_BACKEND", "")
    title = f"Ops (forced to {forced!r} by DUALFORM_BACKEND)" if forced else "Ops"
    table = _table(title, "op", "device", "runs on", "other backends")
    for name, op in sorted(OPS.items()):
        for device in ["cpu", *_accelerators()]:
            chosen, others = "", []
            for backend in op.backends:
                if not backend.runs_on(device):
                    why = f"runs on {', '.join(backend.devices)}"
                elif forced and backend.name != forced:
                    why = "another is forced"
                else:
                    why = backend.missing()
                if not why and not chosen:
                    chosen = backend.name
                else:
                    others.append(f"{backend.name}: {why or f'after {chosen}, where that refuses a shape'}")
            if forced == "reference":
                chosen = "reference"
            table.add_row(name, device, chosen or "[red]none[/red]", "\n".join(others) or "[dim]none[/dim]")
    return table


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    return table
