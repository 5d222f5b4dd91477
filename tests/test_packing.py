"""Packings: checked once where they enter, one value below, clamped where nothing can be read."""

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import dualform as df
from dualform import Packing
from dualform.core.errors import ArgumentError, BackendError
from dualform.core.packing import clamped
from dualform.ops import backend, causal_conv1d, linear_scan, selective_scan, ssd

BORDERS = torch.tensor([0, 3, 3, 8])
X = torch.zeros(1, 8, 2)


def test_it_is_a_tree_of_tensors():
    packing = Packing.of("here", BORDERS.to(torch.int32), X)
    leaves, _ = pytree.tree_flatten(packing)
    assert all(torch.equal(leaf, BORDERS) and leaf.dtype == torch.int64 for leaf in leaves) and len(leaves) == 2
    assert packing.rows == 3 and packing.longest == 5 and packing.lengths.tolist() == [3, 0, 5]
    again = Packing.of("there", packing, X)
    assert again.host is packing.host and again.cu_seqlens is packing.cu_seqlens


def test_what_a_caller_changes_later_does_not_reach_it():
    borders = BORDERS.clone()
    packing = Packing.of("here", borders, X)
    borders[1] = 7
    assert packing.host.tolist() == BORDERS.tolist() and packing.cu_seqlens.tolist() == BORDERS.tolist()


def test_a_packing_that_a_caller_put_together_is_read_again():
    """In any dtype, and whatever its two halves say: what counts is the one on the host."""
    short = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    for made in (Packing(short, short), Packing(torch.tensor([0, 10**9, 8, 8]), short), Packing(short, None)):
        packing = Packing.of("here", made, X)
        assert packing.host.tolist() == packing.cu_seqlens.tolist() == BORDERS.tolist()
        assert packing.host.dtype == packing.cu_seqlens.dtype == torch.int64
        torch.testing.assert_close(linear_scan(X, X, cu_seqlens=made), linear_scan(X, X, cu_seqlens=BORDERS))


@pytest.mark.parametrize("compiled", [False, True])
def test_borders_may_be_written_anew_between_calls(compiled):
    """Tables are made of a copy, also where the operator sees the caller's own tensor."""
    x, dt, A, maps = torch.randn(1, 64, 2, 4), torch.rand(1, 64, 2), -torch.rand(2), torch.randn(1, 64, 1, 4)

    def run(borders):
        return ssd(x, dt, A, maps, maps, cu_seqlens=borders)

    again, borders = (
        (torch.compile(run, fullgraph=True, backend="eager") if compiled else run),
        torch.tensor([0, 20, 64]),
    )
    with backend("torch"):
        for border in (20, 41):
            borders[1] = border
            torch.testing.assert_close(again(borders), run(borders.clone()))


@pytest.mark.parametrize(
    "borders, words",
    [
        ([0, 3, 8], "cu_seqlens is list, expected a tensor"),
        (np.array([0, 3, 8]), "cu_seqlens is ndarray, expected a tensor"),
        (torch.tensor([0.0, 8.0]), "expected int32 or int64"),
        (torch.tensor([[0, 8]]), r"expected int32 or int64 of shape \(n \+ 1,\)"),
        (torch.tensor([0, 9]), "must rise from 0 to the length 8"),
        (torch.tensor([1, 8]), "must rise from 0"),
        (torch.tensor([0, 5, 4, 8]), "must rise"),
        (Packing.of("there", torch.tensor([0, 9]), torch.zeros(1, 9, 1)), "must rise from 0 to the length 8"),
    ],
)
def test_bad_borders_are_named(borders, words):
    with pytest.raises(ArgumentError, match=words):
        Packing.of("here", borders, X)
    with pytest.raises(ArgumentError, match=words):
        linear_scan(X, X, cu_seqlens=borders)


def test_spans_and_tables():
    packing = Packing.of("here", torch.tensor([0, 3, 3, 8, 10]), torch.zeros(1, 10, 1))
    rows, part = packing.of_span(2, 9)
    assert (rows.start, rows.stop) == (0, 4) and part.host.tolist() == [0, 1, 1, 6, 7]
    assert [m.tolist() for m in packing.not_empty()] == [[0, 2, 3], [0, 3, 8], [2, 7, 9]]
    assert [m.tolist() for m in packing.starting(1, 9)] == [[2, 7], [2, 3]]
    assert [m.tolist() for m in packing.ending(2, 3)] == [[0], [0]]
    assert packing.starting(1, 3) is None
    assert packing.not_empty()[0] is packing.not_empty()[0]  # made once


@pytest.mark.parametrize("borders", [[0, 20, 10], [0, 10**9, 64], [-5, 70], [0, 0, 0], [64, 0]])
def test_borders_that_nobody_can_read_are_clamped(borders):
    """What a graph that is captured runs on: a valid packing, and whether it is another one than was given."""
    packing, wrong = clamped(torch.tensor(borders), 64)
    found = packing.cu_seqlens.tolist()
    assert found[0] == 0 and found[-1] == 64 and found == sorted(found) and bool(wrong)
    good = torch.tensor([0, 7, 64])
    packing, wrong = clamped(good, 64)
    assert torch.equal(packing.cu_seqlens, good) and not bool(wrong)


def test_outputs_are_nan_where_borders_were_wrong(monkeypatch):
    monkeypatch.setattr("dualform.core.packing.readable", lambda tensor: False)
    u, A, B = torch.rand(1, 64, 8), -torch.rand(8, 4), torch.rand(1, 64, 1, 4)
    for borders, right in (([0, 20, 64], True), ([0, 200, 64], False)):
        y, state = selective_scan(u, u, A, B, B, cu_seqlens=_on_device_only(borders))
        assert bool(y.isfinite().all()) == bool(state.isfinite().all()) == right
        assert right or bool(y.isnan().all() and state.isnan().all())


def _on_device_only(borders):
    return Packing(torch.tensor(borders), None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["linear_scan", "selective_scan", "ssd", "causal_conv1d"])
def test_a_captured_graph_whose_borders_become_wrong_gives_nan(name):
    """No address outside of the tensors, no loop without end; with good borders it is right again."""
    u, taps = torch.rand(1, 64, 8, device="cuda", dtype=torch.bfloat16), torch.rand(8, 4, device="cuda")
    A, B, borders = -taps, u[:, :, None, :4], torch.tensor([0, 20, 64], device="cuda")
    x, dt = u[:, :, None], u[:, :, :1]
    calls = {
        "linear_scan": lambda: linear_scan(u.float(), u.float(), cu_seqlens=borders),
        "selective_scan": lambda: selective_scan(u, u, A, B, B, cu_seqlens=borders),
        "ssd": lambda: ssd(x, dt, A[:1, 0], B, B, cu_seqlens=borders),
        "causal_conv1d": lambda: causal_conv1d(u, taps, cu_seqlens=borders),
    }
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        want, _ = calls[name]()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = calls[name]()
    for wrong in ([0, 20, 10], [0, 10**9, 64], [-5, 20, 64], [64, 0, 0], [0, 20, 64]):
        borders.copy_(torch.tensor(wrong))
        graph.replay()
        torch.cuda.synchronize()
        if wrong == [0, 20, 64]:
            torch.testing.assert_close(y, want)
        else:
            assert y.isnan().all(), wrong


def test_a_backend_that_needs_the_lengths_says_so():
    with pytest.raises(BackendError, match="cannot be read while a CUDA graph is captured"):
        _on_device_only([0, 8]).host_borders()


@pytest.mark.parametrize("borders", [[0, 20, 10], [0, 10**9, 64]])
@pytest.mark.parametrize("direct", [False, True])
def test_compiled_and_direct_calls_check_borders(borders, direct):
    a = torch.rand(1, 64, 8)
    if direct:
        args = ("", False, a, a, torch.zeros(len(borders) - 1, 8), torch.tensor(borders), False)
        call = lambda: torch.ops.dualform.linear_scan(*args)  # noqa: E731
    else:
        compiled = torch.compile(lambda a, c: linear_scan(a, a, cu_seqlens=c), fullgraph=True, backend="eager")
        call = lambda: compiled(a, torch.tensor(borders))  # noqa: E731
    with pytest.raises(ArgumentError, match="must rise from 0 to the length 64"):
        call()


def test_one_graph_takes_tensors_and_packings_of_all_lengths():
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda a, c: linear_scan(a, a, cu_seqlens=c)[0], fullgraph=True, backend=count, dynamic=True
    )
    for borders in ([0, 20, 64], [0, 5, 9, 71], [0, 2, 3, 8, 9]):
        a = torch.rand(1, borders[-1], 7)
        packing = Packing.of("here", torch.tensor(borders), a)
        torch.testing.assert_close(compiled(a, packing), linear_scan(a, a, cu_seqlens=packing)[0])
    assert len(graphs) == 1


def test_a_model_makes_one(monkeypatch):
    """Values of borders and masks are read once for a whole model, and not at all of a packing."""
    read = []
    real = torch.Tensor.to

    def to(self, *args, **kwargs):
        if args and args[0] == "cpu":
            read.append(self)
        return real(self, *args, **kwargs)

    model = df.LanguageModel(df.ModelConfig(11, 8, {"M": (df.layers.Mamba2Config(d_state=4, d_head=4),)}, "MMM"))
    tokens, borders = torch.randint(11, (1, 12)), torch.tensor([0, 5, 12])
    packing = Packing.of("here", borders, tokens)
    monkeypatch.setattr(torch.Tensor, "to", to)
    with torch.no_grad():
        want, _ = model(tokens, cu_seqlens=borders)
        assert [tuple(t.shape) for t in read] == [(3,)]
        read.clear()
        got, _ = model(tokens, cu_seqlens=packing)
    assert not read and torch.equal(got, want)
