"""The shapes written in signatures are true: a part of the contract runs with jaxtyping and beartype watching."""

import subprocess
import sys
from pathlib import Path

from dualform.check.cases import CASES

ROOT = Path(__file__).parent.parent
WATCHED = ("dualform.core", "dualform.gaussian", "dualform.layers", "dualform.models")

MISUSE = f"""
import torch
from jaxtyping import install_import_hook
with install_import_hook({WATCHED!r}, "beartype.beartype"):
    from dualform.layers.rotary import rotate
rotate(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, dtype=torch.int64))
rotate(torch.zeros(1, 2, 3, 4), torch.zeros(1, 5, dtype=torch.int64))
"""


def test_signatures_hold_while_the_contract_is_proved():
    one_of_each = {case.kind: case.name for case in CASES.values()}.values()
    cases = [f"tests/test_contract.py::test_every_law_in_float64[2-{name}]" for name in one_of_each]
    hook = f"--jaxtyping-packages={','.join(WATCHED)},beartype.beartype"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", hook, *cases],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_a_wrong_shape_is_seen():
    done = subprocess.run([sys.executable, "-c", MISUSE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "TypeCheckError" in done.stderr, done.stderr
    assert "positions" in done.stderr, done.stderr
