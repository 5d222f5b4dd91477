"""The Kalman filter and smoother in Triton, as ``test_triton.py`` has other operators."""

import sys

import pytest
import torch
from torch import Tensor

import dualform as df
from dualform.check.op_cases import OpCase
from dualform.check.run import compare
from dualform.gaussian import smoothing
from dualform.gaussian.filtering import is_kernel_faster
from dualform.ops import backend, kalman_filter, kalman_smoother
from dualform.ops.kalman_smoother import kalman_smoother_op
from dualform.ops.triton.support import INTERPRETED, missing
from test_triton import (
    DEVICE,
    GPU,
    compile_both_directions,
    compile_forward,
    normal,
    passes_interpreted,
    runs,
)

pytestmark = pytest.mark.skipif(bool(missing()), reason="Triton is not installed")


def gaussian(batch: int, length: int, n: int, m: int, *, constant: bool = False, moments: bool = True) -> OpCase:
    """A model whose matrices vary in time and between series, or are views of one; some observations are missing."""
    lead = (1, 1) if constant else (batch, length)
    tensors = {"A": 0.4 * normal(*lead, n, n), "c": normal(*lead, n), "C": normal(*lead, m, n)}
    for name, size in (("Q", n), ("R", m)):
        root = normal(*lead, size, size)
        tensors[name] = root @ root.mT + 0.5 * torch.eye(size, dtype=root.dtype)
    tensors = {name: x.expand(batch, length, *x.shape[2:]) for name, x in tensors.items()}
    root = normal(batch, n, n)
    tensors |= {"y": normal(batch, length, m), "mean": normal(batch, n), "cov": root @ root.mT}
    seen = torch.rand(batch, length, m) < 0.7
    return OpCase("kalman_filter", "kalman_filter", kalman_filter, tensors, {"seen": seen, "moments": moments})


CASES = {
    "level": lambda: gaussian(35, 4, 1, 1),
    "one step of one series": lambda: gaussian(1, 1, 2, 1),
    "odd": lambda: gaussian(3, 5, 3, 2),
    "constant": lambda: gaussian(5, 6, 4, 1, constant=True, moments=False),
    "likelihood": lambda: gaussian(2, 3, 5, 3, moments=False),
    "many states": lambda: gaussian(2, 2, 13, 1),
    "many observations": lambda: gaussian(1, 3, 2, 7, constant=True),
}
# And how much of its numbers a program may put into memory: with more warps, which exchange them, it is slower.
COMPILED = {
    "level": (lambda: gaussian(100, 50, 1, 1, constant=True), 64),
    "sensors": (lambda: gaussian(100, 50, 6, 3), 64),
    "season of a year": (lambda: gaussian(100, 50, 13, 1, constant=True), 512),
}


@runs
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_the_definition(name, poison):
    for dtype in (torch.float64, torch.float32) if GPU else (torch.float64,):
        for backward in (False, True):
            found, allowed = compare(CASES[name](), "triton", DEVICE, dtype, backward=backward)
            assert found.error <= allowed, found


def smoother(given: OpCase) -> OpCase:
    return OpCase("kalman_smoother", "kalman_smoother", kalman_smoother, given.tensors, {"seen": given.options["seen"]})


@runs
@pytest.mark.parametrize("name", ["level", "odd", "many states"])
def test_the_smoother_is_the_definition(name, poison):
    for dtype in (torch.float64, torch.float32) if GPU else (torch.float64,):
        found, allowed = compare(smoother(CASES[name]()), "triton", DEVICE, dtype, backward=False)
        assert found.error <= allowed, found


@runs
def test_a_series_that_loses_digits_is_nan_and_the_model_takes_another_form():
    given = smoother(gaussian(3, 6, 2, 1)).cast(DEVICE, torch.float64)
    given["cov"][1] *= 1e9
    with backend("triton"):
        found = kalman_smoother(**given, seen=torch.ones(3, 6, 1, dtype=torch.bool, device=DEVICE))
    assert found.loglik.isnan().any(1).tolist() == [False, True, False]


@runs
@pytest.mark.parametrize("vague", [False, True])
def test_a_model_is_smoothed_by_the_kernel_as_by_the_scan(vague):
    eye = torch.eye(2, dtype=torch.float64)
    A, C = torch.tensor([[0.9, 0.3], [0.0, 0.7]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    model = df.LinearGaussian(A, C, eye, eye[:1, :1], torch.zeros_like(A[0]), 1e9 * eye if vague else eye).to(DEVICE)
    y = normal(4, 12, 1).to(DEVICE)
    y[1, 3:5] = torch.nan
    with torch.no_grad():
        want = df.KalmanFilter(model, parallel=True).smooth(y)
        with backend("triton"):
            found = df.KalmanFilter(model, parallel=False).smooth(y)
    for got, expected in zip(found[:4], want[:4], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@runs
def test_a_step_without_a_likelihood_is_nan_and_stays_in_its_series():
    given = gaussian(3, 4, 2, 1).cast(DEVICE, torch.float64)
    for name in ("Q", "R", "cov"):
        given[name] = given[name].clone()
        given[name][1] = 0
    with backend("triton"):
        found = kalman_filter(**given, moments=True, seen=torch.ones(3, 4, 1, dtype=torch.bool, device=DEVICE))
    assert found.loglik.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 4])
def test_series_beyond_2_31_numbers_are_filtered_as_by_themselves(n):
    """The moments of all of them are as many."""
    length = 1000
    rows = 2**31 // (length * n * n) + 5
    model = df.LinearGaussian(
        0.9 * torch.eye(n), torch.ones(1, n), torch.eye(n), torch.eye(1), torch.zeros(n), torch.eye(n)
    )
    model, y = model.to("cuda", torch.float32), torch.randn(rows, length, 1, device="cuda")
    kalman = df.KalmanFilter(model, parallel=False)
    with torch.no_grad():
        found, alone = kalman.filter(y), kalman.filter(y[-5:])
    assert found.cov.numel() > 2**31
    for got, want in zip((found.mean, found.cov, found.loglik), (alone.mean, alone.cov, alone.loglik), strict=True):
        assert torch.equal(got[-5:], want)


@pytest.mark.gpu
def test_a_batch_on_a_gpu_is_smoothed_by_the_kernel_and_a_long_series_by_the_scan(monkeypatch):
    model = df.LinearGaussian(torch.eye(2), torch.ones(1, 2), torch.eye(2), torch.eye(1), torch.zeros(2), torch.eye(2))
    kalman = df.KalmanFilter(model.to("cuda", torch.float64))
    calls = []
    monkeypatch.setattr(smoothing, "kalman_smoother_op", lambda a: calls.append(a) or kalman_smoother_op(a))
    with torch.no_grad():
        for shape, taken in (((100, 50, 1), 1), ((1, 200_000, 1), 0)):
            calls.clear()
            y = torch.randn(shape, device="cuda", dtype=torch.float64)
            assert kalman.smooth(y).form == "sequential" and len(calls) == taken


@pytest.mark.gpu
def test_spans_of_a_long_series_are_the_scan_on_a_gpu():
    n, length = 4, 100_003
    model = df.LinearGaussian(
        0.9 * torch.eye(n), torch.ones(1, n), torch.eye(n), torch.eye(1), torch.zeros(n), 1e7 * torch.eye(n)
    )
    model, y = model.to("cuda", torch.float64), torch.randn(2, length, 1, device="cuda", dtype=torch.float64)
    y[:, 5000:5100] = torch.nan
    with torch.no_grad():
        got, want = (df.KalmanFilter(model, parallel=parallel).filter(y) for parallel in (False, True))
    for x, z in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(x, z, rtol=1e-8, atol=1e-8)


@pytest.fixture
def short_spans(monkeypatch):
    """Spans of three steps and more; and of each call, whether they were taken."""
    module, taken = sys.modules["dualform.ops.triton.kalman_filter"], []
    entering = module._entering
    monkeypatch.setattr(module, "_WORTH", 0)
    monkeypatch.setattr(module, "_SHORTEST", 3)
    monkeypatch.setattr(module, "_entering", lambda *a: taken.append(entering(*a)) or taken[-1])
    return taken


SPANS = {
    "level": lambda: gaussian(1, 13, 1, 1),
    "odd": lambda: gaussian(2, 17, 3, 2),
    "constant": lambda: gaussian(1, 29, 4, 1, constant=True, moments=False),
}


@runs
@pytest.mark.parametrize("name", SPANS)
def test_spans_of_time_are_the_definition(name, poison, short_spans):
    for backward in (False, True):
        found, allowed = compare(SPANS[name](), "triton", DEVICE, torch.float64, backward=backward)
        assert found.error <= allowed, found
    assert len(short_spans) == 2 and all(entering is not None for entering in short_spans)


@runs
def test_a_series_with_a_span_that_has_no_element_is_walked_in_one(short_spans):
    """An observation without noise, of a state without noise given the one before it."""
    given = gaussian(1, 20, 2, 1)
    given.tensors.update({"R": torch.zeros_like(given.tensors["R"]), "Q": given.tensors["Q"].clone()})
    given.tensors["Q"][:, 8] = 0
    given.options["seen"][:, 8] = True
    found, allowed = compare(given, "triton", DEVICE, torch.float64, backward=False)
    assert found.error <= allowed, found
    assert short_spans == [None]


def test_the_form_is_chosen_by_size():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert is_kernel_faster(10_000, 200, 13, gpu, True) and is_kernel_faster(1, 5000, 4, gpu, True)
    assert not is_kernel_faster(1, 10**6, 4, gpu, True) and is_kernel_faster(1, 10**6, 4, gpu, False)
    assert is_kernel_faster(1, 10**6, 4, cpu, True)


@runs
def test_second_derivatives_are_those_of_the_definition():
    given = gaussian(2, 3, 2, 1, constant=True, moments=False).cast(DEVICE, torch.float64)
    seen = torch.ones(2, 3, 1, dtype=torch.bool, device=DEVICE)

    def curvature(name: str) -> Tensor:
        R = given["R"].clone().requires_grad_()
        with backend(name):
            loglik = kalman_filter(**(given | {"R": R}), seen=seen, moments=False).loglik.sum()
            (slope,) = torch.autograd.grad(loglik, R, create_graph=True)
            return torch.autograd.grad(slope.sum(), R)[0]

    torch.testing.assert_close(curvature("triton"), curvature("reference"), rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("target", ["NVIDIA Hopper", "AMD MI300"])
def test_kernels_compile_for(target):
    from triton_targets import TARGETS, compiled, resources

    for make, most in COMPILED.values():
        with compiled(TARGETS[target]) as kernels:
            compile_both_directions(make(), torch.float32)
            compile_forward(smoother(make()), torch.float32)
        assert [name for name, _ in kernels] == ["forward", "backward", "forward", "smooth"]
        for name, kernel in kernels:
            used = resources(kernel)
            assert used["spilled"] <= most, f"{name} puts registers into memory: {used}"


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests of this file run as they are")
def test_in_the_interpreter():
    passes_interpreted(__file__)
