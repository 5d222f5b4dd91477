"""The batch norm: PyTorch's over the elements that count, however they are laid out, and running ones in steps."""

from typing import Any

import pytest
import torch
from torch import nn

import dualform as df
from dualform.core.packing import from_lengths
from dualform.layers.block import SublayerConfig
from dualform.layers.norms import BatchNorm
from dualform.layers.s4d import S4DConfig
from dualform.models.heads import StepRegressor

LENGTHS = torch.tensor([9, 1, 6, 3])
KEEP = torch.arange(9) < LENGTHS[:, None]
close = torch.testing.assert_close


def model() -> StepRegressor:
    torch.manual_seed(0)
    parts: Any = {"S": (SublayerConfig(S4DConfig(d_state=4, bidirectional=True), norm="batch", after="batch"),)}
    return StepRegressor(df.ModelConfig(0, 6, parts, "SS", norm="batch", embed_norm="batch"), 1, inputs=2).double()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_it_is_that_of_pytorch() -> None:
    norm, other, x = BatchNorm(5, 0.1).double(), nn.BatchNorm1d(5, 0.1).double(), draw(4, 9, 5)
    with torch.no_grad():
        for mine, theirs in zip(norm.parameters(), other.parameters(), strict=True):
            mine.copy_(draw(5))
            theirs.copy_(mine)
    for _ in range(2):
        close(norm(x), other(x.flatten(0, 1)).view_as(x))
    close(norm.running_mean, other.running_mean)
    close(norm.running_var, other.running_var)
    for m in (norm, other):
        m.eval()
    close(norm(x), other(x.flatten(0, 1)).view_as(x))
    sums = norm(x, x)
    close(sums[0], norm(2 * x))
    close(sums[1], 2 * x)


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_padding_counts_for_nothing_packed_and_compiled() -> None:
    """The gradients, too, and what the running ones become."""
    x, found = draw(4, 9, 2), []

    def run(call: Any, **given: Any) -> None:
        of = model()
        y, _ = call(of, given.pop("x", x), **given)
        y = y[KEEP] if y.shape[0] == 4 else y[0]
        grads = torch.autograd.grad((y * draw(len(y), 1)).sum(), list(of.parameters()))
        found.append([y, *grads, *of.buffers()])

    def compiled(of: Any, x: torch.Tensor, **given: Any) -> Any:
        return torch.compile(of.forward, backend="eager")(x, **given)

    run(lambda of, x, **given: of(x, **given), x=x[KEEP][None], cu_seqlens=from_lengths(LENGTHS))
    run(lambda of, x, **given: of(x, **given), lengths=LENGTHS)
    run(lambda of, x, **given: of(x, **given), x=x.masked_fill(~KEEP[..., None], 1e3), attention_mask=KEEP)
    run(compiled, x=x.masked_fill(~KEEP[..., None], 1e3), attention_mask=KEEP)
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            close(got, want)
    assert not torch.equal(found[0][-1], torch.ones(6, dtype=torch.float64))


def test_a_step_and_an_evaluation_use_what_ran_along() -> None:
    norm, x = BatchNorm(3).double(), draw(2, 4, 3)
    norm(x)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    want = (x - mean) / (var + 1e-5).sqrt()
    close(norm(x[:, 0]), want[:, 0])  # a step, while training
    with torch.no_grad():
        close(norm(x), want)
    close(norm.eval()(x), want)
    close([norm.running_mean, norm.running_var], [mean, var])


def test_one_element_has_no_variance() -> None:
    norm, x = BatchNorm(3).double(), draw(1, 1, 3)
    close(norm(x), x / (1 + 1e-5) ** 0.5)
    assert norm.running_mean.tolist() == [0, 0, 0] and norm.running_var.tolist() == [1, 1, 1]


def test_a_forward_that_runs_once_more_moves_nothing_twice() -> None:
    found = []
    for recompute in (False, True):
        of = model()
        of.recompute = recompute
        of(draw(2, 5, 2))[0].sum().backward()
        found.append([*of.buffers(), *(p.grad for p in of.parameters())])
    close(found[1], found[0])


def test_running_ones_are_saved(tmp_path: Any) -> None:
    of, x = model(), draw(2, 5, 2)
    of(x)
    df.save(of, tmp_path)
    close(df.load(tmp_path).eval()(x)[0], of.eval()(x)[0], rtol=0, atol=0)
