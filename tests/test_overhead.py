"""The benchmark of overhead counts what it says: reads of values on the host, and nothing else."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def overhead(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("overhead")
    for name in ("overhead", "harness"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "read, count",
    [
        (lambda x: x.item(), 1),
        (lambda x: float(x) + int(x), 2),
        (lambda x: bool(x > 0), 1),
        (lambda x: x[None].tolist(), 1),
        (lambda x: x.numpy(), 1),
        (lambda x: torch.nonzero(x[None]), 1),
        (lambda x: x[None][x[None] > 0], 1),
        (lambda x: torch.repeat_interleave(x[None], (x[None] > 0).long()), 1),
        (lambda x: torch.repeat_interleave(x[None], (x[None] > 0).long(), output_size=1), 0),
        (lambda x: x[None][torch.tensor([0])] + x, 0),
        (lambda x: x.exp().to(torch.float64).sum(), 0),
    ],
)
def test_reads_of_values_are_counted(overhead, read, count):
    x = torch.tensor(1.5)
    with overhead.reads() as seen:
        read(x)
    assert sum(seen.values()) == count, seen
    x.tolist()
    assert sum(seen.values()) == count  # and no longer


def test_a_row_is_put_beside_that_of_another_run(overhead, tmp_path):
    (tmp_path / "before.json").write_text('{"rows": [{"case": "a", "least": 30.0, "median": 1}]}')
    rows = [overhead.timed("a", [0.5, 1.0, 9.0], 50), overhead.counted("b", 3)]
    assert rows[0] == {"case": "a", "unit": "us", "least": 10.0, "median": 20.0}
    a, b = overhead.beside(rows, tmp_path / "before.json")
    assert (a["before"], a["before / now"]) == (30.0, 3.0) and b["before"] != b["before"]
