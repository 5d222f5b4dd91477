"""Gated linear attention and RWKV-7's recurrence: recorded numbers, strong decays, and steps in rows of a table."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.ops import (
    backend,
    gated_linear_attention,
    gated_linear_attention_update,
    wkv7,
    wkv7_update,
)
from vectors import close, load

NAMES = ["reference", "torch"]


def recorded(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: m.to(dtype) for key, m in load(name).items()}


def gla_call(m: dict[str, Tensor], heads_first: bool, decay: str | None) -> tuple[Tensor, Tensor]:
    """A recorded call of gated linear attention, whose queries were scaled."""
    q, k, v = (m[x].transpose(1, 2) if heads_first else m[x] for x in "qkv")
    g = torch.zeros_like(k) if decay is None else m[decay].transpose(1, 2) if heads_first else m[decay]
    g = g[..., None].expand_as(k) if g.dim() == 3 else g
    state = m.get("initial_state")
    y, final = gated_linear_attention(0.5 * q, k, v, g, m.get("u"), initial_state=state, chunk=8)
    return (y.transpose(1, 2) if heads_first else y), final


GATED = {"gla": (False, "gk"), "linear_attn": (False, None), "simple_gla": (False, "g"), "rwkv6": (True, "w")}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("backend_name", NAMES)
@pytest.mark.parametrize("start", ["", "_init"])
@pytest.mark.parametrize("name", GATED)
def test_gated_linear_attention_gives_recorded_numbers(name, start, backend_name, dtype, tolerance):
    m = recorded(name + start, dtype)
    with backend(backend_name):
        y, final = gla_call(m, *GATED[name])
    close(y, m["o"], tolerance, "o")
    close(final, m["final_state"], tolerance, "final_state")


def wkv7_call(m: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A recorded call of RWKV-7, or of a delta rule whose matrix is diagonal, or one, plus low rank."""
    m = {key: x.transpose(1, 2) if x.dim() == 4 and not key.endswith("state") else x for key, x in m.items()}
    state = m.get("initial_state")
    if "w" in m:
        q, g, a, b = m["q"], -m["w"].exp(), m["a"], m["b"]
        state = None if state is None else state.mT
    else:
        q, g, a, b = 0.5 * m["q"], m.get("gk", torch.zeros_like(m["k"])), m["alpha"], m["beta"]
    y, final = wkv7(q, g, m["k"], m["v"], a, b, initial_state=state, chunk=8)
    return y.transpose(1, 2), final.mT if "w" in m else final


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("backend_name", NAMES)
@pytest.mark.parametrize("start", ["", "_init"])
@pytest.mark.parametrize("name", ["rwkv7", "dplr_delta_rule", "iplr_delta_rule"])
def test_wkv7_gives_recorded_numbers(name, start, backend_name, dtype, tolerance):
    m = recorded(name + start, dtype)
    with backend(backend_name):
        y, final = wkv7_call(m)
    close(y, m["o"], tolerance, "o")
    close(final, m["final_state"], tolerance, "final_state")


# Decays of every strength, and what they are compared on.


def arguments(which: str, decay: tuple[float, float], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Of two chunks and a bit; logarithms of decays lie evenly between two powers of ten."""
    generator = torch.Generator().manual_seed(seed)

    def normal(width: int) -> Tensor:
        return torch.randn(1, 130, 2, width, generator=generator)

    low, high = (torch.tensor(d).log() for d in decay)
    found = {"q": normal(3), "k": normal(3), "v": normal(2)}
    found["log_decay"] = -torch.exp(low + (high - low) * torch.rand(1, 130, 2, 3, generator=generator))
    if which == "bonus":
        found["bonus"] = torch.randn(2, 3, generator=generator)
    if which == "wkv7":
        found["r"], key = found.pop("q"), torch.nn.functional.normalize(normal(3), dim=-1)
        found |= {"a": -key, "b": key * torch.rand(key.shape, generator=generator)}
    return {name: m.to(dtype) for name, m in found.items()}


def results(which: str, given: dict[str, Tensor], name: str, seed: int = 0) -> dict[str, Tensor]:
    """Outputs, and gradients of a random sum of them."""
    generator = torch.Generator().manual_seed(seed + 1)
    leaves = {key: m.clone().requires_grad_() for key, m in given.items()}
    run: Callable[..., Any] = wkv7 if which == "wkv7" else gated_linear_attention
    with backend(name):
        y, final = run(**leaves)
    weights = [torch.randn(m.shape, generator=generator).to(m.dtype) for m in (y, final)]
    found = torch.autograd.grad((y, final), list(leaves.values()), weights)
    return {"y": y.detach(), "final": final.detach(), **dict(zip(leaves, found, strict=True))}


STRENGTHS = {"weak": (1e-4, 1e-2), "mixed": (1e-4, 3e3), "strong": (5.0, 20.0)}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("which", ["plain", "bonus", "wkv7"])
def test_weak_decays_beside_strong_ones_are_as_exact_as_a_loop(which, strength):
    """Outputs and all gradients, in float32: nothing overflows, and no small sum is a difference of large ones."""
    for seed in range(2):
        given = arguments(which, STRENGTHS[strength], torch.float32, seed)
        exact = results(which, {key: m.double() for key, m in given.items()}, "reference", seed)
        loop, found = (results(which, given, name, seed) for name in ("reference", "torch"))
        for key, want in exact.items():
            got, allowed = (float((m[key].double() - want).abs().max() / want.abs().max()) for m in (found, loop))
            assert got <= 3 * allowed + 1e-6, f"{key}: {got:.1e}, the loop {allowed:.1e}"


@pytest.mark.parametrize("which", ["plain", "bonus", "wkv7"])
def test_a_decay_may_forget_everything(which):
    given = arguments(which, STRENGTHS["weak"], torch.float64)
    given["log_decay"][:, [0, 30, 31, 64, 129]] = -torch.inf
    given["log_decay"][:, 90, :, 1] = -torch.inf
    want, got = (results(which, given, name) for name in NAMES)
    for key, m in want.items():
        if key != "log_decay":  # of which autograd makes 0 times infinity
            torch.testing.assert_close(got[key], m, rtol=1e-9, atol=1e-9)
    assert got["log_decay"].isfinite().all()


# Steps.


def one_step(which: str, dtype: torch.dtype, state: torch.dtype) -> tuple[Callable[..., Any], list[Tensor], Tensor]:
    """A function of one step, its arguments for three rows, and a table of five states."""
    given = {k: m[0, :3] for k, m in arguments(which, (1e-2, 3.0), dtype).items() if k != "bonus"}
    table = torch.randn(5, 2, 3, 2, generator=torch.Generator().manual_seed(3)).to(state)
    if which == "wkv7":
        return wkv7_update, [given[key] for key in ("r", "log_decay", "k", "v", "a", "b")], table
    bonus = [torch.tensor([[0.3, -1, 2], [0.1, 0, 1]], dtype=dtype)] if which == "bonus" else []
    return gated_linear_attention_update, [*(given[key] for key in ("q", "k", "v", "log_decay")), *bonus], table


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("state", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["plain", "bonus", "wkv7"])
def test_a_step_writes_rows_of_a_table(which, state, name):
    """In the dtype of the table, rounded once; padding gives zero; other rows keep their bits."""
    step, given, table = one_step(which, torch.float64 if state == torch.float64 else torch.float32, state)
    before, rows = table.clone(), torch.tensor([3, -1, 0])
    with backend(name), torch.no_grad():
        y, after = step(table, *given, out_state=table, rows=rows)
        want_y, want = step(before[[3, 1, 0]], *given)
        fresh = step(before, *given, rows=rows)[1]
    assert after is table and torch.equal(table[[1, 2, 4]], before[[1, 2, 4]])
    assert not y[1].any() and not fresh[1].any()
    for i, row in ((0, 3), (2, 0)):
        assert torch.equal(y[i], want_y[i]) and torch.equal(fresh[i], want[i])
        assert torch.equal(table[row], want[i].to(state))


@pytest.mark.parametrize("which", ["plain", "bonus", "wkv7"])
def test_what_does_not_fit_is_refused(which):
    given = arguments(which, (0.1, 1.0), torch.float32)
    run: Callable[..., Any] = wkv7 if which == "wkv7" else gated_linear_attention
    with pytest.raises(ArgumentError, match="chunk is 0, expected at least 1"):
        run(**given, chunk=0)
    with pytest.raises(ArgumentError, match=r"k has shape \(1, 130, 1, 3\), expected \(B, T, H, N\)"):
        run(**{**given, "k": given["k"][:, :, :1]})
    with pytest.raises(ArgumentError, match=r"initial_state is \(1, 2, 2, 3\), expected \(1, 2, 3, 2\)"):
        run(**given, initial_state=torch.zeros(1, 2, 2, 3))
    with pytest.raises(ArgumentError, match=r"v is torch.int64, expected a floating dtype"):
        run(**{**given, "v": given["v"].long()})
    step, one, table = one_step(which, torch.float32, torch.float32)
    with pytest.raises(ArgumentError, match="rows has an index 5, but state has 5 rows"):
        step(table, *one, rows=torch.tensor([0, 5, 1]))
    with pytest.raises(ArgumentError, match="out_state cannot be written to while gradients are recorded"):
        step(table[:3].requires_grad_(), *one, out_state=table[:3])
