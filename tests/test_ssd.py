"""State space duality beyond what holds for every operator: how exact it is."""

import pytest
import torch
from torch import Tensor

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


def as_exact_as_a_loop(name: str, steps: tuple[float, float], seed: int) -> None:
    exact = gradients("reference", torch.float64, steps, seed)
    loop, found = (gradients(b, torch.float32, steps, seed) for b in ("reference", name))
    for k, want in exact.items():
        got, allowed = (float((m[k].double() - want).abs().max() / want.abs().max()) for m in (found, loop))
        assert got <= 2 * allowed + 1e-7, f"{k}: {got:.1e}, the loop {allowed:.1e}"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("steps", DECAYS.values(), ids=list(DECAYS))
def test_gradients_of_decays_are_as_exact_as_a_loop(name, steps):
    """They are small sums beside large ones: of what passes a decay, and of what does not."""
    for seed in range(3):
        as_exact_as_a_loop(name, steps, seed)
