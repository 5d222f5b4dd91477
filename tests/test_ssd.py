"""State space duality beyond what holds for every operator: how exact it is, and runs of equal ids."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.ops import OPS, backend, ssd

BACKENDS = [
    pytest.param(b.name, marks=pytest.mark.skipif(bool(b.missing()), reason=b.missing()))
    for b in OPS["ssd"].backends
    if b.runs_on("cpu")
]
# The least and the greatest step: at rates of about -1, what is forgotten in one step.
DECAYS = {"weak": (1e-4, 1e-2), "mixed": (1e-2, 20.0), "strong": (5.0, 20.0)}


def gradients(name: str, dtype: torch.dtype, steps: tuple[float, float], seed: int) -> dict[str, Tensor]:
    """Those of a random sum of the outputs and the final state, for random inputs of two chunks and a bit."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    low, high = (torch.tensor(step).log() for step in steps)
    dt = torch.exp(low + (high - low) * torch.rand(1, 130, 4, generator=generator))
    given = {"x": normal(1, 130, 4, 5), "dt": dt, "A": -1 - 0.2 * torch.rand(4, generator=generator)}
    given |= {"B": normal(1, 130, 2, 3), "C": normal(1, 130, 2, 3)}
    leaves = {k: m.to(dtype).requires_grad_() for k, m in given.items()}
    with backend(name):
        y, final = ssd(**leaves)
    loss = (y * normal(*y.shape)).sum() + (final * normal(*final.shape)).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def as_exact_as_a_loop(
    name: str,
    steps: tuple[float, float],
    seed: int,
    dtype: torch.dtype = torch.float32,
    names: tuple[str, ...] = ("x", "dt", "A", "B", "C"),
) -> None:
    exact = gradients("reference", torch.float64, steps, seed)
    loop, found = (gradients(b, dtype, steps, seed) for b in ("reference", name))
    for k in names:
        want = exact[k]
        got, allowed = (float((m[k].double() - want).abs().max() / want.abs().max()) for m in (found, loop))
        assert got <= 2 * allowed + 1e-7, f"{k}: {got:.1e}, the loop {allowed:.1e}"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("steps", DECAYS.values(), ids=list(DECAYS))
def test_gradients_of_decays_are_as_exact_as_a_loop(name, steps):
    """They are small sums beside large ones: of what passes a decay, and of what does not."""
    for seed in range(3):
        as_exact_as_a_loop(name, steps, seed)


# Rows of ids: long and short runs, one that comes again, padding first, between and alone, and no run at all.
MARKED = {
    "long": lambda: torch.tensor([[0] * 30 + [1] * 41, [5] * 71]),
    "short": lambda: torch.randint(-1, 2, (3, 37), generator=torch.Generator().manual_seed(0)),
    "padded": lambda: torch.tensor([[-1] * 9 + [0] * 8, [0] * 4 + [-1] * 9 + [0] * 4, [-1] * 17]),
    "one step": lambda: torch.tensor([[3], [-1]]),
    "no steps": lambda: torch.zeros(2, 0),
}


def marked(ids: Tensor) -> dict[str, Tensor]:
    """Arguments in float64 for rows of ids, in odd sizes."""
    (batch, length), generator = ids.shape, torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {"x": normal(batch, length, 4, 5), "dt": normal(batch, length, 4).abs(), "A": -normal(4).abs()}
    found |= {"B": normal(batch, length, 2, 3), "C": normal(batch, length, 2, 3), "D": normal(4, 5)}
    return {**found, "z": normal(batch, length, 4, 5), "initial_state": normal(batch, 4, 5, 3)}


def each_run_alone(ids: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The definition of ``seq_idx``: every run of every row by itself, the first from the row's initial state."""
    ys, finals = [], []
    for row, line in enumerate(ids.tolist()):
        borders = [t for t in range(len(line)) if t == 0 or line[t] != line[t - 1]]
        h, pieces = given["initial_state"][row, None], [given["x"][row, :0][None]]
        for begin, end in pairwise([*borders, len(line)]):
            times = {k: given[k][row, None, begin:end] for k in ("x", "dt", "B", "C", "z")}
            y, h = ssd(**times, A=given["A"], D=given["D"], initial_state=None if begin else h)
            pieces.append(y)
        ys.append(torch.cat(pieces, 1))
        finals.append(h)
    return torch.cat(ys), torch.cat(finals)


def results(run: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]], given: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of a weighted sum of them by all arguments."""
    leaves = {k: m.clone().requires_grad_() for k, m in given.items()}
    y, final = run(leaves)
    weights = [torch.linspace(-1, 2, m.numel(), dtype=m.dtype).view_as(m) for m in (y, final)]
    return [y, final, *torch.autograd.grad((y, final), list(leaves.values()), weights, materialize_grads=True)]


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("name", ["reference", *BACKENDS])
@pytest.mark.parametrize("kind", MARKED)
def test_runs_of_ids_do_not_see_each_other(kind, name, chunk):
    ids = MARKED[kind]().to(torch.int32)
    with backend("reference"):
        want = results(lambda given: each_run_alone(ids, given), marked(ids))
    with backend(name):
        got = results(lambda given: ssd(**given, seq_idx=ids, chunk=chunk), marked(ids))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def stays_in_its_run(name: str, value: float, *plantings: tuple[str, ...]) -> None:
    """Planted in a run over a border of chunks, in some arguments; other runs get what they get without."""
    ids = torch.tensor([[0] * 7 + [1] * 12 + [0] * 4], dtype=torch.int32)
    given = marked(ids)
    here = ids == 1

    def run(given: dict[str, Tensor], into: float) -> dict[str, Tensor]:
        leaves = {k: m.clone().requires_grad_() for k, m in given.items()}
        with backend(name):
            y, final = ssd(**leaves, seq_idx=ids, chunk=16)
        weights = [torch.ones_like(y), torch.ones_like(final)]
        weights[0][0, 12] = into
        found = torch.autograd.grad((y, final), list(leaves.values()), weights)
        return {"y": y.detach(), "final": final.detach(), **dict(zip(leaves, found, strict=True))}

    want = run(given, 1.0)
    for names in plantings:
        planted = {k: m.clone() for k, m in given.items()}
        for k in names:
            planted[k][0, [7, 12, 18]] = value
        got = run(planted, value)
        assert not got["y"][here].isfinite().all()
        for other in ("y", "x", "dt", "B", "C", "z"):
            torch.testing.assert_close(got[other][~here], want[other][~here])
        for state in ("final", "initial_state"):
            torch.testing.assert_close(got[state], want[state])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_not_finite_stays_in_its_run(name, value):
    stays_in_its_run(name, value, ("x",), ("dt",), ("B",), ("C",), ("z",))


def test_ids_are_refused_where_they_do_not_fit():
    given, ids = {k: m for k, m in marked(torch.zeros(1, 4)).items() if k != "initial_state"}, torch.zeros(1, 4).int()
    with pytest.raises(ArgumentError, match="seq_idx together with cu_seqlens"):
        ssd(**given, seq_idx=ids, cu_seqlens=torch.tensor([0, 2, 4]))
    with pytest.raises(ArgumentError, match=r"seq_idx has shape \(1, 3\), expected \(B, T\)"):
        ssd(**given, seq_idx=ids[:, :3])
    with pytest.raises(ArgumentError, match=r"seq_idx is torch.float32, expected int32"):
        ssd(**given, seq_idx=ids.float())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of the compiler's own library
def test_ids_compile_into_one_graph():
    ids = MARKED["short"]().to(torch.int32)
    given = {k: m.requires_grad_() for k, m in marked(ids).items()}

    def run() -> list[Tensor]:
        return [m.sum() for m in ssd(**given, seq_idx=ids)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(), run(), strict=True):
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(m, list(given.values()), retain_graph=True) for m in (got, want))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
