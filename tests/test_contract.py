"""The contract: full = chunked = stepped = packed = padded, forward and backward, for everything that is a recurrence.

Every law runs on every case in float64, in memory that holds NaN where nothing was written, at odd lengths: one, two,
and past a chunk of 64. Operators, which are quicker to try, run on either side of it.
"""

import importlib
import inspect
import pkgutil
from typing import get_type_hints

import pytest
import torch

import dualform.layers
from dualform.check.cases import CASES, Case
from dualform.check.op_cases import OpCase, op_cases
from dualform.check.run import TOLERANCE, compare
from dualform.core.errors import BackendError
from dualform.core.forms import whole
from dualform.core.laws import LAWS, Trial, compare_gradients, functional, gradients
from dualform.core.tree import clone, named_leaves
from dualform.layers.mixer import Mixer
from dualform.layers.registry import COMPOSITES, MIXERS
from dualform.ops.op import OPS, backend

LENGTHS = (1, 2, 63, 65)
OP_CASES = {f"{case.name}-{length}": case for length in LENGTHS for case in op_cases(length)}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def prove(trial: Trial, tolerance: float, laws: tuple[str, ...] = tuple(LAWS)) -> None:
    found = {name: LAWS[name](trial) for name in laws}
    broken = {name: worst for name, worst in found.items() if worst is not None and not worst.error <= tolerance}
    assert not broken


@every_case
@pytest.mark.parametrize("length", (1, 2, 65))
def test_every_law_in_float64(case: Case, length: int, poison: None):
    prove(case.trial(length, seed=length), 1e-9)


@every_case
def test_every_law_from_the_initial_state(case: Case, poison: None):
    prove(case.trial(13, warmup=0, seed=1), 1e-9)


@every_case
def test_portable_operators_are_contained(case: Case, poison: None):
    """Every law runs on the preferred operators of a CPU; these are those that run anywhere."""
    with backend("torch"):
        prove(case.trial(33, seed=3), 1e-9, ("contained",))


@every_case
def test_float32(case: Case, poison: None):
    trial = case.trial(33, dtype=torch.float32, seed=2)
    prove(trial, 1e-4, ("layout", "fresh", "split", "step", "packed", "padded left", "gradient", "final state"))


@every_case
@pytest.mark.filterwarnings("ignore::dualform.ops.op.SlowBackendWarning")  # of float64, which some kernels refuse
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_law_on_a_gpu(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # cuDNN's LSTM, in float32
    prove(case.trial(65, device="cuda", dtype=dtype), TOLERANCE[dtype])


@every_case
def test_operators_by_their_references_give_the_same(case: Case):
    trial = case.trial(21)
    got = gradients(trial, whole, "both")
    with backend("reference"):
        want = gradients(trial, whole, "both")
    found = compare_gradients(got, want, "against the reference")
    assert found.error <= 1e-9, found


@every_case
def test_gradients_are_derivatives(case: Case):
    """Along a random direction of parameters and inputs, against a difference quotient of fourth order."""
    trial = case.trial(9)
    parameters, x, generator = trial.differentiable(), trial.inputs, trial.generator()
    found = gradients(trial, whole, "both")
    moving = dict(parameters)
    if x.is_floating_point():
        moving["input"] = x = x.clone()
        found.parameters["input"] = found.input[""]
    directions = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype) * (p.detach().nan_to_num().abs().max() or 1.0)
        for name, p in moving.items()
    }
    slope = sum((found.parameters[name] * d).sum() for name, d in directions.items())
    start = {name: p.detach().clone() for name, p in moving.items()}

    @torch.no_grad()
    def at(h: float) -> torch.Tensor:
        for name, p in moving.items():
            p.copy_(start[name] + h * directions[name])
        return functional(trial.f.forward(x, clone(trial.state)), trial.generator())

    h = 1e-4
    quotient = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    torch.testing.assert_close(slope, quotient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", OP_CASES.values(), ids=OP_CASES.keys())
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_backend_equals_the_reference(case: OpCase, backward: bool, poison: None):
    for name in [b.name for b in OPS[case.op].backends if b.runs_on("cpu") and not b.missing()]:
        try:
            found, _ = compare(case, name, torch.device("cpu"), torch.float64, backward=backward)
        except BackendError:  # it says why in its own tests; the portable backend takes every call
            assert name != "torch"
            continue
        assert found.error <= 1e-9, (name, found)


def test_every_operator_has_a_case():
    assert {case.op for case in OP_CASES.values()} == set(OPS)


def test_every_mixer_has_a_case():
    for module in pkgutil.iter_modules(dualform.layers.__path__, "dualform.layers."):
        importlib.import_module(module.name)

    def below(cls: type) -> set[type]:
        return {cls, *(c for s in cls.__subclasses__() for c in below(s))}

    def is_layer(cls: type) -> bool:
        """Neither abstract, nor a base that takes more than a config, nor put together of other parts."""
        built_from = list(inspect.signature(cls.__init__).parameters)
        return not inspect.isabstract(cls) and built_from == ["self", "config", "d_model"] and cls not in composed

    composed = {get_type_hints(config.build)["return"] for config in COMPOSITES.values() if hasattr(config, "build")}
    ours = {c for c in below(Mixer) if c.__module__.startswith("dualform.") and is_layer(c)}
    covered = {case.kind: type(case.trial(1).f) for case in CASES.values() if case.kind in MIXERS}
    assert set(covered) == set(MIXERS), "a mixer of the registry has no case in dualform.check.cases"
    assert ours == set(covered.values()), "a mixer of dualform.layers is not in the registry"


def test_every_mixer_is_tried_with_odd_widths():
    widths = {kind: {case.name.split("d=")[-1] for case in CASES.values() if case.kind == kind} for kind in MIXERS}
    assert all(found >= {"1", "3", "17"} for found in widths.values()), widths


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_states_are_float32_or_wider(case: Case, dtype: torch.dtype):
    """A cache of keys and values, or of what they are made of, is not summed up: it has the dtype of the layer."""
    trial = case.trial(3, dtype=dtype)
    _, state = trial.f.forward(trial.inputs, trial.state)
    for name, leaf in named_leaves(state):
        cached = name.split(".")[-1] in ("k", "v", "latent")
        if leaf.is_floating_point() or leaf.is_complex():
            assert leaf.real.dtype == (dtype if cached else torch.promote_types(dtype, torch.float32)), name


def test_the_poison_is_found(poison: None, monkeypatch: pytest.MonkeyPatch):
    """An operator that leaves memory unwritten gives NaN under the fixture."""
    namespace = {"__name__": "dualform.somewhere", "torch": torch}
    exec("def f(x): return [torch.empty_like(x), x.new_empty(2), torch.empty(3, dtype=torch.int64)]", namespace)
    a, b, c = namespace["f"](torch.zeros(2))
    assert a.isnan().all()
    assert b.isnan().all()
    assert (c == torch.iinfo(torch.int64).max).all()
