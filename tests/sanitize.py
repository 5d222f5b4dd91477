"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, through random calls of every operator.

    python tests/sanitize.py --calls 2000

compiles ``native/`` with both, for which g++ is enough, and runs ``tests/random_calls.py`` on that library in a second
Python, which loads AddressSanitizer before anything else. With ``--plant`` the library has a wrong bound, which has to
be found.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

TESTS = Path(__file__).resolve().parent
NATIVE = TESTS.parent / "native"
# Without optimisation, and with a call for each check of AddressSanitizer, compiling takes a fifth of the time.
FLAGS = ["-std=gnu++17", "-O0", "-g1", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wno-psabi"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS += ["--param", "asan-instrumentation-with-call-threshold=0"]
SETTINGS = {
    # The last one: GCC 13 does not align vectors of 64 bytes on the stack that finds uses after a return.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=32:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "PYTHONWARNINGS": "ignore",
}
_LONGEST = 500  # seconds; 2,000 calls take 75 on one core
# Sums of doubles are given as much memory as sums of floats.
PLANT = ("new char[count * (dtype == FLOAT64 ? 8 : 4)]", "new char[count * 4]")


def why_not() -> str:
    """What is missing here; empty where the sanitizers can run."""
    if sys.platform != "linux":
        return "the sanitizers are run on Linux"
    try:
        found = [Path(_library(name)) for name in ("libasan.so", "libstdc++.so")]
    except FileNotFoundError:
        return "there is no g++"
    return "" if all(path.is_absolute() for path in found) else "g++ comes without libasan"


def build(folder: Path, isas: list[str], plant: bool = False) -> Path:
    """Compile the library into a folder, with the kernels of these instruction sets; objects there are used again."""
    flags = dict(re.findall(r"kernels_for\((\w+) ?([^)]*)\)", (NATIVE / "CMakeLists.txt").read_text()))
    objects: dict[Path, list[str]] = {
        folder / f"{name}_{isa}.o": [f"-DDUALFORM_ISA={isa}", *flags[isa].split(), str(NATIVE / f"{name}.cpp")]
        for isa, name in product(isas, ("kernels", "step_kernels"))
    }
    # One that is left out is a copy of one that is there, name included, so that nobody chooses it.
    absent = "".join(f"extern const Kernels kernels_{isa} = kernels_{isas[0]};\n" for isa in flags if isa not in isas)
    (folder / "absent.cpp").write_text(f'#include "kernels.h"\n{absent}')
    source = (NATIVE / "library.cpp").read_text()
    if plant:
        assert PLANT[0] in source
        source = source.replace(*PLANT)
    (folder / "library.cpp").write_text(source)
    for path in (
        folder / "absent.cpp",
        folder / "library.cpp",
        *(NATIVE / f"{name}.cpp" for name in ("series", "steps", "draw", "pool")),
    ):
        objects[folder / f"{path.stem}.o"] = [f"-I{NATIVE}", str(path)]
    (folder / "library.o").unlink(missing_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        missing = [(path, arguments) for path, arguments in objects.items() if not path.exists()]
        list(pool.map(lambda one: _compile("-c", "-o", str(one[0]), *one[1]), missing))
    found = folder / ("planted.so" if plant else "kernels.so")
    _compile("-shared", "-o", str(found), *map(str, objects), "-ldl")
    return found


def run(library: Path, calls: int, first: int = 0, show: bool = False) -> subprocess.CompletedProcess[str]:
    """Random calls on a library in a second Python."""
    settings = SETTINGS | {"LD_PRELOAD": f"{_library('libasan.so')} {_library('libstdc++.so')}"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(library), "--calls", str(calls)]
    command += ["--first", str(first), *(["--show"] if show else [])]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)


def _child(library: str, arguments: list[str]) -> int:
    """In the second Python: the kernels of dualform are those of the library."""
    import ctypes
    import faulthandler

    import torch

    faulthandler.dump_traceback_later(_LONGEST, exit=True)  # one that hangs says where

    class Instrumented(ctypes.CDLL):
        def __init__(self, name: str):
            super().__init__(library if name.endswith("kernels.so") else name)

    ctypes.CDLL = Instrumented
    import random_calls
    from dualform.ops.native import library as native

    assert native._library is not None and native._library._name == library, native.missing
    torch.set_num_threads(2)
    sys.argv[1:] = arguments
    return random_calls.main()


def _library(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _compile(*arguments: str) -> None:
    done = subprocess.run(["g++", *FLAGS, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"g++ {' '.join(arguments)}\n{done.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Random calls of the CPU kernels under sanitizers.")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--show", action="store_true", help="print the number of every call before it is made")
    parser.add_argument("--isa", nargs="+", help="instruction sets; by default those that this processor has")
    parser.add_argument("--plant", action="store_true", help="build with a wrong bound, which has to be found")
    parser.add_argument("--folder", type=Path, help="where to build, and to find what was built before")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        show = ["--show"] if options.show else []
        return _child(options.child, ["--calls", str(options.calls), "--first", str(options.first), *show])
    if why_not():
        print(why_not(), file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        done = run(build(folder, options.isa or here(), options.plant), options.calls, options.first, options.show)
    print(done.stdout, done.stderr, sep="\n")
    return done.returncode


def here() -> list[str]:
    """The instruction sets that this processor has."""
    from dualform.ops.native import library

    found = [isa for isa in ("avx512", "avx2", "baseline") if library.choose(isa) == isa]
    library.choose()
    return found or ["baseline"]


if __name__ == "__main__":
    sys.exit(main())
