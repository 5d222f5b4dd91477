"""A test that hangs ends, wherever it hangs, and says where."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

CONFIG = Path(__file__).parent.parent / "pyproject.toml"
HANGS = """
import ctypes, threading

def waits_elsewhere():
    threading.Event().wait()

def test_hangs():
    threading.Thread(target=waits_elsewhere, daemon=True).start()
    mutex, library = ctypes.create_string_buffer(256), ctypes.PyDLL(None)  # which keeps Python's lock
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # never returns, and no signal interrupts it
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of zeros is one of glibc and musl")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_hang_outside_of_python_ends_with_all_stacks(tmp_path, workers):
    (tmp_path / "test_it.py").write_text(HANGS)
    limits = (
        "-o",
        "timeout=0.2",
        "-o",
        "faulthandler_timeout=0.5",
        "-n",
        str(workers),
        "--max-worker-restart=0",
        "-p",
        "no:cacheprovider",
    )
    command = [sys.executable, "-m", "pytest", "-c", CONFIG, *limits, tmp_path / "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0, done.stdout
    assert "Timeout (0:00:00.5" in done.stderr
    assert "in test_hangs" in done.stderr and "in waits_elsewhere" in done.stderr


def test_the_signal_has_its_chance_before():
    options = tomllib.loads(CONFIG.read_text())["tool"]["pytest"]["ini_options"]
    assert options["faulthandler_timeout"] > options["timeout"] and options["faulthandler_exit_on_timeout"] is True
