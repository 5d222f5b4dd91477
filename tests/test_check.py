"""``run_checks``: passes on this machine, and says what is broken when something is."""

import math

import pytest
import torch

from dualform.check import run as check
from dualform.check.cases import CASES, Case, mixer_case
from dualform.check.run import Result, plan, run_checks
from dualform.core.errors import ArgumentError, DualformError
from dualform.core.laws import LAWS
from dualform.layers.lstm import LSTM, LSTMConfig
from dualform.ops.op import OPS, Backend


def broken_case(monkeypatch: pytest.MonkeyPatch, step) -> Case:
    """An LSTM with another ``step``, and nothing else to check."""

    class Broken(LSTM):
        pass

    Broken.step = step
    good = mixer_case("", LSTMConfig(), 3)

    def build(device: torch.device, dtype: torch.dtype):
        return Broken(LSTMConfig(), 3).to(device, dtype), None

    case = Case("broken", "lstm", build, good.sample)
    monkeypatch.setattr(check, "CASES", {"broken": case})
    return case


def test_results_of_a_correct_case():
    seen: list[Result] = []
    results = run_checks(["lstm d=3"], dtype="float64", length=9, on_result=seen.append)
    assert seen == results
    assert [r.law for r in results] == list(LAWS)
    assert {r.case for r in results} == {"lstm d=3"}
    for r in results:
        assert r.ok
        assert r.table == "laws"
        assert r.seconds >= 0
        assert (r.error is None) == r.law.startswith("padded")
        if r.error is not None:
            assert r.error <= r.tolerance == 1e-9


def test_every_operator_and_mixer_in_float32():
    results = run_checks([*OPS, "mamba d=17", "lm mamba2 + shared attention"], length=13)
    assert [r for r in results if not r.ok] == []
    bounds = {(r.table == "exact", r.tolerance) for r in results if r.error is not None}  # a backend may be missing
    assert bounds == {(False, 1e-4), (True, 0.0)}
    assert {r.table for r in results} == {"laws", "backends", "exact"}
    rows = {r.case for r in results if r.table == "backends"}
    assert {"ssd packed [torch]", "ssd packed [reference]"} <= rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str):
    names = ["mamba2 d=17", "s4d inv zoh d=17", "attention window d=17", "kalman parallel", "selective_scan", "ssd"]
    assert [r for r in run_checks(names, dtype=dtype, length=65) if not r.ok] == []


def test_a_broken_case_fails(monkeypatch: pytest.MonkeyPatch):
    def step(self, x, state):
        y, state = LSTM.step(self, x, state)
        return y * 1.01, state

    broken_case(monkeypatch, step)
    results = {r.law: r for r in run_checks(["lstm"], length=7)}
    assert not results["step"].ok
    assert results["step"].error == pytest.approx(0.01, rel=0.1)
    assert "output" in results["step"].message
    assert results["split"].ok


def test_nan_and_exceptions_are_failures(monkeypatch: pytest.MonkeyPatch):
    def nan(self, x, state):
        y, state = LSTM.step(self, x, state)
        return y * math.nan, state

    def crash(self, x, state):
        raise DualformError("no step today", hint="tomorrow")

    for step, said in ((nan, "output"), (crash, "DualformError: no step today")):
        broken_case(monkeypatch, step)
        results = {r.law: r for r in run_checks(["lstm"], length=7)}
        assert not results["step"].ok
        assert results["step"].error == math.inf
        assert said in results["step"].message
        assert results["split"].ok


def test_a_broken_backend_fails(monkeypatch: pytest.MonkeyPatch):
    op = OPS["fft_conv"]
    good = op.backends[-1]

    def forward(a):
        return [out * 1.01 for out in good.forward(a)]

    def backward(grads, kept, a):
        return {name: 1.02 * grad for name, grad in good.backward(grads, kept, a).items()}

    def refuses(*args):
        return "not today"

    wrong = Backend("wrong", forward, backward)
    absent = Backend("absent", forward, backward, missing=lambda: "pip install it")
    choosy = Backend("choosy", forward, backward, refuses=refuses)
    elsewhere = Backend("elsewhere", forward, backward, devices=("cuda",))
    monkeypatch.setattr(op, "backends", [wrong, absent, choosy, elsewhere, *op.backends])
    results = {(r.case, r.law): r for r in run_checks(["fft_conv"], length=33)}
    assert results["fft_conv [wrong]", "forward"].error == pytest.approx(0.01, rel=0.5)
    assert results["fft_conv [wrong]", "backward"].error == pytest.approx(0.02, rel=0.5)
    assert not results["fft_conv [wrong]", "forward"].ok
    assert not results["fft_conv [wrong]", "backward"].ok
    assert results["fft_conv [torch]", "forward"].ok
    for name, said in (("absent", "pip install it"), ("choosy", "not today")):
        result = results[f"fft_conv [{name}]", "forward"]
        assert result.ok
        assert result.error is None
        assert said in result.message
    assert ("fft_conv [elsewhere]", "forward") not in results


def test_plan_covers_everything():
    checks = plan()
    assert {c.case for c in checks if c.table == "laws"} == set(CASES)
    assert {(c.case, c.law) for c in checks if c.table == "laws"} == {(c, law) for c in CASES for law in LAWS}
    assert len({(c.table, c.case, c.law) for c in checks}) == len(checks)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"names": ["mambo"]}, "did you mean 'mamba'?"),
        ({"names": ["s4 d=3"]}, "did you mean 's4 legt d=3'?"),
        ({"device": "abacus"}, "'abacus' cannot be used"),
        ({"dtype": "int8"}, "expected one of float64, float32"),
        ({"dtype": torch.int32}, "expected one of float64, float32"),
        ({"length": 0}, "length is 0, expected at least 1"),
    ],
)
def test_bad_arguments(arguments: dict, said: str):
    with pytest.raises(ArgumentError, match=said.replace("?", r"\?")):
        run_checks(**arguments)


def test_bits_that_differ_in_company_are_found(monkeypatch: pytest.MonkeyPatch):
    """As rows of one batch differ, if more of them are put together than its kernels sum in one order."""
    (bits,) = (c for c in plan(["gla"], length=9) if c.table == "exact")
    assert bits.run().ok and bits.run().error == 0
    monkeypatch.setattr("dualform.generation.batch.rows_together", lambda model: 2)
    result = bits.run()
    assert not result.ok and result.error > 0 and "request" in result.message
