"""``dualform doctor``: what is installed, what was found, and what every op would run on."""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualform.cli.text import print_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.table import Table

EPILOG = """[bold]Examples[/bold]
  dualform doctor                                paste it into a bug report
  dualform doctor --json | jq .devices           for programs
  DUALFORM_BACKEND=torch dualform check mamba2   force a backend once"""

_PACKAGES = ("torch", "triton", "numpy", "accelerate", "safetensors", "tokenizers", "huggingface_hub")


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document: versions, imitated, devices, backend, ops.")
    ] = False,
) -> None:
    """Show versions, devices, and which backend every op would use, with the reason where one cannot."""
    from rich.console import Console

    versions, devices, ops = _versions(), _devices(), _ops()
    forced = os.environ.get("DUALFORM_BACKEND", "")
    if as_json:
        print_json(
            {"versions": versions, "imitated": _imitated(), "devices": devices, "backend": forced or None, "ops": ops}
        )
        return
    console, absent = Console(), "[dim]not installed[/dim]"
    shown = [(package, version or absent) for package, version in versions.items()]
    console.print(_table("Versions", ("package", "version"), [*shown, *_imitated().items()]))
    console.print(_table("Devices", ("device", "what"), devices.items()))
    title = f"Ops (forced to {forced!r} by DUALFORM_BACKEND)" if forced else "Ops"
    console.print(_table(title, ("op", "device", "runs on", "other backends"), map(_row, ops)))


def _versions() -> dict[str, str | None]:
    """Of this library, Python and the packages under it; None for one that is not installed."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from dualform import __version__

    python = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    found: dict[str, str | None] = {"dualform": __version__, "python": python}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _imitated() -> dict[str, str]:
    """What stands behind the packages that :mod:`dualform.compat` imitates, and how a script runs on dualform."""
    from dualform.compat import status

    found = {}
    for package in status():
        if package.active:
            found[package.distribution] = f"{package.version}, by dualform.compat in this process"
        elif package.real:
            how = "python -m dualform.compat --force script.py runs a script on dualform instead"
            found[package.distribution] = f"{package.version}, the real one; {how}"
        else:
            how = "python -m dualform.compat script.py runs a script that imports it, on dualform"
            found[package.distribution] = f"not installed; {how}"
    return found


def _devices() -> dict[str, str]:
    """What each device is, by its name."""
    import torch

    omp = os.environ.get("OMP_NUM_THREADS")
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    found = {"cpu": threads + (f" (OMP_NUM_THREADS={omp})" if omp else "") + f", {_memory()}"}
    for kind in _accelerators():
        module = getattr(torch, kind)
        found |= {f"{kind}:{i}": _accelerator(module, i) for i in range(module.device_count())}
    return found


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


def _ops() -> list[dict[str, Any]]:
    """For every op and kind of device: the backend it runs on, None where there is none, and what holds for others."""
    import dualform.ops  # noqa: F401  (registers the ops)
    from dualform.ops.op import OPS

    forced, rows = os.environ.get("DUALFORM_BACKEND", ""), []
    for name, op in sorted(OPS.items()):
        for device in ["cpu", *_accelerators()]:
            chosen, others = None, {}
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
                    others[backend.name] = why or f"after {chosen}, where that refuses a shape"
            if forced == "reference":
                chosen = "reference"
            rows.append({"op": name, "device": device, "runs_on": chosen, "others": others})
    return rows


def _row(op: "Mapping[str, Any]") -> tuple[str, ...]:
    others = "\n".join(f"{name}: {why}" for name, why in op["others"].items())
    return op["op"], op["device"], op["runs_on"] or "[red]none[/red]", others or "[dim]none[/dim]"


def _table(title: str, columns: tuple[str, ...], rows: "Iterable[tuple[str, ...]]") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    return table
