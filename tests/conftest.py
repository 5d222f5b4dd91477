"""What every test gets: a seed, few threads, and, where asked for, poisoned memory."""

import gc
import io
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is looked up while tests run; read when the library is imported
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # a thread that waits soon leaves its core to the other process
os.environ.setdefault("OMP_NUM_THREADS", "1")  # NumPy's products and every child: there is one process to a core

import pytest
import torch
from torch import Tensor

from emulation import emulated, folder  # noqa: F401  # fixtures
from instructions import instructions, threads  # noqa: F401

torch.set_num_threads(1)
with torch.device(
    "meta"
):  # PyTorch keeps a list of functions that make tensors: it must hold none of the poisoned ones
    torch.empty(0)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """One process where files are named: several would start more slowly than such a run takes."""
    return 0 if config.args_source is pytest.Config.ArgsSource.ARGS else None


# Those that take longest begin first, so that no core waits for one of them at the end.
LONG = (
    "test_compile",
    "test_contract",
    "test_sanitizers",
    "test_triton",
    "test_triton_compile",
    "test_cuda",
    "test_typecheck",
    "test_dynamic",
    "test_cuda_conv",
    "test_cuda_diagonal",
    "test_triton_delta",
    "test_triton_kalman",
    "test_triton_wkv7",
    "test_cli",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, and skip what needs a GPU where there is none."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """The collector of garbage leaves alone what was imported and collected, to which it would return all the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory that dualform asks for holds NaN (integers: their greatest), so that reading it shows."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        memory = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("dualform") and memory.device.type != "meta":
            with torch.no_grad():
                if memory.is_floating_point() or memory.is_complex():
                    memory.fill_(float("nan"))
                elif memory.dtype != torch.bool:
                    memory.fill_(torch.iinfo(memory.dtype).max)
        return memory

    return poisoned


@pytest.fixture
def dualform(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: ``(exit code, standard output, standard error)``; without stdin, at a terminal."""
    from dualform.cli import main as cli

    def run(*args: Any, stdin: bytes | None = None) -> tuple[int, str, str]:
        data = io.TextIOWrapper(io.BytesIO(stdin or b""))
        data.isatty = lambda: stdin is None
        monkeypatch.setattr(sys, "stdin", data)
        monkeypatch.setattr(sys, "argv", ["dualform", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "160")
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run
