"""The gated delta rule and what is made of it: recorded numbers, decays of all strengths, steps in rows of a table."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.ops import (
    backend,
    gated_delta_product,
    gated_delta_product_update,
    gated_delta_rule,
    gated_delta_rule_update,
    wkv7,
)
from vectors import close, load

NAMES = ["reference", "torch"]
precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)


def recorded(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: m.to(dtype) for key, m in load(name).items()}


def recorded_call(m: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The heads of the plain delta rule lie before time."""
    first = m["beta"].shape[2] > m["k"].shape[1]
    q, k, v, beta = (m[x].transpose(1, 2) if first else m[x] for x in ("q", "k", "v", "beta"))
    state = m.get("initial_state")
    y, final = gated_delta_rule(q, k, v, beta, m.get("g"), scale=0.5, initial_state=state, chunk=8)
    return (y.transpose(1, 2) if first else y), final


@precisions
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", ["", "_init"])
@pytest.mark.parametrize("case", ["delta_rule", "gated_delta_rule", "kda"])
def test_it_gives_recorded_numbers(case, start, name, dtype, tolerance):
    m = recorded(case + start, dtype)
    with backend(name):
        y, final = recorded_call(m)
    close(y, m["o"], tolerance, "o")
    close(final, m["final_state"], tolerance, "final_state")


@precisions
@pytest.mark.parametrize("start", ["", "_init"])
def test_gates_that_erase_and_write_by_channel_are_those_of_wkv7(start, dtype, tolerance):
    """Gated DeltaNet 2: ``S = S' + k (w v - S'^T (b k))^T``, whose erased key differs from the written one."""
    m = recorded(f"gdn2{start}", dtype)
    read = -m["g"].exp() * m["b"] * m["k"]
    state = m.get("initial_state")
    y, final = wkv7(0.5 * m["q"], m["g"], m["k"], m["w"] * m["v"], read, m["k"], initial_state=state)
    close(y, m["o"], tolerance, "o")
    close(final, m["final_state"], tolerance, "final_state")


@precisions
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", ["", "_init"])
def test_a_product_gives_recorded_numbers(start, name, dtype, tolerance):
    m = recorded(f"gated_delta_product{start}", dtype)
    k, v, beta = (m[x].unflatten(1, (-1, 2)) for x in ("k", "v", "beta"))
    with backend(name):
        y, final = gated_delta_product(m["q"], k, v, beta, m["g"], initial_state=m.get("initial_state"))
    close(y, m["o"], tolerance, "o")
    close(final, m["final_state"], tolerance, "final_state")


def test_products_of_packed_sequences_are_those_of_each_alone():
    m = recorded("gated_delta_product", torch.float64)
    k, v, beta = (m[x].unflatten(1, (-1, 2)) for x in ("k", "v", "beta"))
    line = [x.flatten(0, 1)[None] for x in (m["q"], k, v, beta, m["g"])]
    y, final = gated_delta_product(*line, cu_seqlens=torch.tensor([0, 19, 19, 38]))
    close(y.unflatten(1, (2, 19))[0], m["o"], 1e-10, "o")
    close(final[[0, 2]], m["final_state"], 1e-10, "final_state")
    assert not final[1].any()
    state = final.new_zeros(2, *final.shape[1:])
    for t in range(3):
        y, state = gated_delta_product_update(state, *(x[:, t] for x in (m["q"], k, v, beta, m["g"])))
        close(y, m["o"][:, t], 1e-10, f"step {t}")


def test_a_product_of_nothing_is_refused():
    q, k = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 0, 2, 4)
    with pytest.raises(ArgumentError, match="have 0 writes in each step, expected at least 1"):
        gated_delta_product(q, k, k, k[..., 0])


def arguments(kind: str, strength: tuple[float, float], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Of two chunks and a bit; logarithms of decays lie evenly between two powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (torch.tensor(d).log() for d in strength)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, 130, *shape, generator=generator)

    found = {"q": normal(1, 3), "k": torch.nn.functional.normalize(normal(1, 3), dim=-1), "v": normal(2, 2)}
    found["beta"] = 2 * torch.rand(1, 130, 2, generator=generator)
    if kind != "plain":
        shape = (1, 130, 2) if kind == "heads" else (1, 130, 2, 3)
        found["log_decay"] = -torch.exp(low + (high - low) * torch.rand(shape, generator=generator))
    return {name: m.to(dtype) for name, m in found.items()}


def results(given: dict[str, Tensor], name: str, seed: int = 0) -> dict[str, Tensor]:
    """Outputs, and gradients of a random sum of them."""
    generator = torch.Generator().manual_seed(seed + 1)
    leaves = {key: m.clone().requires_grad_() for key, m in given.items()}
    with backend(name):
        y, final = gated_delta_rule(**leaves)
    weights = [torch.randn(m.shape, generator=generator).to(m.dtype) for m in (y, final)]
    found = torch.autograd.grad((y, final), list(leaves.values()), weights)
    return {"y": y.detach(), "final": final.detach(), **dict(zip(leaves, found, strict=True))}


CHUNK_ROUNDS = 64 * 2**-24  # sums over a chunk, of writes that later ones undo
KINDS = ["plain", "heads", "channels"]
STRENGTHS = {"weak": (1e-4, 1e-2), "mixed": (1e-4, 3e3), "strong": (5.0, 20.0)}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_weak_decays_beside_strong_ones_are_as_exact_as_a_loop(kind, strength):
    """Outputs and all gradients, in float32: nothing overflows, and no small sum is a difference of large ones."""
    for seed in range(2):
        given = arguments(kind, STRENGTHS[strength], torch.float32, seed)
        exact = results({key: m.double() for key, m in given.items()}, "reference", seed)
        loop, found = (results(given, name, seed) for name in NAMES)
        for key, want in exact.items():
            got, allowed = (float((m[key].double() - want).abs().max() / want.abs().max()) for m in (found, loop))
            assert got <= 3 * allowed + CHUNK_ROUNDS, f"{key}: {got:.1e}, the loop {allowed:.1e}"


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_decay_may_forget_everything(kind):
    given = arguments(kind, STRENGTHS["weak"], torch.float64)
    given["log_decay"][:, [0, 30, 31, 64, 129]] = -torch.inf
    want, got = (results(given, name) for name in NAMES)
    for key, m in want.items():
        if key != "log_decay":  # of which autograd makes 0 times infinity
            torch.testing.assert_close(got[key], m, rtol=1e-9, atol=1e-9)
    assert got["log_decay"].isfinite().all()


def test_keys_that_come_again_and_again_are_exact():
    """The triangular system of equal keys has the largest inverse that there is."""
    given = arguments("plain", (1.0, 1.0), torch.float32)
    given["k"] = given["k"][:, :1].expand_as(given["k"])
    given["beta"] = torch.ones_like(given["beta"])
    y, final = gated_delta_rule(**given)
    k, v, q = given["k"][0, 0, 0], given["v"][0], given["q"][0, :, 0]
    torch.testing.assert_close(final[0], k[:, None] * v[-1][:, None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y[0], (q @ k)[:, None, None] * v, rtol=1e-5, atol=1e-5)


def one_step(kind: str, dtype: torch.dtype, state: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The arguments of a step for three rows, and a table of five states."""
    given = [m[0, :3] for m in arguments(kind, (1e-2, 3.0), dtype).values()]
    return given, torch.randn(5, 2, 3, 2, generator=torch.Generator().manual_seed(3)).to(state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("state", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_writes_rows_of_a_table(kind, state, name):
    """In the dtype of the table, rounded once; padding gives zero; other rows keep their bits."""
    given, table = one_step(kind, torch.float64 if state == torch.float64 else torch.float32, state)
    before, rows = table.clone(), torch.tensor([3, -1, 0])
    with backend(name), torch.no_grad():
        y, after = gated_delta_rule_update(table, *given, out_state=table, rows=rows, scale=0.7)
        want_y, want = gated_delta_rule_update(before[[3, 1, 0]], *given, scale=0.7)
        whole, _ = gated_delta_rule(*(m[:1, None] for m in given), initial_state=before[3:4], scale=0.7)
    assert after is table and torch.equal(table[[1, 2, 4]], before[[1, 2, 4]]) and not y[1].any()
    torch.testing.assert_close(y[:1], whole[:, 0])
    for i, row in ((0, 3), (2, 0)):
        assert torch.equal(y[i], want_y[i]) and torch.equal(table[row], want[i].to(state))


def test_what_does_not_fit_is_refused():
    given: dict[str, Any] = arguments("heads", (0.1, 1.0), torch.float32)
    with pytest.raises(ArgumentError, match="chunk is 0, expected at least 1"):
        gated_delta_rule(**given, chunk=0)
    with pytest.raises(ArgumentError, match="q and k have 4 heads, which do not divide those of v, 2"):
        gated_delta_rule(**{**given, **{x: given[x].expand(1, 130, 4, 3) for x in "qk"}})
    with pytest.raises(ArgumentError, match=r"log_decay has shape \(1, 130, 2, 2\), expected \(1, 130, 2\), one for"):
        gated_delta_rule(**{**given, "log_decay": given["log_decay"][..., None].expand(1, 130, 2, 2)})
    with pytest.raises(ArgumentError, match=r"initial_state is \(1, 2, 2, 3\), expected \(1, 2, 3, 2\)"):
        gated_delta_rule(**given, initial_state=torch.zeros(1, 2, 2, 3))
    with pytest.raises(ArgumentError, match=r"beta is torch.int64, expected a floating dtype"):
        gated_delta_rule(**{**given, "beta": given["beta"].long()})
    one, table = one_step("heads", torch.float32, torch.float32)
    with pytest.raises(ArgumentError, match="rows has an index 5, but state has 5 rows"):
        gated_delta_rule_update(table, *one, rows=torch.tensor([0, 5, 1]))
    with pytest.raises(ArgumentError, match="out_state cannot be written to while gradients are recorded"):
        gated_delta_rule_update(table[:3].requires_grad_(), *one, out_state=table[:3])
