"""The laws can fail: each planted bug is found by the laws that it breaks, and a correct recurrence breaks none."""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dualform.core.deviation import deviation
from dualform.core.laws import LAWS, Trial
from dualform.core.packing import pack, unpack
from dualform.core.tree import concat, take, tree_map

D = 3


class LeakyState(NamedTuple):
    h: Tensor  # (B, D)
    last: Tensor  # (B, D), the input before
    seen: Tensor  # (B,)


class Leaky(nn.Module):
    """``h_t = a h_{t-1} + w x_t,  y_t = c h_t + x_{t-1}``, by a loop: right in every form."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.9, 0.5, -0.7], dtype=torch.float64))
        self.w = nn.Parameter(torch.randn(D, dtype=torch.float64))
        self.c = nn.Parameter(torch.randn(D, dtype=torch.float64))

    def init_state(self, batch, *, max_len=0):
        zeros = torch.zeros(batch, D, dtype=torch.float64)
        return LeakyState(zeros, zeros, torch.zeros(batch, dtype=torch.int64))

    def forward(self, x, state=None, *, cu_seqlens=None):
        if cu_seqlens is not None:
            return self.pack(x, state, cu_seqlens)
        state = self.init_state(len(x)) if state is None else state
        outputs = []
        for x_t in x.unbind(1):
            y, state = self.cell(x_t, state)
            outputs.append(tree_map(lambda leaf: leaf[:, None], y))
        return concat(outputs, 1), state

    def pack(self, x, state, cu_seqlens):
        borders = cu_seqlens.tolist()
        state = self.init_state(len(borders) - 1) if state is None else state
        outputs, states = [], []
        for i, (start, end) in enumerate(pairwise(borders)):
            row = take(state, slice(i, i + 1))
            if end > start:
                y, row = self.forward(x[:, start:end], row)
                outputs.append(y)
            states.append(row)
        return concat(outputs, 1), concat(states)

    def step(self, x, state):
        return self.cell(x, state)

    def cell(self, x, state):
        h = self.a * state.h + self.w * x
        return self.c * h + state.last, LeakyState(h, x, state.seen + 1)


class Masked(Leaky):
    """The same with an attention mask."""

    def forward(self, x, state=None, *, cu_seqlens=None, attention_mask=None):
        if attention_mask is None:
            return super().forward(x, state, cu_seqlens=cu_seqlens)
        keep = attention_mask.bool()
        flat, cu_seqlens = pack(x, keep)
        y, state = self.pack(flat, state, cu_seqlens)
        return unpack(y, keep), state


class Several(Leaky):
    """The same with a named tuple of outputs."""

    def cell(self, x, state):
        y, state = super().cell(x, state)
        return LeakyState(y, y * 2, y.sum(-1)), state


class NoDecayAtBorder(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        if state is not None and cu_seqlens is None:
            state = state._replace(h=state.h / self.a)
        return super().forward(x, state, cu_seqlens=cu_seqlens)


class ForgetsOneStateLeaf(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        y, after = super().forward(x, state, cu_seqlens=cu_seqlens)
        return y, after._replace(last=torch.zeros_like(after.last))


class WrongStep(Leaky):
    def step(self, x, state):
        y, after = self.cell(x, state)
        return y, after._replace(h=state.h + self.w * x)


class WrongStepCount(Leaky):
    def step(self, x, state):
        y, after = self.cell(x, state)
        return y, after._replace(seen=state.seen)


class NoResetWhenPacked(Leaky):
    def pack(self, x, state, cu_seqlens):
        n = len(cu_seqlens) - 1
        state = self.init_state(n) if state is None else state
        y, row = self.forward(x, tree_map(lambda leaf: leaf[:1], state))
        return y, tree_map(lambda leaf: leaf.expand(n, *leaf.shape[1:]), row)


class LosesEmptySequences(Leaky):
    def pack(self, x, state, cu_seqlens):
        y, after = super().pack(x, state, cu_seqlens)
        empty = (cu_seqlens.diff() == 0)[:, None]
        return y, after._replace(h=torch.where(empty, torch.zeros_like(after.h), after.h))


class PacksInt64Only(Leaky):
    def pack(self, x, state, cu_seqlens):
        y, after = super().pack(x, state, cu_seqlens)
        return (y if cu_seqlens.dtype == torch.int64 else y * 1.1), after


class ReadsTheFuture(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        y, after = super().forward(x, state, cu_seqlens=cu_seqlens)
        return y + 0.01 * torch.cat([x[:, 1:], x[:, :1] * 0], 1), after


class CircularConvolution(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        y, after = super().forward(x, state, cu_seqlens=cu_seqlens)
        return y + 1e-3 * x.roll(2, 1), after


class MixesRows(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        y, after = super().forward(x, state, cu_seqlens=cu_seqlens)
        return y - y.mean(0, keepdim=True) * (x.shape[0] > 1), after


class MixesGradientsOfRows(Leaky):
    def cell(self, x, state):
        y, after = super().cell(x, state)
        leak = y.sum(0)
        return y + leak - leak.detach(), after


class DetachesFinalState(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        y, after = super().forward(x, state, cu_seqlens=cu_seqlens)
        return y, tree_map(torch.detach, after)

    def step(self, x, state):
        y, after = super().step(x, state)
        return y, tree_map(torch.detach, after)


class DetachesInitialState(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        state = None if state is None else tree_map(torch.detach, state)
        return super().forward(x, state, cu_seqlens=cu_seqlens)


class DetachesEveryWrite(Leaky):
    def cell(self, x, state):
        y, after = super().cell(x, state)
        return y, after._replace(h=after.h.detach(), last=after.last.detach())


class WrongBackwardWhenPacked(Leaky):
    def pack(self, x, state, cu_seqlens):
        return super().pack(2 * x - x.detach(), state, cu_seqlens)


class FreshIsNotInitial(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        if state is None:
            state = self.init_state(len(x) if cu_seqlens is None else len(cu_seqlens) - 1)
            state = state._replace(h=state.h + 0.1)
        return super().forward(x, state, cu_seqlens=cu_seqlens)


class FreshLosesItsEnd(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        y, after = super().forward(x, state, cu_seqlens=cu_seqlens)
        return y, after if state is not None else self.init_state(len(after.h))


class BatchIsSecond(Leaky):
    def init_state(self, batch, *, max_len=0):
        return super().init_state(batch)._replace(last=torch.zeros(D, batch, dtype=torch.float64))


class ForgetsStatePrecision(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        y, after = super().forward(x, state, cu_seqlens=cu_seqlens)
        return y, after._replace(h=after.h.float())


class StepKeepsTime(Leaky):
    def step(self, x, state):
        return self.forward(x[:, None], state)


class WritesIntoItsInput(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        result = super().forward(x.clone(), state, cu_seqlens=cu_seqlens)
        if not torch.is_grad_enabled():
            x += 1
        return result


class IgnoresTheMask(Masked):
    def forward(self, x, state=None, *, cu_seqlens=None, attention_mask=None):
        y, after = super().forward(x, state, cu_seqlens=cu_seqlens)
        return (y if attention_mask is None else y * attention_mask[..., None]), after


class RightPaddingOnly(Masked):
    def forward(self, x, state=None, *, cu_seqlens=None, attention_mask=None):
        if attention_mask is not None:
            lengths = attention_mask.sum(1, keepdim=True)
            attention_mask = torch.arange(x.shape[1]) < lengths
        return super().forward(x, state, cu_seqlens=cu_seqlens, attention_mask=attention_mask)


class SpeaksInThePadding(Masked):
    def forward(self, x, state=None, *, cu_seqlens=None, attention_mask=None):
        y, after = super().forward(x, state, cu_seqlens=cu_seqlens, attention_mask=attention_mask)
        return (y if attention_mask is None else torch.where(attention_mask.bool()[..., None], y, x)), after


class SometimesNaN(Leaky):
    def step(self, x, state):
        y, after = super().step(x, state)
        return y * math.nan, after


class WritesIntoWhatItIsGiven(Leaky):
    def cell(self, x, state):
        y, after = super().cell(x, state)
        if torch.is_grad_enabled():
            return y, after
        return y, after._replace(h=state.h.copy_(after.h))


class WritesIntoRecordedStates(Leaky):
    def forward(self, x, state=None, *, cu_seqlens=None):
        y, after = super().forward(x, state, cu_seqlens=cu_seqlens)
        if torch.is_grad_enabled() and state is not None:
            with torch.no_grad():
                state.seen.add_(1)
        return y, after


class MultipliesOtherRowsByZero(Leaky):
    def cell(self, x, state):
        y, after = super().cell(x, state)
        return y + 0 * x.sum(0), after


class MultipliesOtherSequencesByZero(Leaky):
    def pack(self, x, state, cu_seqlens):
        y, after = super().pack(x, state, cu_seqlens)
        return y, after._replace(h=after.h + 0 * y.sum(1))


BUGS = {
    NoDecayAtBorder: {"split", "step", "gradient", "final state"},
    ForgetsOneStateLeaf: {"split", "step", "gradient", "final state"},
    WrongStep: {"step", "gradient", "final state"},
    WrongStepCount: {"step"},
    NoResetWhenPacked: {"packed", "gradient", "final state"},
    LosesEmptySequences: {"packed", "gradient", "final state"},
    PacksInt64Only: {"packed"},
    ReadsTheFuture: {"causal", "split", "step", "packed", "gradient"},
    CircularConvolution: {"causal", "split", "step"},
    MixesRows: {"rows"},
    MixesGradientsOfRows: {"gradient"},
    DetachesFinalState: {"gradient", "final state"},
    DetachesInitialState: {"gradient", "final state"},
    DetachesEveryWrite: {"final state"},
    WrongBackwardWhenPacked: {"gradient", "final state"},
    FreshIsNotInitial: {"fresh"},
    FreshLosesItsEnd: {"fresh"},
    BatchIsSecond: {"layout"},
    ForgetsStatePrecision: {"layout"},
    StepKeepsTime: {"layout", "step"},
    WritesIntoItsInput: {"layout"},
    IgnoresTheMask: {"padded left", "padded between", "padded right", "gradient"},
    RightPaddingOnly: {"padded left", "padded between", "gradient"},
    SpeaksInThePadding: {"padded left", "padded between", "padded right", "gradient"},
    SometimesNaN: {"step", "gradient"},
    WritesIntoWhatItIsGiven: {"ownership"},
    WritesIntoRecordedStates: {"ownership"},
    MultipliesOtherRowsByZero: {"contained"},
    MultipliesOtherSequencesByZero: {"contained"},
}


def trial(f: nn.Module, length: int = 9, warmup: int = 3, seed: int = 0) -> Trial:
    return Trial(f, torch.randn(4, warmup + length, D, dtype=torch.float64), warmup=warmup, seed=seed)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("right", [Leaky, Masked, Several])
def test_a_correct_recurrence_obeys(law: str, right: type[nn.Module]):
    for length, warmup, seed in [(1, 0, 0), (2, 3, 1), (9, 3, 2), (9, 0, 3)]:
        found = LAWS[law](trial(right(), length, warmup, seed))
        if found is None:
            assert law.startswith("padded") or (law == "causal" and length == 1)
        else:
            assert found.error < 1e-12, found


@pytest.mark.parametrize(("bug", "law"), [(bug, law) for bug, broken in BUGS.items() for law in sorted(broken)])
def test_a_bug_is_found(bug: type[nn.Module], law: str):
    found = LAWS[law](trial(bug()))
    assert found is not None
    assert found.error > 1e-4, found
    assert found.where


def test_padding_does_not_apply_without_a_mask():
    for law in ("padded left", "padded right", "padded between"):
        assert LAWS[law](trial(Leaky())) is None
        assert LAWS[law](trial(Masked())) is not None


def test_every_law_is_broken_by_a_bug():
    assert set().union(*BUGS.values()) == set(LAWS)


def test_laws_leave_parameters_as_they_were():
    f = Leaky()
    before = {name: p.detach().clone() for name, p in f.named_parameters()}
    for law in LAWS.values():
        law(trial(f))
    assert all(torch.equal(p, before[name]) for name, p in f.named_parameters())


def test_ragged_lengths_hold_an_empty_and_a_single_one():
    for seed in range(5):
        lengths = trial(Leaky(), seed=seed).lengths
        assert {0, 1, 9} <= set(lengths), lengths


def test_deviation_is_relative_and_never_forgives_a_nan():
    one = torch.tensor([1.0, 1000.0])
    assert deviation(one, one, "").error == 0
    assert deviation(one + torch.tensor([0.0, 1.0]), one, "").error == pytest.approx(1e-3)
    assert deviation(one * math.nan, one, "").error == math.inf
    assert deviation(one * math.nan, one * math.nan, "").error == math.inf
    assert deviation(one * math.inf, one * math.inf, "").error == 0
    assert deviation(one, one.double(), "").error == math.inf
    assert deviation(one, one[:1], "").error == math.inf
    assert deviation((one,), one, "").error == math.inf
    assert deviation(torch.tensor([1, 2]), torch.tensor([1, 3]), "").error == math.inf
    assert deviation(torch.zeros(0), torch.zeros(0), "").error == 0


def test_deviation_measures_small_tensors_by_their_neighbours():
    noise = {"large": torch.ones(2), "zero": torch.tensor([1e-9])}
    want = {"large": torch.ones(2), "zero": torch.zeros(1)}
    assert deviation(noise, want, "gradient").error == pytest.approx(1e-7)
    assert deviation(noise, want, "gradient of").where == "gradient of zero"
