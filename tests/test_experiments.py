"""Experiments still run; what they show is in their own tables, which take minutes."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments"


@pytest.fixture
def digits(monkeypatch):
    spec = importlib.util.spec_from_file_location("sequential_digits", FOLDER / "sequential_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WIDTH", 32)
    return module


def test_digits_print_a_table(digits, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sequential_digits.py", "s5", "--epochs", "4"])
    digits.main()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows[2:]] == [["s5", "in order"], ["s5", "permuted"]]
    assert all(0.2 < float(row[3].rstrip("%")) / 100 <= 1 for row in rows[2:])


def test_the_split_is_by_class_and_the_orders_hold_the_same_pixels(digits):
    import torch

    order = torch.arange(64).flip(0)
    train, labels, test, test_labels = digits.digits(torch.arange(64))
    turned, *_ = digits.digits(order)
    assert train.shape == (1437, 64, 1) and test.shape == (360, 64, 1)
    assert torch.equal(train[:, order], turned) and train.min() == -1 and train.max() == 1
    assert (labels.bincount() / 1437 - test_labels.bincount() / 360).abs().max() < 0.01
