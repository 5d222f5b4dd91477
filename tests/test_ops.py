"""Every op: each backend is the definition, forward and backward; registration; refusals; errors that explain."""

import sys
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dualform.check.op_cases import OpCase, op_cases
from dualform.core.errors import ArgumentError, BackendError
from dualform.ops import (
    OPS,
    Backend,
    SlowBackendWarning,
    backend,
    causal_conv1d,
    fft_conv,
    linear_scan,
    ssd,
)
from dualform.ops import selective_scan as scan
from dualform.ops.selective_scan import SelectiveScan
from op_calls import NAMES, case_of, dispatched

LENGTHS = (1, 2, 23, 65)


@pytest.fixture
def short_spans(monkeypatch):
    """Spans of a few steps, so that short sequences cross several."""
    monkeypatch.setattr(sys.modules["dualform.ops.selective_scan_chunked"], "_CPU_SPAN", 200)
    monkeypatch.setattr(sys.modules["dualform.ops.selective_scan_chunked"], "_SAVE_EVERY", 2)
    monkeypatch.setattr(sys.modules["dualform.ops.ssd_chunked"], "_SPAN_ELEMENTS", 2000)
    monkeypatch.setattr(sys.modules["dualform.ops.spans"], "_CPU_ELEMENTS", 200)


def results(case: OpCase, name: str, dtype: torch.dtype = torch.float64):
    """Outputs, and gradients of a random functional of all of them, on one backend."""
    tensors = {k: t.requires_grad_() for k, t in case.cast("cpu", dtype).items()}
    with backend(name):
        outputs = case.call(tensors)
        generator = torch.Generator().manual_seed(1)
        loss = torch.zeros((), dtype=torch.float64)
        for y in outputs:
            weight = torch.randn(y.shape, generator=generator, dtype=torch.float64)
            loss = loss + (y * weight).sum().real
        gradients = torch.autograd.grad(loss, list(tensors.values()))
    return outputs, dict(zip(tensors, gradients, strict=True))


def compare(got, want, tolerance: float):
    for i, (a, b) in enumerate(zip(got[0], want[0], strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"output {i}: {m}")
    for name, b in want[1].items():
        a, scale = got[1][name], max(1.0, float(b.abs().max())) if b.numel() else 1.0
        assert a.dtype == b.dtype and a.shape == b.shape, name
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_is_the_definition(name, length, short_spans, poison):
    case = case_of(name, length)
    want = results(case, "reference")
    for found in OPS[case.op].backends:
        if not found.missing() and found.runs_on("cpu"):
            try:
                got = results(case, found.name)
            except BackendError:
                continue  # it says why in its own tests
            compare(got, want, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_torch_backend_on_long_spans(name):
    case = case_of(name, 131)
    compare(results(case, "torch"), results(case, "reference"), 1e-10)


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_has_a_portable_backend(op):
    assert any(b.name == "torch" and not b.devices and not b.missing() for b in OPS[op].backends)
    assert any(case.op == op for case in op_cases(3))


@pytest.mark.parametrize("name", NAMES)
def test_registration(name, short_spans):
    """PyTorch's own check of schema, fake tensors and dispatch, on the arguments that the op itself receives."""
    op, args = dispatched(case_of(name, 9), torch.float64)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for save in (False,) if op.stepwise else (False, True):
        torch.library.opcheck(op._forward, ("torch", save, *args[2:]), test_utils=tests)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    """The gradients are those of the function, not only those of the reference."""
    case = case_of(name, 3)
    tensors = {k: t.requires_grad_() for k, t in case.cast("cpu", torch.float64).items()}

    def run(*values):
        made = case.call(dict(zip(tensors, values, strict=True)))
        if case.op == "markov_filter":  # c is relative to top, which has no gradient: together they are the likelihood
            made = made[0], made[1].log() + made[2]
        return made

    with backend("torch"):
        assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("name", [n for n in NAMES if "complex" not in n])
def test_bfloat16_in_float32_inside(name):
    """No worse than a small multiple of what rounding the inputs and outputs to bfloat16 costs the definition."""
    case = case_of(name, 65)
    exact = case.call({k: t.double() for k, t in case.cast("cpu", torch.bfloat16).items()})
    with backend("torch"):
        got = case.call(case.cast("cpu", torch.bfloat16))
    for a, b in zip(got, exact, strict=True):
        error = (a.double() - b).norm() / b.double().norm().clamp(min=1e-30)
        assert error < 2e-2, f"relative error {error:.3g}"
    if len(got) == 2 and case.op not in ("lti_step", "markov_path"):  # a stream of float32, and whole numbers
        assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32


@pytest.mark.parametrize("name", ["reference", "torch", ""])
@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_pointwise_work_inside_rounds_once(op, name):
    """Skip, gate and activation are applied before the output is rounded to the dtype of the input."""
    case = case_of(op, 65)
    given = case.cast("cpu", torch.bfloat16)
    with backend("reference"):
        exact, _ = case.call({k: t.double() for k, t in given.items()})
    with backend(name):
        y, _ = case.call(given)
    assert y.dtype == torch.bfloat16
    half_a_unit = 2**-8 * exact.abs()
    assert ((y.double() - exact).abs() <= 1.001 * half_a_unit + 1e-5).all()


def test_reference_differentiates_twice():
    a, b = (torch.rand(1, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with backend("reference"):
        assert torch.autograd.gradgradcheck(lambda a, b: linear_scan(a, b)[0], (a, b))
    y, _ = linear_scan(a, b)
    (g,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    with pytest.raises(BackendError, match="second time"):
        g.sum().backward()


def test_a_forced_backend_says_why_it_cannot():
    x = torch.rand(1, 3, 2)
    with backend("triton"), pytest.raises(BackendError, match=r"linear_scan: backend 'triton' cannot run on cpu"):
        linear_scan(x, x)


def test_a_slower_fallback_warns_once():
    op, x = OPS["linear_scan"], torch.rand(1, 3, 2)
    portable = next(b for b in op.backends if b.name == "torch")
    picky = Backend("picky", portable.forward, portable.backward, refuses=lambda *args: "wants a Tuesday")
    absent = Backend(
        "absent", portable.forward, portable.backward, missing=lambda: "install absent: pip install absent"
    )
    op.add(picky)
    op.add(absent)
    try:
        with pytest.warns(SlowBackendWarning) as caught:
            want, _ = linear_scan(x, x)
        text = str(caught[0].message)
        assert "wants a Tuesday" in text and "pip install absent" in text
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got, _ = linear_scan(x, x)
        with backend("picky"), pytest.raises(BackendError, match="picky: wants a Tuesday"):
            linear_scan(x, x)
    finally:
        op.backends.remove(picky)
        op.backends.remove(absent)
    assert torch.equal(got, want)


def test_the_backward_keeps_the_forced_backend():
    op, x = OPS["linear_scan"], torch.rand(1, 3, 2, requires_grad=True)
    portable, calls = next(b for b in op.backends if b.name == "torch"), []

    def backward(*args):
        calls.append("marked")
        return portable.backward(*args)

    op.add(Backend("marked", portable.forward, backward))
    try:
        with backend("marked"):
            y, _ = linear_scan(x, x)
        y.sum().backward()
    finally:
        op.backends.pop(0)
    assert calls == ["marked"]


def test_activation_checkpointing():
    x = torch.rand(1, 3, 2, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(linear_scan(x, x)[0].sum(), x)
    got = torch.autograd.grad(checkpoint(linear_scan, x, x, use_reentrant=False)[0].sum(), x)
    assert torch.equal(got[0], want[0])


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


BAD = {
    "wrong axes": (lambda: linear_scan(zeros(3), zeros(1, 3, 2)), "linear_scan: a has shape"),
    "not a tensor": (lambda: fft_conv([1.0], zeros(2, 3)), "fft_conv: u is list, expected a tensor"),
    "lengths differ": (
        lambda: scan(zeros(1, 4, 2), zeros(1, 5, 2), zeros(2, 3), zeros(1, 4, 1, 3), zeros(1, 4, 1, 3)),
        r"selective_scan: delta has shape \(1, 5, 2\).*axis 1 is 5, not 4 \(T of u\)",
    ),
    "groups": (
        lambda: scan(zeros(1, 4, 3), zeros(1, 4, 3), zeros(3, 3), zeros(1, 4, 2, 3), zeros(1, 4, 1, 3)),
        "B has 2 groups, which do not divide D = 3",
    ),
    "complex map, real rates": (
        lambda: scan(
            zeros(1, 4, 3),
            zeros(1, 4, 3),
            zeros(3, 3),
            zeros(1, 4, 1, 3, dtype=torch.complex64),
            zeros(1, 4, 1, 3),
        ),
        "make A complex",
    ),
    "integers": (lambda: causal_conv1d(zeros(1, 4, 3, dtype=torch.int64), zeros(3, 4)), "x is torch.int64"),
    "activation": (lambda: causal_conv1d(zeros(1, 4, 3), zeros(3, 4), activation="gelu"), "expected None or 'silu'"),
    "ids and borders": (
        lambda: causal_conv1d(
            zeros(1, 4, 3), zeros(3, 4), cu_seqlens=torch.tensor([0, 4]), seq_idx=zeros(1, 4, dtype=torch.int32)
        ),
        "seq_idx together with cu_seqlens",
    ),
    "ids of another length": (
        lambda: causal_conv1d(zeros(1, 4, 3), zeros(3, 4), seq_idx=zeros(1, 5, dtype=torch.int32)),
        r"seq_idx has shape \(1, 5\), expected \(B, T\)",
    ),
    "state": (
        lambda: causal_conv1d(zeros(2, 4, 3), zeros(3, 4), initial_state=zeros(2, 3, 4)),
        r"initial_state is \(2, 3, 4\), expected \(2, 3, 3\): one state per row",
    ),
    "state rows of packed": (
        lambda: linear_scan(zeros(1, 4, 2), zeros(1, 4, 2), zeros(1, 2), cu_seqlens=torch.tensor([0, 1, 4])),
        r"expected \(2, 2\): one state per sequence",
    ),
    "borders": (
        lambda: linear_scan(zeros(1, 4, 2), zeros(1, 4, 2), cu_seqlens=torch.tensor([0, 3])),
        "must rise from 0 to the length 4",
    ),
    "borders fall": (
        lambda: linear_scan(zeros(1, 4, 2), zeros(1, 4, 2), cu_seqlens=torch.tensor([0, 3, 2, 4])),
        "must rise",
    ),
    "borders as floats": (
        lambda: linear_scan(zeros(1, 4, 2), zeros(1, 4, 2), cu_seqlens=torch.tensor([0.0, 4.0])),
        "expected int32 or int64",
    ),
    "packed batch": (
        lambda: linear_scan(zeros(2, 4, 2), zeros(2, 4, 2), cu_seqlens=torch.tensor([0, 4])),
        "the batch axis must be 1, got 2",
    ),
    "device": (
        lambda: linear_scan(zeros(1, 4, 2), zeros(1, 4, 2).to("meta")),
        "b is on meta, but a is on cpu",
    ),
    "chunk": (
        lambda: ssd(zeros(1, 4, 2, 3), zeros(1, 4, 2), zeros(2), zeros(1, 4, 1, 3), zeros(1, 4, 1, 3), chunk=0),
        "chunk is 0",
    ),
    "limits": (
        lambda: ssd(
            zeros(1, 4, 2, 3), zeros(1, 4, 2), zeros(2), zeros(1, 4, 1, 3), zeros(1, 4, 1, 3), dt_limit=(1.0, 0.5)
        ),
        "dt_limit is",
    ),
    "skip": (
        lambda: ssd(zeros(1, 4, 2, 3), zeros(1, 4, 2), zeros(2), zeros(1, 4, 1, 3), zeros(1, 4, 1, 3), zeros(2, 4)),
        r"D has shape \(2, 4\), expected",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, words = BAD[name]
    with pytest.raises(ArgumentError, match=words):
        call()


@pytest.mark.parametrize("run", ["empty batch", "empty time"])
def test_nothing_in_nothing_out(run):
    b, t = (0, 3) if run == "empty batch" else (2, 0)
    a = zeros(b, t, 4).requires_grad_()
    h, state = linear_scan(a, a)
    assert h.shape == (b, t, 4) and state.shape == (b, 4)
    y, state = scan(a, a, zeros(4, 3), zeros(b, t, 1, 3), zeros(b, t, 1, 3))
    assert y.shape == (b, t, 4) and state.shape == (b, 4, 3)
    y, state = ssd(zeros(b, t, 2, 3), zeros(b, t, 2), zeros(2), zeros(b, t, 1, 5), zeros(b, t, 1, 5))
    assert y.shape == (b, t, 2, 3) and state.shape == (b, 2, 3, 5)
    y, state = causal_conv1d(a, zeros(4, 3))
    assert y.shape == (b, t, 4) and state.shape == (b, 4, 2)
    assert fft_conv(a, zeros(4, 3)).shape == (b, t, 4)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("form", ["infer", "forward and backward"])
def test_states_of_all_times_are_never_held_at_once(form):
    """The portable scan's largest tensor is a fraction of ``(B, T, D, N)``."""
    length, width, states = 8192, 96, 16
    x, B = torch.rand(1, length, width), torch.rand(1, length, 1, states)
    a = SelectiveScan(x, x, -torch.rand(width, states), B, B, None, x, None, True, torch.zeros(1, width, states), None)
    portable = next(b for b in OPS["selective_scan"].backends if b.name == "torch")
    with torch.no_grad(), LargestTensor() as largest:
        if form == "infer":
            portable.infer(a)
        else:
            y, state, *saved = portable.forward(a)
            portable.backward([y, state], saved, a)
    assert 0 < largest.numel < length * width * states / 3
