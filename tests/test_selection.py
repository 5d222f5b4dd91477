"""Choosing a model by AICc."""

import math

import pytest
import torch

from airline import PASSENGERS
from dualform.core.errors import ArgumentError
from dualform.gaussian import ets, select_ets
from vectors import close, load


def test_the_class_with_the_least_aicc_is_chosen():
    y = PASSENGERS.reshape(-1, 6).sum(1)
    found = select_ets(y, 2)
    assert len(found.candidates) == 15
    assert [c.aicc for c in found.candidates] == sorted(c.aicc for c in found.candidates)
    best = found.candidates[0]
    assert best.name == found.model.title and best.parameters == len(found.fit.names) + 1
    assert found.fit.log_likelihood > best.log_likelihood - 1e-9 and abs(found.fit.aicc - best.aicc) < 0.01
    assert found.model.kind.season != "none" and found.fit.converged
    close(found.forecast(3).mean, found.model.forecast(y, 3).mean, 1e-12)
    assert best.name in found.summary() and "AICc" in found.summary()


def test_classes_are_those_that_a_series_allows():
    y = load("nile_local_level")["y"][:40]
    assert {c.name for c in select_ets(y - 900).candidates} == {"ETS(A,N,N)", "ETS(A,A,N)", "ETS(A,Ad,N)"}
    assert len(select_ets(y[:11], 6).candidates) == 6  # less than two periods
    few = select_ets(y[:4])
    assert few.candidates[0].name in ("ETS(A,N,N)", "ETS(M,N,N)")
    assert few.candidates[-1].aicc == math.inf


def test_series_of_a_batch_are_chosen_for_apart():
    x = load("nile_local_level")["y"][:20]
    y = torch.stack([x - 900, torch.arange(20) * 3.0 + x / 100 + 1])[..., None]
    together = select_ets(y, lengths=[15, 20])
    for row, n in enumerate([15, 20]):
        alone = select_ets(y[row, :n])
        assert alone.model.title == together[row].model.title
        assert abs(alone.fit.aicc - together[row].fit.aicc) < 1e-4
    assert together[1].model.kind.trend != "none"


def test_errors():
    for message, call in {
        "period is 0": lambda: select_ets(PASSENGERS, 0),
        "row 0 of y has 2 steps": lambda: select_ets([1.0, 2.0]),
        "does not change": lambda: select_ets(torch.ones(9)),
        "all values are missing": lambda: select_ets([math.nan] * 9),
        "expected \\(T,\\), \\(T, 1\\) or": lambda: select_ets(torch.ones(2, 2, 9, 1)),
    }.items():
        with pytest.raises(ArgumentError, match=message):
            call()


def test_progress_is_told(capsys):
    select_ets(load("nile_local_level")["y"][:12], progress=True)
    assert "ETS(" in capsys.readouterr().err
    select_ets(load("nile_local_level")["y"][:12])
    assert capsys.readouterr().err == ""
    assert ets().title == "ETS(A,N,N)"
