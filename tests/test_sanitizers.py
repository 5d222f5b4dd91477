"""Random calls of every operator, plain and on CPU kernels that sanitizers watch.

``python tests/sanitize.py`` makes four times as many, in every instruction set.
"""

import subprocess
from pathlib import Path

import pytest

import sanitize
from dualform.ops import OPS
from dualform.ops.native import library
from random_arguments import CALLS
from random_calls import call

WHY_NOT = library.missing or sanitize.why_not()


def test_every_operator_is_called():
    assert set(CALLS) == set(OPS)


@pytest.mark.parametrize("hundred", range(4))
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_random_calls_are_right_or_explain_what_is_wrong(device, hundred):
    ended = [call(number, device) for number in range(100 * hundred, 100 * hundred + 100)]
    assert {how.split()[0].strip(",") for how in ended} == {"valid", "spoiled"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sanitized")


def widest() -> list[str]:
    """The widest instruction set of this processor: each takes minutes to compile, and the command takes all."""
    return sanitize.here()[:1]


def finished(done: subprocess.CompletedProcess[str]) -> str:
    return f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_the_cpu_kernels_stay_inside_their_memory(folder):
    done = sanitize.run(sanitize.build(folder, widest()), first=400, calls=500)  # behind those above
    assert done.returncode == 0, finished(done)
    assert "     0 wrong" in done.stdout


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_a_wrong_bound_is_found(folder):
    done = sanitize.run(sanitize.build(folder, widest(), plant=True), calls=200)
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, finished(done)
