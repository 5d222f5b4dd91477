"""The norms: against recorded numbers and loops; rounded once; small, compiled or transformed; what they keep."""

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, BackendError, ConfigError
from dualform.layers.norm import GatedRMSNorm, RMSNorm
from dualform.ops import OPS, add_norm, backend, gated_norm
from dualform.ops.native import library
from vectors import close, load


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("groups, size", [(1, 0), (3, 4)])
def test_golden(dtype: torch.dtype, tolerance: float, before: bool, groups: int, size: int) -> None:
    case = load("gated_rms_norm")
    norm = GatedRMSNorm(12, groups, norm_before_gate=before).to(dtype)
    norm.load_state_dict({"weight": case["weight"]})
    got = norm(case["x"].to(dtype), case["z"].to(dtype))
    assert got.dtype == dtype
    close(got, case[f"norm_before_gate_{int(before)}_group_{size}"], tolerance)


def test_computed_in_float32_and_returned_in_the_dtype_that_came() -> None:
    norm, y, z = GatedRMSNorm(8, 2), torch.randn(3, 8).bfloat16() * 1e-3, torch.randn(3, 8).bfloat16()
    want = norm(y.float(), z.float())
    for module in (norm, GatedRMSNorm(8, 2).bfloat16()):
        got = module(y, z)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want.bfloat16())


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="width 6 is not a multiple of groups 4"):
        GatedRMSNorm(6, 4)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def loop(v: Tensor, weight: Tensor, bias: Tensor, eps: float, center: bool, groups: int = 1) -> Tensor:
    """Number by number, as the papers have it."""
    rows, size, out = v.reshape(-1, v.shape[-1]), v.shape[-1] // groups, []
    for row in rows.tolist():
        for g in range(groups):
            part = row[g * size : (g + 1) * size]
            mean = sum(part) / size if center else 0.0
            root = math.sqrt(sum((x - mean) ** 2 for x in part) / size + eps)
            out += [(x - mean) / root for x in part]
    return torch.tensor(out, dtype=torch.float64).view(v.shape) * weight + bias


BACKENDS = [
    "reference",
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(bool(library.missing), reason="none")),
]


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_definition_is_that_of_the_papers(name: str, center: bool) -> None:
    x, residual, z, weight, bias = normal(2, 3, 6), normal(2, 3, 6), normal(2, 3, 6), normal(6), normal(6)
    gate = z / (1 + (-z).exp())
    with backend(name):
        y, r = add_norm(x, residual, weight, bias, eps=0.1, center=center)
        before = gated_norm(x, weight, bias, z=z, groups=2, eps=0.1, center=center)
        behind = gated_norm(x, weight, bias, z=z, groups=3, eps=0.1, center=center, norm_before_gate=True)
        alone = gated_norm(x, weight, bias, eps=0.1, center=center)
    close(r, x + residual, 1e-12)
    close(y, loop(x + residual, weight, bias, 0.1, center), 1e-12)
    close(before, loop(x * gate, weight, bias, 0.1, center, 2), 1e-12)
    close(behind, loop(x, weight, bias, 0.1, center, 3) * gate, 1e-12)
    close(alone, loop(x, weight, bias, 0.1, center), 1e-12)


@pytest.mark.parametrize("dtype, unit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_sixteen_bits_are_rounded_once(name: str, dtype: torch.dtype, unit: float) -> None:
    x, residual, z, weight = (normal(*shape, dtype=dtype) for shape in ((40, 35), (40, 35), (40, 35), (35,)))
    exact = [m.double() for m in (x, residual, weight)]
    with backend(name):
        got = [*add_norm(x, residual, weight, residual_dtype=dtype), gated_norm(x, weight, z=z)]
    with backend("reference"):
        want = [*add_norm(*exact), gated_norm(exact[0], exact[2], z=z.double())]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert ((a.double() - b).abs() <= 1.001 * unit * b.abs() + 1e-6).all()


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_dtypes_of_the_stream_and_of_the_norm(name: str, kept: torch.dtype) -> None:
    """The gradients are those of the exact sum, whether or not the sum that is kept was rounded."""
    given = normal(9, 33, dtype=torch.bfloat16), normal(9, 33, dtype=torch.float32), normal(33, dtype=torch.float32)

    def run(name: str, *given: Tensor) -> list[Tensor]:
        leaves = [m.clone().requires_grad_() for m in given]
        with backend(name):
            y, r = add_norm(*leaves, dtype=given[0].dtype, residual_dtype=kept)
        assert (y.dtype, r.dtype) == (given[0].dtype, kept)
        torch.manual_seed(1)
        return [y, r, *torch.autograd.grad([y, r], leaves, [torch.randn_like(y.float()).to(m.dtype) for m in (y, r)])]

    got, want = run(name, *given), run("reference", *given)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 5), (0,)])
@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_in_nothing_out(name: str, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    with backend(name):
        y, r = add_norm(x, x, weight)
        gated = gated_norm(x, weight, z=x)
    found = torch.autograd.grad([y.sum() + r.sum() + gated.sum()], [x, weight])
    assert y.shape == r.shape == gated.shape == shape and not found[1].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_not_finite_stays_in_its_row(name: str, value: float) -> None:
    x, residual, z, weight = normal(5, 35), normal(5, 35), normal(5, 35), normal(35)
    dy, dr = normal(5, 35), normal(5, 35)

    def run(*given: Tensor) -> list[Tensor]:
        x, residual, z, dy, dr = (m.clone() for m in given)
        leaves = [m.requires_grad_() for m in (x, residual, z)]
        with backend(name):
            found = []
            for center in (False, True):
                y, r = add_norm(x, residual, weight, center=center)
                found += [y, r, *torch.autograd.grad([y, r], leaves[:2], [dy, dr])]
                for before in (False, True):
                    y = gated_norm(x, weight, z=z, groups=5, center=center, norm_before_gate=before)
                    found += [y, *torch.autograd.grad(y, [x, z], dy)]
        return found

    given = [x, residual, z, dy, dr]
    want, others = run(*given), [0, 1, 3, 4]
    for i in range(len(given)):
        planted = [m.clone() for m in given]
        planted[i][2, 7] = value
        for a, b in zip(run(*planted), want, strict=True):
            assert torch.equal(a[others], b[others])


def test_a_stream_in_blocks() -> None:
    """Small or large, the norm of a sum and the sum itself, in the dtypes that plain PyTorch gives them."""
    for rows in (3, 2000):
        for part, weights in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
            norm, x, stream = (
                RMSNorm(33).to(weights),
                normal(rows, 33, dtype=part),
                normal(rows, 33, dtype=torch.float32),
            )
            y, r = norm(x, stream)
            assert (y.dtype, r.dtype) == (weights, torch.float32) and torch.equal(r, stream + x)
            want = torch.nn.functional.rms_norm(r, (33,), norm.weight.float(), 1e-5).to(weights)
            torch.testing.assert_close(y, want)
            torch.testing.assert_close(norm(r), want)


def test_large_ones_run_on_the_op_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("add_norm", "gated_norm"):
        module, op = sys.modules[f"dualform.ops.{name}"], OPS[name]
        monkeypatch.setattr(module, f"{name}_op", lambda a, op=op: seen.append(op.name) or op(a))
    norm = RMSNorm(64)
    norm(torch.randn(2, 64)), norm(torch.randn(2, 64), torch.randn(2, 64))
    assert not seen
    norm(torch.randn(1100, 64)), norm(torch.randn(1100, 64), torch.randn(1100, 64))
    assert seen == ["gated_norm", "add_norm"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # forward mode scripts its own decompositions
def test_derivatives() -> None:
    """Of any order in the reference; transforms see PyTorch's own operations; our second derivative is refused."""
    x, weight = normal(3, 5), normal(5)

    def norms(x: Tensor) -> Tensor:
        return gated_norm(add_norm(x, 2 * x, weight, center=True)[0], weight, z=x)

    want = torch.autograd.functional.jacobian(norms, x)
    torch.testing.assert_close(torch.func.jacfwd(norms)(x), want)
    torch.testing.assert_close(torch.func.vmap(norms)(x), norms(x))
    with backend("reference"):
        assert torch.autograd.gradgradcheck(norms, x.clone().requires_grad_())
    if not library.missing:
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(add_norm(leaf, leaf, weight)[1].square().sum(), leaf, create_graph=True)
        with pytest.raises(BackendError, match="add_norm: its gradient cannot be differentiated a second time"):
            g.sum().backward()


@pytest.mark.skipif(bool(library.missing), reason="there are no CPU kernels")
def test_a_summand_is_not_kept() -> None:
    """The backward starts from the sum, so the memory of what was added is free."""
    x, stream, weight = (torch.randn(*shape, requires_grad=True) for shape in ((50, 33), (50, 33), (33,)))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda m: kept.append(m.untyped_storage().nbytes()) or m, lambda m: m
    ):
        add_norm(x, stream, weight)
    assert sum(kept) == 4 * (50 * 33 + 33)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda m: kept.append(m.untyped_storage().nbytes()) or m, lambda m: m
    ):
        add_norm(x, stream, weight, residual_dtype=torch.bfloat16)
    assert len(kept) == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of the compiler itself
def test_compiled_and_exported_for_every_length() -> None:
    """In PyTorch's own operations; with a backend that was asked for, as one operator."""

    class Norms(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gated = RMSNorm(6), GatedRMSNorm(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y, r = self.first(x, x)
            return self.gated(y, r)

    module, lengths = Norms().double(), {"x": {1: torch.export.Dim("length", min=1, max=10**6)}}
    x = normal(2, 2000, 6)
    program = torch.export.export(module, (x,), dynamic_shapes=lengths)
    assert "dualform" not in str(program.graph)
    torch.testing.assert_close(program.module()(x[:, :5]), module(x[:, :5]))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for name in ("", "torch"):
        with backend(name):
            for length in (2000, 3):
                leaf = x[:, :length].clone().requires_grad_()
                got, want = compiled(leaf), module(leaf)
                torch.testing.assert_close(got, want)
                torch.testing.assert_close(
                    *(torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()]) for y in (got, want))
                )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: add_norm(x, x[:1], x[0]), r"add_norm: residual has shape \(1, 6\), expected \(2, 6\)"),
        (lambda x: add_norm(x, x, x[0, :5]), r"add_norm: x has shape \(2, 6\), expected \(2, 5\)"),
        (lambda x: add_norm(x, None, x[0]), "add_norm: residual is NoneType"),
        (lambda x: add_norm(x, x, x[0], eps=-1.0), r"add_norm: eps is -1\.0, expected"),
        (lambda x: add_norm(x, x, x[0], eps=x[0, :1]), r"add_norm: eps is tensor.*, expected"),
        (lambda x: add_norm(x, x, x[0], dtype=torch.int32), r"add_norm: dtype is torch\.int32, expected a floating"),
        (lambda x: gated_norm(x, x[0], groups=4), "gated_norm: groups is 4, which does not divide D = 6"),
        (lambda x: gated_norm(x, x[0], z=x[:, :3]), r"gated_norm: z has shape \(2, 3\), expected \(2, 6\)"),
        (lambda x: gated_norm(x, x[0], x), "gated_norm: bias has shape"),
        (lambda x: gated_norm(x * 1j, x[0]), r"gated_norm: x is torch\.complex64, expected a real dtype"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[Tensor], object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        call(torch.randn(2, 6))
