"""Calls that ops refuse, or answer in memory of the caller's: derivatives, steps, and what comes past the functions."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad

from dualform.core.errors import ArgumentError, BackendError
from dualform.layers.mamba import MambaConfig
from dualform.layers.mlp import MLPConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.ops import OPS, backend, causal_conv1d_update, linear_scan, selective_state_update
from dualform.ops import selective_scan as scan
from dualform.ops.derivatives import floats
from dualform.ops.markov_filter import markov_filter
from dualform.ops.markov_path import markov_path
from dualform.ops.markov_smoother import markov_smoother
from dualform.ops.op import PREFERENCE
from op_calls import NAMES, case_of, dispatched

X = torch.randn(1, 4, 2, dtype=torch.float64)


def square(x):
    return linear_scan(x.sigmoid(), x)[0].square().sum()


def affine(b):
    return linear_scan(torch.full_like(b, 0.5), b)[0]


DERIVED = {
    "hvp": lambda: torch.autograd.functional.hvp(square, X, torch.ones_like(X))[1],
    "hessian": lambda: torch.autograd.functional.hessian(square, X),
    "jvp": lambda: torch.func.jvp(affine, (X,), (torch.ones_like(X),))[1],
    "jacfwd": lambda: torch.func.jacfwd(affine)(X),
    "grad": lambda: torch.func.grad(square)(X),
    "vmap": lambda: torch.func.vmap(affine)(torch.stack([X, 2 * X])),
    "forward_ad": lambda: forward_mode(affine, X),
}


def forward_mode(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # forward mode scripts its own decompositions
@pytest.mark.parametrize("name", DERIVED)
def test_other_derivatives_are_refused_or_right(name):
    """Kernels are refused with the way out; the reference, which PyTorch sees, gives what finite differences give."""
    with pytest.raises(BackendError, match=r"linear_scan: (.|\n)*backend\('reference'\)"):
        DERIVED[name]()
    with backend("reference"):
        found = DERIVED[name]()
    assert found.isfinite().all() and bool(found.any())


@pytest.mark.parametrize("part", [MambaConfig(d_state=4), MLPConfig(d_hidden=8)])
def test_a_second_derivative_of_the_loss_is_refused_or_right(part):
    model = LanguageModel(ModelConfig(11, 8, {"M": (part,)}, "M")).double()
    tokens, weight = torch.randint(11, (1, 6)), model.embed.weight

    def curvature(loss):
        (g,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(g.square().sum(), weight)[0]

    with pytest.raises(BackendError, match="second time"):
        curvature(model.loss(tokens))
    with backend("reference"):
        plain = torch.nn.functional.cross_entropy(model(tokens)[0][0, :-1], tokens[0, 1:])
        torch.testing.assert_close(curvature(model.loss(tokens)), curvature(plain))


def r(*shape):
    return torch.randn(*shape)


BAD_STEPS = {
    "no groups": (
        lambda: selective_state_update(r(2, 8, 16), r(2, 8), r(2, 8), -r(8, 16).abs(), r(2, 0, 16), r(2, 1, 16)),
        "B has 0 groups, which do not divide 8",
    ),
    "rows of B": (
        lambda: selective_state_update(r(2, 8, 16), r(2, 8), r(2, 8), -r(8, 16).abs(), r(3, 1, 16), r(2, 1, 16)),
        "B has shape .*axis 0 is 3, not 2",
    ),
    "rates": (
        lambda: selective_state_update(r(2, 8, 16), r(2, 8), r(2, 8), -r(4, 16).abs(), r(2, 1, 16), r(2, 1, 16)),
        r"A has shape \(4, 16\), expected \(8, 16\)",
    ),
    "integers": (
        lambda: selective_state_update(
            r(2, 8, 16), torch.ones(2, 8, dtype=torch.int64), r(2, 8), -r(8, 16).abs(), r(2, 1, 16), r(2, 1, 16)
        ),
        "x is torch.int64, expected a floating dtype",
    ),
    "complex skip": (
        lambda: scan(r(1, 4, 3), r(1, 4, 3), -r(3, 2).abs(), r(1, 4, 1, 2), r(1, 4, 1, 2), torch.ones(3) * 1j),
        "D is torch.complex64, expected a real dtype",
    ),
    "weights": (lambda: causal_conv1d_update(r(2, 8), r(2, 8, 3), r(4000, 4)), "weight has shape .*axis 0 is 4000"),
    "bias": (lambda: causal_conv1d_update(r(2, 8), r(2, 8, 3), r(8, 4), r(7)), "bias has shape .*axis 0 is 7, not 8"),
    "state": (
        lambda: causal_conv1d_update(r(2, 8), r(2, 8, 2), r(8, 4)),
        "state holds 2 inputs, expected at least 3: weight has 4 taps",
    ),
    "out_state": (
        lambda: causal_conv1d_update(r(2, 8), r(2, 8, 3), r(8, 4), out_state=r(2, 8, 4)),
        r"out_state is \(2, 8, 4\), expected \(2, 8, 3\)",
    ),
    "out_state while recording": (
        lambda: causal_conv1d_update(r(2, 8).requires_grad_(), r(2, 8, 3), r(8, 4), out_state=r(2, 8, 3)),
        "out_state cannot be written to while gradients are recorded",
    ),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_steps_are_named(name):
    call, words = BAD_STEPS[name]
    with pytest.raises(ArgumentError, match=words):
        call()


# Tensors whose first axis may have any size, and one that may have any at all.
ANY_BATCH = (("fft_conv", 2), ("linear", 2), ("quantized_linear", 2), ("head_step", 2), ("mlp_step", 2))
ANY_SIZE = ("attention_step", 9)  # the frequencies of the pairs that turn


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_checks_what_comes_past_the_public_function(name):
    """Every tensor in turn too short: a clear error, no number."""
    op, args = dispatched(case_of(name, 9), torch.float32)
    for i, m in enumerate(args):
        if isinstance(m, torch.Tensor) and m.numel() and (op.name, i) != ANY_SIZE:
            with pytest.raises((ArgumentError, BackendError)):
                by_row = m.shape[0] > 1 and (op.name, i) not in ANY_BATCH
                op._forward(*args[:i], m[:-1] if by_row else m[..., :-1], *args[i + 1 :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["torch", "native"])
@pytest.mark.parametrize("own", [False, True])
def test_a_step_writes_into_the_memory_it_is_given(dtype, name, own):
    """In its own dtype, rounded once; the state itself may be that memory."""
    if name == "native" and any(b.name == name and b.missing() for b in OPS["selective_state_update"].backends):
        pytest.skip("no C++ kernels")
    state, window = r(2, 6, 5).to(dtype), r(2, 6, 3).to(dtype)
    args = r(2, 6), r(2, 6), -r(6, 5).abs(), r(2, 2, 5), r(2, 2, 5)
    weight = r(6, 4)
    for step, given in (
        (lambda s, **more: selective_state_update(s, *args, **more), state),
        (lambda s, **more: causal_conv1d_update(args[0], s, weight, **more), window),
    ):
        with backend(name), torch.no_grad():
            want_y, want = step(given.clone())
            memory = given.clone() if own else torch.empty_like(given)
            y, found = step(memory if own else given.clone(), out_state=memory)
        assert found is memory and found.dtype == dtype and want.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(y, want_y)
        torch.testing.assert_close(found, want.to(dtype))


@pytest.mark.parametrize("name", ["linear_scan", "selective_scan", "ssd", "causal_conv1d", "diagonal_ssm complex"])
def test_a_wider_state_is_never_narrowed(name):
    case = case_of(name, 7)
    given = case.cast("cpu", torch.float32)
    given["initial_state"] = given["initial_state"].to(_wider(given["initial_state"].dtype))
    _, final = case.call(given)
    assert final.dtype == given["initial_state"].dtype


def _wider(dtype):
    return torch.complex128 if dtype.is_complex else torch.float64


def test_names_of_backends_are_known():
    with pytest.raises(BackendError, match=r"no op has a backend 'bogus'(.|\n)*known: "), backend("bogus"):
        pass
    command = [sys.executable, "-c", "import dualform.ops"]
    done = subprocess.run(command, env={**os.environ, "DUALFORM_BACKEND": "bogus"}, capture_output=True, text=True)
    assert done.returncode and "DUALFORM_BACKEND: no op has a backend 'bogus'" in done.stderr


def test_one_rule_of_preference():
    """It does not depend on the order in which backends were registered."""
    for op in OPS.values():
        known = [b.name for b in op.backends]
        assert known == sorted(known, key=PREFERENCE.index), op.name


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_asked_for(name):
    """None for what is not optional, or a list: named; all but the first, which gives the case its device."""
    case = case_of(name, 7)
    tensors = case.cast("cpu", torch.float32)
    if case.op in ("dplr_ssm", "attention_step"):
        pytest.skip("the case makes something of its tensors first")
    for field in list(tensors)[1:]:
        for value in (None, [1.0]):
            try:
                with backend("torch"):
                    case.call({**tensors, field: value})
            except ArgumentError as error:
                assert field.replace("past_", "past.") in str(error), error
            else:
                assert value is None, field  # an optional one


def test_a_complex_state_of_a_real_step_is_refused():
    with pytest.raises(ArgumentError, match=r"state is torch\.complex64, expected a real dtype"):
        causal_conv1d_update(r(2, 8), r(2, 8, 3) + 0j, r(8, 4))


@pytest.mark.parametrize("name", ["wkv4", "wkv7", "gla", "delta"])
def test_a_complex_state_of_a_real_scan_is_refused_inside_the_op(name):
    """Which a compiled program calls without the public function."""
    op, args = dispatched(case_of(name, 5), torch.float32)
    at = 2 + op.fields.index("h0")
    with pytest.raises(ArgumentError, match=r"h0 is torch\.complex64, expected a real dtype"):
        getattr(torch.ops.dualform, op.name)(*args[:at], args[at] + 0j, *args[at + 1 :])


def outputs_and_gradients(case, given, around=nullcontext):
    """Through whichever backend is chosen: what it returns within ``around()``, and the gradients of the sum."""
    leaves = {k: m.clone().requires_grad_() if floats(m) else m for k, m in given.items()}
    with around():
        out = case.call(leaves)
    out = list(out) if isinstance(out, tuple) else [out]
    roots = [y for y in out if y.requires_grad]
    wanted = [m for m in leaves.values() if m.requires_grad]
    found = torch.autograd.grad(roots, wanted, [torch.ones_like(y) for y in roots], allow_unused=True)
    return [*out, *(m for m in found if m is not None)]


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing_inside(name):
    """Not in a backend, in no gradient that is its own, and not in the reference."""
    case = case_of(name, 9)
    op = OPS[case.op]
    given = case.cast("cpu", torch.float32)

    def run(autocast, name):
        with backend(name):
            return outputs_and_gradients(case, given, lambda: torch.autocast("cpu", torch.bfloat16, enabled=autocast))

    for each in ["reference", *(b.name for b in op.backends if b.runs_on("cpu") and not b.missing())]:
        try:
            want = run(False, each)
        except BackendError:
            continue  # another one runs this call
        for got, exact in zip(run(True, each), want, strict=True):
            torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("name", NAMES)
def test_a_product_of_matrices_may_lie_in_any_order(name, monkeypatch):
    """As cuBLAS sometimes writes it: with its rows contiguous, or its columns."""
    case = case_of(name, 70)
    given = case.cast("cpu", torch.float64)
    with backend("torch"):
        want = outputs_and_gradients(case, given)
        product = torch.Tensor.__matmul__
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: by_columns(product(a, b)))
        got = outputs_and_gradients(case, given)
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours, exact)


def by_columns(m):
    return m.mT.contiguous().mT if m.dim() > 1 else m


def test_passes_over_a_chain_name_what_is_no_tensor():
    chain = r(2, 4, 3, 3), r(2, 5, 3)
    for call, name in ((markov_filter, "start"), (markov_path, "start"), (markov_smoother, "p")):
        for value in (None, [1.0]):
            with pytest.raises(ArgumentError, match=rf"{name} is {type(value).__name__}, expected a tensor"):
                call(value, *chain)


def test_the_most_likely_path_compiles():
    given = r(2, 3), r(2, 4, 3, 3), r(2, 5, 3)
    path, score = torch.compile(lambda *a: markov_path(*a), backend="eager", fullgraph=True)(*given)
    want = markov_path(*given)
    assert torch.equal(path, want.path) and torch.equal(score, want.score)
