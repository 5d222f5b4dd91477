"""One-step updates in rows of a table, in states of 16 bits, and of convolutions with several steps or a ring."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, bfloat16, float16, float32, float64

from dualform.core.errors import ArgumentError
from dualform.ops import OPS, backend, causal_conv1d_update, selective_state_update

R = 5  # rows of a table
PADDING = -1


def backends() -> list[str]:
    found = [b.name for b in OPS["selective_state_update"].backends if b.runs_on("cpu") and not b.missing()]
    return [name for name in ("native", "triton", "torch") if name in found] + ["reference"]


@pytest.fixture(params=backends())
def on(request):
    with backend(request.param), torch.no_grad():
        yield request.param


def normal(*shape: int, dtype: torch.dtype = float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum((i + 1) * n for i, n in enumerate(shape)))
    return torch.randn(*shape, generator=generator, dtype=float64).to(dtype)


def surrounded(table: Tensor) -> Tensor:
    """The same table between rows of NaN, and with NaN behind every row."""
    wide = table.new_full((len(table) + 2, table[0].numel() + 3), torch.nan)
    inside = wide[1:-1, : table[0].numel()].unflatten(1, table.shape[1:])
    inside.copy_(table)
    return inside


def close(got: Tensor, want: Tensor) -> None:
    """``want`` is exact; ``got`` has the dtype that it was rounded to, once."""
    assert got.shape == want.shape
    unit = torch.finfo(got.dtype).eps
    allowed = unit / 2 + (1e-5 if got.dtype != float64 else 1e-12)
    error = (got.double() - want).abs()
    assert (error <= allowed * (want.abs() + (want.abs().max() if want.numel() else 0) * 1e-2)).all(), float(
        error.max()
    )


# The scan.

SHAPES = [((1,), 1, 1), ((3,), 17, 3), ((17,), 3, 1), ((6, 5), 7, 2), ((2, 3), 4, 1), ((40,), 16, 4), ((6, 17), 3, 3)]


def scan_arguments(inner: tuple[int, ...], states: int, groups: int, dtype: torch.dtype, by_head: bool) -> tuple:
    one, rates = ((inner[0], 1), 1) if by_head else (inner, states)
    wide = torch.promote_types(dtype, float32)
    args = normal(3, *inner, dtype=dtype), normal(3, *one, dtype=dtype), -normal(*one, rates, dtype=wide).abs()
    maps = normal(3, groups, states, dtype=dtype), normal(3, 1, states, dtype=dtype, seed=7)
    more = {
        "D": normal(*one, dtype=dtype),
        "z": normal(3, *inner, dtype=dtype, seed=1),
        "dt_bias": normal(*one, dtype=wide),
    }
    return (*args, *maps), more


def scan_by_loop(h: Tensor, args: tuple, more: dict, row: int) -> tuple[Tensor, Tensor]:
    """One row, in float64: h' = exp(dt A) h + dt x B, y = (C h' + D x) silu(z)."""
    x, dt, A, B, C = (m.double() if m is args[2] else m[row].double() for m in args)
    D, z, bias = more["D"].double(), more["z"][row].double(), more["dt_bias"].double()
    h, y = h.double().clone(), torch.empty(x.shape, dtype=float64)
    for d in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).view(-1, x.dim()).tolist():
        at, head = tuple(d), d[0]
        size = F.softplus(dt.expand(x.shape)[at] + bias.expand(x.shape)[at])
        b, c = (m[head // (x.shape[0] // len(m))] for m in (B, C))
        h[at] = torch.exp(size * A.expand(h.shape)[at]) * h[at] + size * x[at] * b
        y[at] = ((c * h[at]).sum() + D.expand(x.shape)[at] * x[at]) * F.silu(z[at])
    return y, h


@pytest.mark.parametrize("inner, states, groups", SHAPES)
@pytest.mark.parametrize("state", [float64, float32, bfloat16, float16], ids=str)
def test_a_scan_steps_in_rows_of_a_table(inner, states, groups, state, on):
    """In any dtype of the state, rounded once; padding gives zero; other rows keep their bits."""
    by_head = len(inner) == 2
    args, more = scan_arguments(inner, states, groups, float64 if state == float64 else float32, by_head)
    table = surrounded(normal(R, *inner, states, dtype=state))
    before = table.clone()
    rows = torch.tensor([3, PADDING, 0], dtype=torch.int32 if by_head else torch.int64)
    y, after = selective_state_update(table, *args, **more, dt_softplus=True, out_state=table, rows=rows)
    assert after is table
    assert not y[1].any() and torch.equal(table[[1, 2, 4]], before[[1, 2, 4]])
    for i, row in ((0, 3), (2, 0)):
        want, h = scan_by_loop(before[row], args, more, i)
        close(y[i], want)
        close(table[row], h)


def test_next_states_of_rows_are_new_memory_without_any(on):
    args, more = scan_arguments((6,), 5, 2, float32, False)
    table = normal(R, 6, 5, dtype=bfloat16)
    before = table.clone()
    y, after = selective_state_update(table, *args, **more, dt_softplus=True, rows=torch.tensor([3, PADDING, 0]))
    assert torch.equal(table, before) and after.shape == (3, 6, 5) and after.dtype == float32
    assert not y[1].any() and not after[1].any()
    for i, row in ((0, 3), (2, 0)):
        want, h = scan_by_loop(before[row], args, more, i)
        close(y[i], want)
        close(after[i], h)


@pytest.mark.parametrize("out", [float32, bfloat16, float64], ids=str)
def test_the_next_state_goes_to_another_table(out, on):
    """Of another dtype, or one that shares its memory with the state without being the same view of it."""
    args, more = scan_arguments((6,), 5, 2, float32, False)
    rows, table = torch.tensor([3, PADDING, 0]), normal(R, 6, 5, dtype=bfloat16)
    into = torch.full((R, 6, 5), 7.0, dtype=out)
    selective_state_update(table, *args, **more, dt_softplus=True, rows=rows, out_state=into)
    assert (into[[1, 2, 4]] == 7).all()
    for i, row in ((0, 3), (2, 0)):
        close(into[row].to(out if out != float64 else float32), scan_by_loop(table[row], args, more, i)[1])
    line = normal(R + 1, 6, 5, dtype=out)
    want = [scan_by_loop(line[row], args, more, i)[1] for i, row in enumerate((0, 1, 2))]
    selective_state_update(line[:-1], *args, **more, dt_softplus=True, rows=torch.arange(3), out_state=line[1:])
    for i in range(3):
        close(line[1 + i], want[i])


def test_a_gradient_goes_back_to_rows_of_a_table():
    args, more = scan_arguments((4,), 3, 2, float64, False)
    table = normal(R, 4, 3).requires_grad_()
    rows = torch.tensor([3, PADDING, 0])
    y, after = selective_state_update(table, *args, **more, dt_softplus=True, rows=rows)
    (grad,) = torch.autograd.grad(y.sum() + after.sum(), table)
    assert grad[[0, 3]].abs().min() > 0 and not grad[[1, 2, 4]].any()


# The convolution.


def conv_by_loop(line: list[Tensor], weight: Tensor, bias: Tensor | None, steps: int, silu: bool) -> Tensor:
    """The last ``steps`` outputs (T, D) for inputs (D,), oldest first, in float64."""
    taps, ys = weight.shape[1], []
    for t in range(len(line) - steps, len(line)):
        y = sum(weight.double()[:, j] * line[t - taps + 1 + j] for j in range(taps))
        y = y if bias is None else y + bias.double()
        ys.append(F.silu(y) if silu else y)
    return torch.stack(ys)


@pytest.mark.parametrize("width, taps, size", [(1, 1, 0), (3, 1, 2), (17, 4, 3), (3, 2, 4), (17, 3, 9), (1, 5, 4)])
@pytest.mark.parametrize("steps", [None, 1, 2, 7])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("dtype", [float64, float32, bfloat16, float16], ids=str)
def test_a_convolution_steps_in_rows_of_a_table(width, taps, size, steps, ring, dtype, on):
    """Of W-1 columns or more, oldest first or in a ring; the rest of the table keeps its bits."""
    if ring and size == 0:
        pytest.skip("a ring has at least one slot")
    compute = float64 if dtype == float64 else float32
    x = normal(3, width, dtype=compute) if steps is None else normal(3, steps, width, dtype=compute)
    weight, bias = normal(width, taps, dtype=compute), normal(width, dtype=compute) if width > 1 else None
    rows, seen = torch.tensor([3, PADDING, 0]), torch.tensor([2, 5, 31], dtype=torch.int32) if ring else None
    table = surrounded(normal(R, width, size, dtype=dtype))
    silu, before, count = width > 1, table.clone(), steps or 1
    more = {"activation": "silu" if silu else None, "rows": rows, "cache_seqlens": seen}
    y, fresh = causal_conv1d_update(x, table, weight, bias, **more)
    assert torch.equal(table, before) and fresh.dtype == compute
    again, after = causal_conv1d_update(x, table, weight, bias, **more, out_state=table)
    assert after is table and torch.equal(again, y) and not y[1].any() and not fresh[1].any()
    assert torch.equal(table[[1, 2, 4]], before[[1, 2, 4]])
    for i, row in ((0, 3), (2, 0)):
        turn = int(seen[i]) if seen is not None else 0
        old = [before[row].double()[:, (turn + k) % size] for k in range(size)]
        line = [*old, *x.view(3, count, width)[i].double()]
        close(y[i].view(count, width), conv_by_loop(line, weight, bias, count, silu))
        want = torch.empty(width, size, dtype=float64)
        for k in range(size):
            want[:, (turn + count + k) % size if ring else k] = line[len(line) - size + k]
        assert torch.equal(table[row], want.to(dtype)) and torch.equal(fresh[i], want.to(compute))


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_several_steps_are_the_loop_bit_for_bit(ring, turned, dtype, on):
    """Also in a table whose slots lie before its channels, and of inputs whose time lies last."""
    x, weight, bias = normal(2, 9, 17, dtype=bfloat16), normal(17, 4, dtype=float32), normal(17, dtype=float32)
    whole = normal(2, 17, 5, dtype=dtype)
    whole = whole.mT.contiguous().mT if turned else whole
    single = whole.clone()
    seen = torch.tensor([3, 8]) if ring else None
    more = {"activation": "silu", "cache_seqlens": seen}
    x = x.mT.contiguous().mT if turned else x
    y, _ = causal_conv1d_update(x, whole, weight, bias, **more, out_state=whole)
    assert y.stride() == x.stride()
    for t in range(9):
        more["cache_seqlens"] = None if seen is None else seen + t
        one, _ = causal_conv1d_update(x[:, t], single, weight, bias, **more, out_state=single)
        assert torch.equal(one, y[:, t])
    assert torch.equal(whole, single)


def test_no_steps_change_nothing(on):
    state = normal(2, 3, 4, dtype=bfloat16)
    before, x, seen = state.clone(), torch.zeros(2, 0, 3), torch.tensor([1, 2])
    for more in ({}, {"cache_seqlens": seen}, {"rows": torch.tensor([1, 0])}):
        y, after = causal_conv1d_update(x, state, torch.zeros(3, 2), **more, out_state=state)
        assert y.shape == (2, 0, 3) and after is state and torch.equal(state, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("own", [False, True])
def test_compiled_steps_write_to_the_same_rows(own):
    """In one graph, by operators that say what they write."""
    args, more = scan_arguments((6,), 5, 2, float32, False)
    weight, seen = normal(6, 4, dtype=float32), []

    def step(table, window, rows, places):
        x, _ = causal_conv1d_update(args[0], window, weight, out_state=window, rows=rows, cache_seqlens=places)
        memory = table if own else torch.zeros_like(table)
        return selective_state_update(table, x, *args[1:], **more, rows=rows, out_state=memory)

    def look(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(step, fullgraph=True, backend=look)
    eager, later = ([normal(R, 6, 5, dtype=bfloat16), normal(R, 6, 4, dtype=float32)] for _ in range(2))
    with torch.no_grad():
        for rows in ([3, PADDING, 0], [0, 1, 4]):
            found = compiled(*later, torch.tensor(rows), torch.tensor([0, 2, 9]))
            want = step(*eager, torch.tensor(rows), torch.tensor([0, 2, 9]))
            torch.testing.assert_close(found, want, rtol=0, atol=0)
            torch.testing.assert_close(later, eager, rtol=0, atol=0)
        with pytest.raises(ArgumentError, match="rows has an index 5"):
            compiled(*later, torch.tensor([0, 5, 1]), torch.tensor([0, 2, 9]))
    assert torch.ops.dualform.selective_state_update_.default in seen


# What does not fit.


def scan_with(**more):
    args, options = scan_arguments((6,), 5, 2, float32, False)
    return selective_state_update(normal(R, 6, 5, dtype=float32), *args, **options, **more)


def conv_with(size=3, **more):
    return causal_conv1d_update(
        normal(3, 6, dtype=float32), normal(R, 6, size, dtype=float32), normal(6, 4, dtype=float32), **more
    )


GOOD = torch.tensor([0, 1, 2])
WRONG = {
    "beyond": ({"rows": torch.tensor([0, 5, 1])}, "rows has an index 5, but state has 5 rows"),
    "dtype": ({"rows": GOOD.float()}, r"rows is torch.float32, expected int32 or int64"),
    "bool": ({"rows": GOOD.bool()}, r"rows is torch.bool, expected int32 or int64"),
    "count": ({"rows": GOOD[:2]}, r"rows has shape \(2,\)"),
    "list": ({"rows": [0, 1, 2]}, "rows is list, expected a tensor"),
    "device": ({"rows": GOOD.to("meta")}, "rows is on meta"),
    "no rows": ({}, "axis 0 is|batch"),
    "memory": ({"rows": GOOD, "out_state": torch.zeros(3, 6, 5)}, r"out_state is \(3, 6, 5\), expected \(5, 6, "),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("step", [scan_with, conv_with])
def test_rows_that_do_not_fit_are_refused(name, step):
    more, sentence = WRONG[name]
    with pytest.raises(ArgumentError, match=sentence), torch.no_grad():
        step(**more)


def test_rings_and_windows_that_do_not_fit_are_refused():
    with pytest.raises(ArgumentError, match=r"cache_seqlens is torch.float32, expected int32 or int64"):
        conv_with(rows=GOOD, cache_seqlens=GOOD.float())
    with pytest.raises(ArgumentError, match=r"cache_seqlens has shape \(2,\)"):
        conv_with(rows=GOOD, cache_seqlens=GOOD[:2])
    with pytest.raises(ArgumentError, match="state holds 2 inputs, expected at least 3: weight has 4 taps"):
        conv_with(2, rows=GOOD)
    with pytest.raises(ArgumentError, match="state holds 0 inputs, expected at least 1"):
        causal_conv1d_update(torch.zeros(1, 2), torch.zeros(1, 2, 0), torch.zeros(2, 1), cache_seqlens=GOOD[:1])
    with pytest.raises(ArgumentError, match="state has no rows"):
        causal_conv1d_update(torch.zeros(1, 2), torch.zeros(0, 2, 1), torch.zeros(2, 2), rows=GOOD[:1])


def test_the_operators_read_rows_themselves():
    x, state, weight = torch.zeros(2, 3), torch.zeros(4, 3, 1), torch.zeros(3, 2)
    for rows in ([0, 4], [2**40, 0]):
        with pytest.raises(ArgumentError, match="rows has an index"):
            torch.ops.dualform.causal_conv1d_update(
                "", False, x, state, weight, None, False, None, torch.tensor(rows), None
            )
        with pytest.raises(ArgumentError, match="rows has an index"):
            torch.ops.dualform.causal_conv1d_update_("", x, state, weight, None, False, state, torch.tensor(rows), None)
    with pytest.raises(ArgumentError, match=r"causal_conv1d_update_: out_state is \(4, 3, 2\), expected \(4, 3, 1\)"):
        torch.ops.dualform.causal_conv1d_update_(
            "", x, state, weight, None, False, torch.zeros(4, 3, 2), torch.tensor([0, 1]), None
        )
    assert not state.any()
