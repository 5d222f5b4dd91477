"""``python -m dualform.compat train.py --its --arguments``: run a script for mamba-ssm as it is."""

import runpy
import sys
from pathlib import Path

from dualform.compat.install import CompatError, install

_USAGE = """usage: python -m dualform.compat [--force] script.py [arguments]
       python -m dualform.compat [--force] -m module [arguments]

Run a script or module that imports mamba_ssm or causal_conv1d, on dualform's operators.
--force stands in front of the real packages where they are installed."""


def main(arguments: list[str]) -> None:
    """Install the names, then run the script as Python itself would."""
    force = arguments[:1] == ["--force"]
    rest = arguments[1:] if force else arguments
    if not rest or rest[0] in ("-h", "--help") or rest == ["-m"]:
        print(_USAGE)
        raise SystemExit(0 if rest[:1] in (["-h"], ["--help"]) else 2)
    try:
        install(force=force)
    except CompatError as error:
        raise SystemExit(f"error: {error}") from None
    if rest[0] == "-m":
        sys.argv = rest[1:]
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        return
    script = Path(rest[0])
    if not script.exists():
        raise SystemExit(f"error: there is no {script}\n  hint: python -m dualform.compat --help")
    sys.argv = rest
    if not sys.flags.safe_path:  # what Python puts first for a script, in place of what it puts first for a module
        sys.path[0] = str(script.resolve().parent if script.is_file() else script)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
