"""Every filter against a few lines of plain Python, and the draw against its distribution."""

import math
import random

import pytest
import torch

from dualform.core.errors import ArgumentError
from dualform.generation.options import Sampling
from dualform.generation.sampling import (
    _GOLDEN,
    Wants,
    _mix,
    choose,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize,
    sample,
    table,
    uniform,
)
from dualform.ops.native import library
from dualform.ops.native.draw import draw

V = 13


@pytest.fixture
def logits():
    return torch.randn(50, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


def kept(filtered):
    return [{i for i, x in enumerate(row) if x > -math.inf} for row in filtered.tolist()]


def probabilities(row):
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("k", [1, 2, 7, V, V + 5])
def test_top_k_keeps_the_k_largest(logits, k):
    for row, keep in zip(logits.tolist(), kept(keep_top_k(logits, k)), strict=True):
        assert keep == set(sorted(range(V), key=lambda i: -row[i])[:k])


def test_top_k_keeps_what_equals_the_kth():
    assert kept(keep_top_k(torch.tensor([[1.0, 3.0, 1.0, 0.0]]), 2)) == [{0, 1, 2}]


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_shortest_run_that_reaches_p(logits, p):
    for row, keep in zip(logits.tolist(), kept(keep_top_p(logits, p)), strict=True):
        probs, total, want = probabilities(row), 0.0, set()
        for i in sorted(range(V), key=lambda i: -probs[i]):
            want.add(i)
            total += probs[i]
            if total >= p:
                break
        assert keep == want


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 1.0])
def test_min_p_is_relative_to_the_most_likely(logits, p):
    for row, keep in zip(logits.tolist(), kept(keep_min_p(logits, p)), strict=True):
        probs = probabilities(row)
        assert keep == {i for i in range(V) if probs[i] >= p * max(probs)}


@pytest.mark.parametrize("keep, value", [(keep_top_k, 3), (keep_top_p, 0.6), (keep_min_p, 0.2)])
def test_filters_leave_what_they_keep_alone(logits, keep, value):
    filtered = keep(logits, value)
    stays = filtered > -math.inf
    assert torch.equal(filtered[stays], logits[stays]) and 0 < stays.sum() < logits.numel()


def test_repetition_penalty(logits):
    history = torch.tensor([[-1, -1, 3, 3, 7]]).expand(len(logits), -1)
    got = penalize(logits, history, 1.5).tolist()
    for row, new in zip(logits.tolist(), got, strict=True):
        want = [(x / 1.5 if x > 0 else x * 1.5) if i in (3, 7) else x for i, x in enumerate(row)]
        assert new == want


def test_presence_penalty(logits):
    history = torch.tensor([[-1, 3, 3, 7]]).expand(len(logits), -1)
    got = penalize(logits, history, 1.5, 0.4).tolist()
    for row, new in zip(logits.tolist(), got, strict=True):
        assert new == [(x / 1.5 if x > 0 else x * 1.5) - 0.4 if i in (3, 7) else x for i, x in enumerate(row)]
    draws, best = torch.rand(len(logits)), logits.argmax(-1)
    second = logits.scatter(1, best[:, None], -math.inf).argmax(-1)
    for amount, want in ((1e9, second), (-1e9, best), (1e308, second)):
        sampling = Sampling(temperature=0.0, presence_penalty=amount)
        assert torch.equal(sample(logits, sampling, draws, best[:, None]), want)


def test_penalty_history_is_per_row(logits):
    got = penalize(logits[:2], torch.tensor([[0], [-1]]), 2.0)
    assert torch.equal(got[1], logits[1]) and not torch.equal(got[0], logits[0])


def test_greedy_is_the_argmax_after_the_penalty(logits):
    draws = torch.rand(len(logits))
    assert torch.equal(sample(logits, Sampling(temperature=0.0), draws), logits.argmax(-1))
    best = logits.argmax(-1, keepdim=True)
    second = logits.scatter(1, best, -math.inf).argmax(-1)
    positive = logits.abs() + 1
    best, second = (positive.argsort(-1)[:, i] for i in (-1, -2))
    got = sample(positive, Sampling(temperature=0.0, repetition_penalty=1e6), draws, best[:, None])
    assert torch.equal(got, second)


def test_draws_follow_the_filtered_distribution():
    """An even grid of draws must hit each token in proportion to temperature, then top-k, top-p, min-p."""
    row, n = [1.0, 0.5, 0.0, -0.5, -2.0, -9.0], 10_000
    draws = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.95, min_p=0.2)
    tokens = sample(torch.tensor([row]).expand(n, -1), sampling, draws)
    probs = probabilities([x / 0.7 for x in row])
    probs = [p if i < 5 else 0.0 for i, p in enumerate(probs)]
    probs = [p / sum(probs) for p in probs]
    assert sum(probs[:3]) < 0.95 <= sum(probs[:4])  # top-p drops the fifth
    assert probs[2] >= 0.2 * probs[0] > probs[3]  # min-p drops the fourth
    want = [p / sum(probs[:3]) if i < 3 else 0.0 for i, p in enumerate(probs)]
    got = (tokens.bincount(minlength=6) / n).tolist()
    assert all(abs(g - w) <= 1.5 / n for g, w in zip(got, want, strict=True))


def test_a_filtered_token_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(3, -1)
    draws = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert sample(logits, Sampling(), draws).tolist() == [1, 3, 3]


def test_rows_are_independent(logits):
    draws = torch.rand(len(logits), dtype=torch.float64)
    sampling = Sampling(temperature=0.9, top_k=8, top_p=0.9, min_p=0.01)
    together = sample(logits, sampling, draws)
    alone = [sample(logits[i : i + 1], sampling, draws[i : i + 1]) for i in range(len(logits))]
    assert torch.equal(together, torch.cat(alone))


def test_each_row_has_options_of_its_own(logits):
    """As if each were alone, whatever the others want."""
    choices = [
        Sampling(),
        Sampling(temperature=0.0),
        Sampling(temperature=0.0, repetition_penalty=1e3),
        Sampling(temperature=0.5, top_k=3),
        Sampling(top_k=V + 2, repetition_penalty=0.5),
        Sampling(top_k=2**62, top_p=0.7),
        Sampling(min_p=0.3, presence_penalty=1.5),
        Sampling(temperature=0.0, presence_penalty=0.7),
    ]
    generator = torch.Generator().manual_seed(1)
    draws = torch.rand(len(logits), dtype=torch.float64, generator=generator)
    history = torch.randint(-1, V, (len(logits), 4), generator=generator)
    for first in range(len(choices)):
        samplings = [choices[(first + i * i) % len(choices)] for i in range(len(logits))]
        together = sample(logits, samplings, draws, history)
        for i, sampling in enumerate(samplings):
            row = slice(i, i + 1)
            assert torch.equal(together[row], sample(logits[row], sampling, draws[row], history[row]))


def test_what_no_row_wants_is_not_computed(logits, monkeypatch):
    def refuse(*_):
        raise AssertionError

    for name in ("keep_top_k", "keep_top_p", "keep_min_p", "penalize"):
        monkeypatch.setattr(f"dualform.generation.sampling.{name}", refuse)
    draws = torch.rand(2, dtype=torch.float64)
    greedy = Sampling(temperature=0.0, top_k=3, top_p=0.5, min_p=0.1)  # its truncations do not matter
    sample(logits[:2], [greedy, Sampling()], draws, torch.zeros(2, 1, dtype=torch.int64))
    for sampling in (
        Sampling(top_k=1),
        Sampling(top_p=0.5),
        Sampling(min_p=0.5),
        Sampling(repetition_penalty=2.0),
        Sampling(presence_penalty=1.0),
    ):
        with pytest.raises(AssertionError):
            sample(logits[:2], [greedy, sampling], draws, torch.zeros(2, 1, dtype=torch.int64))


def test_uniform_is_splitmix64():
    """The published test vector: the first outputs of the generator seeded with 1234567."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [_mix(1234567 + (i + 1) * _GOLDEN) for i in range(5)] == published


def test_uniform_is_uniform_and_independent_between_seeds():
    n = 20_000
    for a, b in [(0, 1), (7, 8)]:
        x = torch.tensor([[uniform(seed, i) for i in range(n)] for seed in (a, b)], dtype=torch.float64)
        assert x.min() >= 0 and x.max() < 1
        assert (x.mean(1) - 0.5).abs().max() < 4 * (1 / 12 / n) ** 0.5
        assert torch.corrcoef(x)[0, 1].abs() < 4 / n**0.5
        assert torch.corrcoef(torch.stack([x[0, 1:], x[0, :-1]]))[0, 1].abs() < 4 / n**0.5


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", math.inf),
    ],
)
def test_values_outside_their_range_are_refused(name, value):
    with pytest.raises(ArgumentError, match=name):
        Sampling(**{name: value})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    logits = torch.zeros(2, V)
    logits[1, 4] = bad
    with pytest.raises(ArgumentError, match="not finite"):
        sample(logits, Sampling(temperature=temperature), torch.zeros(2))


@pytest.mark.parametrize("penalty", [1e308, 1e-308])
def test_no_penalty_is_so_large_that_a_token_beyond_the_vocabulary_is_drawn(penalty):
    last, history = torch.tensor([1 - 2**-53], dtype=torch.float64), torch.tensor([[0, 1, 2]])
    for logits in ([-100.0, -200.0, -300.0], [100.0, -200.0, 300.0], [0.0, 0.0, -torch.inf]):
        assert 0 <= int(sample(torch.tensor([logits]), Sampling(repetition_penalty=penalty), last, history)) <= 2


@pytest.mark.skipif(bool(library.missing), reason=library.missing)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_draws_what_the_definition_draws(dtype, threads):
    """With ties, as numbers of 16 bits have, tokens that cannot come, and rows that are not finite."""
    threads(2)
    dice = random.Random(0)
    for _ in range(60):
        rows, width, length = dice.choice([1, 2, 7]), dice.choice([1, 3, 50, 400]), dice.choice([0, 1, 9, 256])
        logits = (torch.randn(rows, width, dtype=torch.float64) * dice.choice([0.1, 1, 10])).to(dtype)
        logits[0, -1] = dice.choice([0.0, math.nan, math.inf, -math.inf])
        samplings = [
            Sampling(
                temperature=dice.choice([0.0, 0.5, 2.0]),
                top_k=dice.choice([0, 1, 5, 300]),
                top_p=dice.choice([1.0, 0.9, 0.3, 1e-6]),
                min_p=dice.choice([0.0, 0.1, 1.0]),
                repetition_penalty=dice.choice([1.0, 1.3, 0.5]),
                presence_penalty=dice.choice([0.0, 0.5, -0.5]),
            )
            for _ in range(rows)
        ]
        history, draws = torch.randint(-1, width, (rows, length)), torch.rand(rows, dtype=torch.float64)
        wants, found = Wants.of(samplings), torch.zeros(2, rows, dtype=torch.int64)
        tokens, finite = choose(logits, wants, table(samplings), draws, history)
        draw(logits, table(samplings), draws, history if wants.penalty else None, found)
        assert torch.equal(found[1] == 1, finite) and torch.equal(found[0][finite], tokens[finite])
        assert ((found[0] >= 0) & (found[0] < width)).all()
