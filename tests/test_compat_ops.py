"""The operators of mamba-ssm and causal-conv1d against plain loops in float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.compat import scan_kernel
from dualform.compat.conv import causal_conv1d_fn, causal_conv1d_ref, causal_conv1d_varlen_states
from dualform.compat.conv_update import causal_conv1d_update, causal_conv1d_update_ref
from dualform.compat.inner import bimamba_inner_fn, mamba_inner_fn, mamba_inner_fn_no_out_proj, mamba_inner_ref
from dualform.compat.scan import selective_scan_fn, selective_scan_ref
from dualform.compat.ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from dualform.compat.step import selective_state_update, selective_state_update_ref
from dualform.core.errors import ArgumentError
from vectors import close, load, names

pytestmark = pytest.mark.filterwarnings("ignore:.*slower backend")  # for complex rates
B, D, T, N, G = 2, 6, 7, 3, 2


def real(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def same(got: Tensor | tuple, want: Tensor | tuple, *inputs: Tensor | None) -> None:
    """Equal outputs, and equal gradients of every input."""
    got, want = ((m,) if isinstance(m, Tensor) else m for m in (got, want))
    leaves = [m for m in inputs if m is not None and m.requires_grad]
    weights = [torch.randn_like(m) for m in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    if leaves:
        ours, theirs = (
            torch.autograd.grad(
                sum((m * w).sum() for m, w in zip(ms, weights, strict=True)),
                leaves,
                retain_graph=True,
                allow_unused=True,
            )
            for ms in (got, want)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, ids: Tensor | None = None, past: Tensor | None = None
) -> Tensor:
    """A loop over steps and taps; taps of another sequence and padding are skipped."""
    batch, _, length = x.shape
    width, rows = weight.shape[1], []
    for b in range(batch):
        steps = []
        for t in range(length):
            y = torch.zeros_like(x[b, :, 0]) if bias is None else bias
            for j in range(width):
                at = t - (width - 1) + j
                if at < 0:
                    y = y if past is None else y + weight[:, j] * past[b, :, at]
                elif ids is None or ids[b, at] == ids[b, t]:
                    y = y + weight[:, j] * x[b, :, at]
            y = F.silu(y) if silu else y
            steps.append(torch.zeros_like(y) if ids is not None and ids[b, t] < 0 else y)
        rows.append(torch.stack(steps, -1))
    return torch.stack(rows)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("width", "activation"), [(1, None), (2, "silu"), (3, "swish"), (4, "silu"), (4, None)])
def test_convolution(width, activation, with_bias):
    x, weight, bias = real(B, D, T), real(D, width), real(D) if with_bias else None
    same(
        causal_conv1d_fn(x, weight, bias, activation=activation),
        convolved(x, weight, bias, activation is not None),
        x,
        weight,
        bias,
    )


@pytest.mark.parametrize("function", [causal_conv1d_fn, causal_conv1d_ref])
def test_convolution_with_states(function):
    x, weight, bias, past = real(B, D, 2), real(D, 4), real(D), real(B, D, 3)
    got = function(x, weight, bias, initial_states=past, return_final_states=True, activation="silu")
    want = convolved(x, weight, bias, True, past=past), torch.cat([past, x], -1)[..., -3:]
    same(got, want, x, weight, bias, past)
    memory = torch.empty(B, D, 3, dtype=torch.float64)
    _, final = causal_conv1d_fn(
        x.detach(), weight.detach(), return_final_states=True, final_states_out=memory, activation=None
    )
    assert final is memory
    torch.testing.assert_close(memory, F.pad(x.detach(), (1, 0)))


def test_convolution_of_marked_sequences():
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, -1], [5, 3, 3, 3, 3, -1, -1]], dtype=torch.int32)
    x, weight, bias = real(B, D, T), real(D, 3), real(D)
    same(
        causal_conv1d_fn(x, weight, bias, seq_idx=ids, activation="silu"),
        convolved(x, weight, bias, True, ids),
        x,
        weight,
        bias,
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_result_lies_in_memory_as_its_input(channels_last):
    x = torch.randn(B, T, D).transpose(1, 2) if channels_last else torch.randn(B, D, T)
    scanned = selective_scan_fn(x, x, -torch.rand(D, N), torch.randn(B, N, T), torch.randn(B, N, T))
    for y in (causal_conv1d_fn(x, torch.randn(D, 3)), scanned):
        assert y.stride() == x.stride()


@pytest.mark.parametrize("state_len", [3, 5])
@pytest.mark.parametrize("steps", [None, 1, 2, 7])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_of_the_convolution(state_len, steps, ring, dtype):
    x = real(B, D, steps or 1, grad=False).to(dtype)
    state = real(B, D, state_len, grad=False).to(dtype)
    weight, bias = real(D, 4, grad=False).to(dtype), real(D, grad=False).to(dtype)
    places = torch.tensor([2, 9], dtype=torch.int32) if ring else None
    line, want = state.double().clone(), state.clone()
    if places is not None:  # oldest first
        line = torch.stack([s.roll(-int(p), -1) for s, p in zip(line, places, strict=True)])
    past, news = line[..., -3:], torch.cat([line, x.double()], -1)[..., -state_len:]
    want.copy_(news)
    if places is not None:
        ends = [int(p) + x.shape[2] for p in places]
        want = torch.stack([w.roll(e, -1) for w, e in zip(want, ends, strict=True)])
    y = causal_conv1d_update(x if steps else x[..., 0], state, weight, bias, "silu", cache_seqlens=places)
    expected = convolved(x.double(), weight.double(), bias.double(), True, past=past)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y, (expected if steps else expected[..., 0]).to(dtype), atol=tolerance, rtol=tolerance)
    assert torch.equal(state, want)


def test_steps_of_the_convolution_in_rows_of_a_table():
    table, weight, x = real(5, D, 4, grad=False), real(D, 3, grad=False), real(4, D, grad=False)
    before, rows = table.clone(), torch.tensor([3, -1, 0, -1], dtype=torch.int32)
    y = causal_conv1d_update(x, table, weight, conv_state_indices=rows)
    for row, at in ((0, 3), (2, 0)):
        state = before[at : at + 1].clone()
        torch.testing.assert_close(y[row], causal_conv1d_update_ref(x[row : row + 1], state, weight)[0])
        torch.testing.assert_close(table[at], state[0])
    assert torch.equal(table[[1, 2, 4]], before[[1, 2, 4]])
    assert not y[[1, 3]].any()
    before = table.clone()
    assert not causal_conv1d_update(x, table, weight, conv_state_indices=torch.full((4,), -1)).any()
    assert torch.equal(table, before)


def test_states_of_sequences_laid_end_to_end():
    x = real(6, D, grad=False)
    got = causal_conv1d_varlen_states(x, torch.tensor([0, 1, 1, 6]), 4)
    want = torch.stack([F.pad(x[:1].T, (3, 0)), torch.zeros(D, 4, dtype=torch.float64), x[2:6].T])
    assert torch.equal(got, want)


def scanned(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,  # (B, D, N, T)
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    delta = F.softplus(delta) if softplus else delta
    h = torch.zeros(*u.shape[:2], A.shape[1], dtype=A.dtype)
    ys = []
    for t in range(u.shape[2]):
        h = (delta[..., t, None] * A).exp() * h + (delta[..., t] * u[..., t])[..., None] * B[..., t]
        y = (h * C[..., t]).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(ys, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("b_form", ["constant", "variable", "groups"])
@pytest.mark.parametrize("c_form", ["constant", "variable", "groups"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_scan(full, b_form, c_form, is_complex):
    u, delta = real(B, D, T), real(B, D, T)
    A = (
        torch.complex(-torch.rand(D, N).double(), torch.randn(D, N).double())
        if is_complex
        else -torch.rand(D, N).double()
    )
    A.requires_grad_()
    skip, z, bias = (real(D), real(B, D, T), real(D)) if full else (None, None, None)

    def given(form: str) -> Tensor:
        if form == "constant":
            return torch.randn(D, N, dtype=A.dtype, requires_grad=True)
        return real(B, *((G,) if form == "groups" else ()), N, (2 if is_complex else 1) * T)

    def whole(m: Tensor) -> Tensor:
        """``(B, D, N, T)``."""
        if m.dim() == 2:
            return m[None, :, :, None].expand(B, D, N, T)
        m = m[:, None] if m.dim() == 3 else m
        m = torch.view_as_complex(m.unflatten(-1, (-1, 2))) if is_complex else m
        return m.repeat_interleave(D // m.shape[1], 1)

    maps = [given(form) for form in (b_form, c_form)]
    y, state = selective_scan_fn(u, delta, A, *maps, skip, z, bias, full, return_last_state=True)
    steps = delta if bias is None else delta + bias[:, None]
    want, final = scanned(u, steps, A, whole(maps[0]), whole(maps[1]), skip, z, full)
    states = [torch.view_as_real(m) if is_complex else m for m in (state, final)]
    same((y, states[0]), (want, states[1]), u, delta, A, *maps, skip, z, bias)
    torch.testing.assert_close(selective_scan_ref(u, delta, A, *maps, skip, z, bias, full), want)


@pytest.mark.parametrize("case", names("selective_scan_"))
def test_scan_equals_recorded_numbers(case):
    g = load(case)
    is_complex = "complex" in case
    A = torch.view_as_complex(g["A"]) if is_complex else g["A"]
    B, C = (torch.view_as_complex(m) if is_complex and m.shape[-1] == 2 else m for m in (g["B"], g["C"]))
    softplus = case not in {
        "selective_scan_real_const",
        "selective_scan_real_constB_varC",
        "selective_scan_complex_const",
    }
    y, last = selective_scan_fn(
        g["u"], g["delta"], A, B, C, g.get("D"), g.get("z"), g.get("delta_bias"), softplus, True
    )
    close(y, g["out"], 1e-10, "y")
    close(torch.view_as_real(last) if is_complex else last, g["last_state"], 1e-10, "state")


class Copied(torch.autograd.Function):
    """The scan as copies of mamba-ssm's Python call the compiled module."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias):
        out, x, *rest = scan_kernel.fwd(u, delta, A, B, C, D, z, bias, True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, x, out)
        ctx.last = x[:, :, -1, 1::2]
        return rest[0] if z is not None else out, ctx.last.clone()

    @staticmethod
    def backward(ctx, dout, _):
        *inputs, x, out = ctx.saved_tensors
        u, delta, A, B, C, D, z, bias = inputs
        dz = None if z is None else torch.empty_like(z)
        found = scan_kernel.bwd(u, delta, A, B, C, D, z, bias, dout, x, out, dz, True, True)
        du, ddelta, dA, dB, dC, dD, dbias = found[:7]
        assert z is None or found[7] is dz
        assert len(found) == (7 if z is None else 9)
        return du, ddelta, dA, dB, dC, dD, dz, dbias


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_copies_that_call_the_compiled_module(full, constant):
    u, delta, A = real(B, D, T), real(B, D, T), (-torch.rand(D, N)).double().requires_grad_()
    b, c = real(D, N) if constant else real(B, G, N, T), real(B, G, N, T)
    skip, z, bias = (real(D), real(B, D, T), real(D)) if full else (None, None, None)
    got, last = Copied.apply(u, delta, A, b, c, skip, z, bias)
    want, final = selective_scan_fn(u, delta, A, b, c, skip, z, bias, True, return_last_state=True)
    same(got, want, u, delta, A, b, c, skip, z, bias)
    torch.testing.assert_close(last, final)


@pytest.mark.parametrize("given", ["", "B", "C", "BC"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_inner(given, is_complex):
    parts, rank, width = N * (2 if is_complex else 1), 2, 5
    xz, conv, bias = real(B, 2 * D, T), real(D, 1, 3), real(D)
    proj, dt_proj = real(rank + parts * (2 - len(given)), D), real(D, rank)
    out, out_bias, skip, dt_bias = real(width, D), real(width), real(D), real(D)
    A = (
        torch.complex(-torch.rand(D, N).double(), torch.randn(D, N).double())
        if is_complex
        else -torch.rand(D, N).double()
    )
    fixed = {name: torch.randn(D, N, dtype=A.dtype) for name in given}
    biases = {f"{name}_proj_bias": real(parts) for name in "BC" if name not in given}

    x, z = xz.chunk(2, 1)
    x = convolved(x, conv[:, 0], bias, True)
    made = torch.einsum("rd,bdt->brt", proj, x)
    steps = torch.einsum("dr,brt->bdt", dt_proj, made[:, :rank]) + dt_bias[:, None]
    maps, at = [], rank
    for name in "BC":
        if name in given:
            maps.append(fixed[name][None, :, :, None].expand(B, D, N, T))
            continue
        m = made[:, at : at + parts] + biases[f"{name}_proj_bias"][:, None]
        at += parts
        m = torch.complex(m[:, 0::2], m[:, 1::2]) if is_complex else m
        maps.append(m[:, None].expand(B, D, N, T))
    y, _ = scanned(x, steps, A, *maps, skip, z, True)
    want = torch.einsum("md,bdt->btm", out, y) + out_bias

    rest = {"D": skip, "delta_bias": dt_bias, **fixed, **biases}
    got = mamba_inner_fn(xz, conv, bias, proj, dt_proj, out, out_bias, A, **rest)
    same(got, want, xz, conv, bias, proj, dt_proj, out, out_bias, skip, dt_bias, *biases.values())
    torch.testing.assert_close(mamba_inner_ref(xz, conv, bias, proj, dt_proj, out, out_bias, A, **rest), want)
    same(mamba_inner_fn_no_out_proj(xz, conv, bias, proj, dt_proj, A, **rest), y, xz, proj)

    rates = 2 * A
    back, _ = scanned(x.flip(-1), steps.flip(-1), rates, *(m.flip(-1) for m in maps), skip, z.flip(-1), True)
    want = torch.einsum("md,bdt->btm", out, y + back.flip(-1))
    same(bimamba_inner_fn(xz, conv, bias, proj, dt_proj, out, None, A, rates, **rest), want, xz, conv, proj, out)


def test_inner_with_norms():
    xz, conv, proj, dt_proj, out = real(B, 2 * D, T), real(D, 1, 2), real(2 + 2 * N, D), real(D, 2), real(4, D)
    A, weights = -torch.rand(D, N).double(), [real(N), real(N), real(D)]
    x, z = xz.chunk(2, 1)
    x = convolved(x, conv[:, 0], None, True)
    low, b, c = torch.einsum("rd,bdt->brt", proj, x).split([2, N, N], 1)

    def rms(m: Tensor, weight: Tensor) -> Tensor:
        return m / (m.square().mean(1, keepdim=True) + 1e-3).sqrt() * weight[:, None]

    steps = torch.einsum("dr,brt->bdt", dt_proj, low)
    b, c, steps = (rms(m, w) for m, w in zip((b, c, steps), weights, strict=True))
    y, _ = scanned(x, steps, A, b[:, None].expand(B, D, N, T), c[:, None].expand(B, D, N, T), None, z, False)
    got = mamba_inner_fn(
        xz,
        conv,
        None,
        proj,
        dt_proj,
        out,
        None,
        A,
        delta_softplus=False,
        b_rms_weight=weights[0],
        c_rms_weight=weights[1],
        dt_rms_weight=weights[2],
        b_c_dt_rms_eps=1e-3,
    )
    same(got, torch.einsum("md,bdt->btm", out, y), xz, conv, proj, dt_proj, out, *weights)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_step_of_the_scan(by_head, grouped, full, dtype):
    inner, width = ((4, 3), N) if by_head else ((D,), N)
    state, x, dt = (real(B, *inner, *more, grad=False).to(dtype) for more in ((width,), (), ()))
    A = -torch.rand(*inner, width).to(dtype)
    maps = [real(B, *((2,) if grouped else ()), width, grad=False).to(dtype) for _ in "BC"]
    skip, z, bias = (real(*s, grad=False).to(dtype) for s in (inner, (B, *inner), inner)) if full else (None,) * 3
    steps = dt.double() if bias is None else dt.double() + bias.double()
    steps = F.softplus(steps) if full else steps
    b, c = (m.double() if grouped else m.double()[:, None] for m in maps)
    b, c = (m.repeat_interleave(inner[0] // m.shape[1], 1) for m in (b, c))
    b, c = (m[:, :, None] if by_head else m for m in (b, c))
    h = (steps[..., None] * A.double()).exp() * state.double() + (steps * x.double())[..., None] * b
    want = (h * c).sum(-1)
    want = want if skip is None else want + skip.double() * x.double()
    want = want if z is None else want * F.silu(z.double())
    for function in (selective_state_update, selective_state_update_ref):
        memory = state.clone()
        y = function(memory, x, dt, A, *maps, skip, z, bias, full)
        tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 0.05, "rtol": 0.02}
        torch.testing.assert_close(y, want.to(dtype), **tolerance)
        torch.testing.assert_close(memory, h.to(dtype), **tolerance)


def test_one_step_with_one_rate_for_each_head():
    state, x = real(B, 4, 3, N, grad=False), real(B, 4, 3, grad=False)
    dt, rates, skip, bias = real(B, 4, grad=False), -torch.rand(4).double(), real(4, grad=False), real(4, grad=False)
    maps, other = [real(B, 2, N, grad=False) for _ in "BC"], state.clone()
    wide = dt[..., None].expand(B, 4, 3), rates[:, None, None].expand(4, 3, N)
    heads = [m[:, None].expand(4, 3) for m in (skip, bias)]
    y = selective_state_update(state, x, *wide, *maps, heads[0], dt_bias=heads[1], dt_softplus=True)
    wide = [m.contiguous() for m in wide]
    heads = [m.contiguous() for m in heads]
    want = selective_state_update_ref(other, x, *wide, *maps, heads[0], dt_bias=heads[1], dt_softplus=True)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(state, other)


def test_one_step_in_rows_of_a_table():
    table, x, dt = real(5, D, N, grad=False), real(3, D, grad=False), real(3, D, grad=False)
    A, maps = -torch.rand(D, N).double(), [real(3, N, grad=False) for _ in "BC"]
    before, picked = table.clone(), table[[4, 1]].clone()
    y = selective_state_update(table, x, dt, A, *maps, state_batch_indices=torch.tensor([4, -1, 1]))
    want = selective_state_update(picked, x[[0, 2]], dt[[0, 2]], A, *(m[[0, 2]] for m in maps))
    torch.testing.assert_close(y[[0, 2]], want)
    torch.testing.assert_close(table[[4, 1]], picked)
    assert not y[1].any() and torch.equal(table[[0, 2, 3]], before[[0, 2, 3]])


@pytest.mark.parametrize("case", names("selective_state_update_"))
def test_one_step_equals_recorded_numbers(case):
    g = load(case)
    state = g["state"].clone()
    y = selective_state_update(state, *(g[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")), True)
    close(y, g["out"], 1e-10, "y")
    close(state, g["state_out"], 1e-10, "state")


def dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    ids: Tensor | None = None,
    h0: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs, states after each row, and states after every step."""
    batch, length, heads, width = x.shape
    B, C = (m.repeat_interleave(heads // m.shape[2], 2) for m in (B, C))
    h = x.new_zeros(batch, heads, width, B.shape[3]) if h0 is None else h0
    ys, states = [], []
    for t in range(length):
        if ids is not None and t:
            h = h * (ids[:, t] == ids[:, t - 1])[:, None, None, None]
        decay = (dt[:, t] * A).exp()[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
        states.append(h)
    return torch.stack(ys, 1), h, states


IDS = torch.tensor([[0, 0, 0, 1, 2, 2, 2], [4, 3, 3, 3, 3, 9, 9]], dtype=torch.int32)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("by_channel", [False, True])
def test_dual_scan(marked, full, by_channel):
    x, dt, A = real(B, T, 4, 3), real(B, T, 4), (-torch.rand(4)).double().requires_grad_()
    maps, h0 = [real(B, T, G, N) for _ in "BC"], real(B, 4, 3, N)
    skip, z, bias = (real(4, 3) if by_channel else real(4), real(B, T, 4, 3), real(4)) if full else (None,) * 3
    steps = dt if bias is None else dt + bias
    steps = F.softplus(steps).clamp(0.4, 1.2) if full else steps.clamp(0.0)
    y, final, _ = dual(x, steps, A, *maps, IDS if marked else None, h0)
    y = y if skip is None else y + (skip if by_channel else skip[:, None]) * x
    y = y if z is None else y * F.silu(z)
    got = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        *maps,
        chunk_size=4,
        D=skip,
        z=z,
        dt_bias=bias,
        initial_states=h0,
        seq_idx=IDS if marked else None,
        dt_softplus=full,
        dt_limit=(0.4, 1.2) if full else (0.0, float("inf")),
        return_final_states=True,
    )
    same(got, (y, final), x, dt, A, *maps, h0, skip, z, bias)


@pytest.mark.gpu
def test_runs_of_a_split_scan_take_no_synchronisation():
    zxbcdt = torch.randn(2, 70, 2 * 32 + 2 * 16 + 2, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = (torch.arange(70, device="cuda", dtype=torch.int32) // 9 % 3).expand(2, 70)
    conv, one = torch.randn(64, 4, device="cuda", dtype=torch.bfloat16), torch.ones(2, device="cuda")

    def run():
        y = mamba_split_conv1d_scan_combined(zxbcdt, conv, None, one, -one, one, 64, seq_idx=ids, headdim=16)
        assert isinstance(y, torch.Tensor)
        torch.autograd.grad(y.float().sum(), zxbcdt)

    run()  # compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dual_scan_of_sequences_laid_end_to_end():
    x, dt, A, maps = (
        real(1, T, 4, 3),
        torch.rand(1, T, 4).double(),
        -torch.rand(4).double(),
        [real(1, T, 1, N) for _ in "BC"],
    )
    y, final, states = dual(x, dt, A, *maps, IDS[:1])
    got = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        *maps,
        chunk_size=256,
        seq_idx=IDS[:1],
        cu_seqlens=torch.tensor([0, 3, 4, 7], dtype=torch.int32),
        return_final_states=True,
        return_varlen_states=True,
    )
    same(got, (y, final, torch.cat([states[2], states[3], states[6]])), x, *maps)


@pytest.mark.parametrize("case", names("ssd_"))
def test_dual_scan_equals_recorded_numbers(case):
    g = load(case)
    packed = "cu_seqlens" in g
    found = mamba_chunk_scan_combined(
        *(g[k] for k in ("x", "dt", "A", "B", "C")),
        13,
        g.get("D"),
        g.get("z"),
        g.get("dt_bias"),
        g.get("initial_states"),
        g.get("seq_idx"),
        g.get("cu_seqlens"),
        case != "ssd_g1_plain",
        (0.3, 1.1) if case == "ssd_dt_limit" else (0.0, float("inf")),
        True,
        packed,
    )
    for got, name in zip(found, ("out", "final_states", "varlen_states"), strict=False):
        if name in g:
            close(got, g[name], 1e-10, name)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("beside", [0, 2])
@pytest.mark.parametrize("marked", [False, True])
def test_split_scan(normed, first, beside, marked):
    heads, width, inner, maps = 4, 3, 12, G * N
    zxbcdt = real(B, T, 2 * beside + 2 * inner + 2 * maps + heads)
    conv, conv_bias = real(inner + 2 * maps, 3), real(inner + 2 * maps)
    dt_bias, A, skip = real(heads), -torch.rand(heads).double(), real(heads)
    weight, out, out_bias = real(inner) if normed else None, real(5, inner + beside), real(5)
    ids = IDS if marked else None
    gate, value, z, xBC, dt = zxbcdt.split([beside, beside, inner, inner + 2 * maps, heads], -1)
    xBC = convolved(xBC.transpose(1, 2), conv, conv_bias, True, ids).transpose(1, 2)
    x, b, c = xBC.split([inner, maps, maps], -1)
    x, b, c = x.unflatten(-1, (heads, width)), b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N))
    y, final, _ = dual(x, F.softplus(dt + dt_bias).clamp(0.3, 0.9), A, b, c, ids)
    y = (y + skip[:, None] * x).flatten(2)

    def rms(m: Tensor) -> Tensor:
        m = m.unflatten(-1, (G, -1))
        return (m / (m.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2)

    if weight is not None and first:
        y = rms(y) * weight * F.silu(z)
    else:
        y = y * F.silu(z) if weight is None else rms(y * F.silu(z)) * weight
    y = torch.cat([F.silu(gate) * value, y], -1) @ out.T + out_bias
    got = mamba_split_conv1d_scan_combined(
        zxbcdt,
        conv,
        conv_bias,
        dt_bias,
        A,
        skip,
        256,
        seq_idx=ids,
        dt_limit=(0.3, 0.9),
        return_final_states=True,
        rmsnorm_weight=weight,
        rmsnorm_eps=1e-3,
        outproj_weight=out,
        outproj_bias=out_bias,
        headdim=width,
        ngroups=G,
        norm_before_gate=first,
    )
    same(got, (y, final), zxbcdt, conv, conv_bias, dt_bias, skip, weight, out, out_bias)


def test_a_tensor_in_the_other_layout_is_told_how_to_turn():
    x, A, m = torch.randn(B, T, D), -torch.rand(D, N), torch.randn(B, N, T)
    with pytest.raises(ArgumentError, match=r"time is the last axis here: give x.transpose"):
        causal_conv1d_fn(x, torch.randn(D, 3))
    with pytest.raises(ArgumentError, match=r"give u.transpose\(-1, -2\), delta.transpose"):
        selective_scan_fn(x, x, A, m, m)
    with pytest.raises(ArgumentError, match=r"B is \(B, N, T\)"):
        selective_scan_fn(x.transpose(1, 2), x.transpose(1, 2), A, m.transpose(1, 2), m)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x, w: causal_conv1d_fn(x, w, activation="gelu"), "activation is 'gelu'"),
        (lambda x, w: causal_conv1d_fn(x, w, seq_idx=torch.zeros(B, T), return_final_states=True), "seq_idx together"),
        (lambda x, w: causal_conv1d_fn(x, w, seq_idx=torch.zeros(B, T)), "seq_idx is torch.float32"),
        (
            lambda x, w: causal_conv1d_fn(x, w, seq_idx=torch.zeros(B, T, dtype=torch.int32, device="meta")),
            "seq_idx is on meta",
        ),
        (lambda x, w: causal_conv1d_update(x, torch.zeros(B, D, 2), w), "holds 2 inputs, expected at least 3"),
        (lambda x, w: mamba_inner_fn(x, w[:, None], None, w, w, w, None, -w), "xz has shape"),
        (lambda x, w: selective_state_update(x[0], x, x, w, w, w), "expected \\(B, D, N\\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ArgumentError, match=sentence):
        call(torch.randn(B, D, T), torch.randn(D, 4))


def test_options_of_the_dual_scan_that_do_not_fit():
    x, dt, A, m = torch.randn(B, T, 4, 3), torch.rand(B, T, 4), -torch.rand(4), torch.randn(B, T, 1, N)
    with pytest.raises(ArgumentError, match="chunk_size is 0"):
        mamba_chunk_scan_combined(x, dt, A, m, m, 0)
    with pytest.raises(ArgumentError, match="without cu_seqlens"):
        mamba_chunk_scan_combined(x, dt, A, m, m, 4, return_varlen_states=True)
    with pytest.raises(ArgumentError, match="batch axis must be 1"):
        mamba_chunk_scan_combined(x, dt, A, m, m, 4, cu_seqlens=torch.tensor([0, T]))
    with pytest.raises(ArgumentError, match="headdim is missing"):
        mamba_split_conv1d_scan_combined(x[..., 0], torch.randn(3, 2), None, A, A, A, 4)
    with pytest.raises(ArgumentError, match="which are no 4 heads of width 3"):
        mamba_split_conv1d_scan_combined(x[..., 0], torch.randn(30, 2), None, A, A, A, 4, headdim=3)
