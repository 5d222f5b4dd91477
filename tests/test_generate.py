"""Generation against a loop that knows no state, and against itself when interrupted anywhere."""

import subprocess
import sys

import pytest
import torch

from dualform.core.errors import ArgumentError
from dualform.core.tree import leaves, nbytes
from dualform.generation import request
from dualform.generation.engine import generate
from dualform.generation.options import Sampling
from dualform.generation.sampling import sample, uniform
from dualform.generation.session import WINDOW
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel

V = 17
EVERYTHING = Sampling(temperature=0.9, top_k=12, top_p=0.97, min_p=0.01, repetition_penalty=1.2)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def build(pattern, dtype=torch.float32):
    torch.manual_seed(0)
    mamba = Mamba2Config(d_state=8, d_head=4)
    parts = {"M": (mamba,), "A": (AttentionConfig(heads=2), MLPConfig())}
    model = LanguageModel(ModelConfig(V, 12, {k: parts[k] for k in set(pattern)}, pattern)).to(dtype)
    with torch.no_grad():  # a fresh model is close to uniform; a peaked one tells tokens apart
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model.eval()


@pytest.fixture(scope="module", params=["MM", "MA"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def ssm():
    return build("MM")


def forgetful(model, prompt, n, sampling, seed):
    """Generation without a state: the whole text through the model for every token."""
    tokens = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            logits, _ = model(torch.tensor([tokens]))
        draw = torch.tensor([uniform(seed, len(tokens))], dtype=torch.float64)
        tokens.append(int(sample(logits[:, -1], sampling, draw, torch.tensor([tokens[-WINDOW:]]))))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("pattern", ["MM", "MA"])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(), EVERYTHING])
def test_equals_a_loop_without_a_state(pattern, sampling):
    model = build(pattern, torch.float64)
    got = list(generate(model, PROMPT, 30, sampling=sampling, seed=5))
    assert got == forgetful(model, PROMPT, 30, sampling, 5)
    assert len(set(got)) > 1


def test_prompt_in_pieces(monkeypatch):
    model, prompt = build("MA", torch.float64), (PROMPT * 3)[:23]
    whole = generate(model, prompt, 0).state
    monkeypatch.setattr(request, "_LEAST_PIECE", 1)
    for size in (1, 5, 22, 23):
        monkeypatch.setattr(request, "PREFILL", {"cpu": size * model.config.d_model})
        parts = generate(model, prompt, 0).state
        assert parts.tokens == 23 and torch.equal(parts.history, whole.history)
        torch.testing.assert_close(parts.logits, whole.logits)


@pytest.mark.parametrize("k", [0, 1, 7, 19, 20])
def test_an_interruption_changes_nothing(model, k):
    unbroken = generate(model, PROMPT, 20, sampling=EVERYTHING, seed=3)
    tokens = list(unbroken)
    first = generate(model, PROMPT, k, sampling=EVERYTHING, seed=3)
    head = list(first)
    second = generate(model, [], 20 - k, sampling=EVERYTHING, state=first.state)
    assert head + list(second) == tokens
    for got, want in zip(leaves(second.state), leaves(unbroken.state), strict=True):
        assert torch.equal(got, want)


def test_asking_for_the_state_changes_nothing(model):
    want = list(generate(model, PROMPT, 12, seed=1))
    generation, got, sessions = generate(model, PROMPT, 12, seed=1), [], []
    for token in generation:
        got.append(token)
        sessions.append(generation.state)
    assert got == want
    for i, session in enumerate(sessions):
        assert session.tokens == len(PROMPT) + i + 1
        assert list(generate(model, [], 11 - i, state=session)) == want[i + 1 :]


def test_a_session_is_a_value(model):
    """Two continuations of it take turns and do not meet; attention writes into the free places of its cache."""
    generation = generate(model, PROMPT, 3)
    list(generation)
    session = generation.state
    before = [leaf.clone() for leaf in leaves(session)]
    alone = [list(generate(model, [], 12, state=session.fork(), seed=seed)) for seed in (1, 2)]
    turns = zip(*(generate(model, [], 12, state=session, seed=seed) for seed in (1, 2)), strict=True)
    assert [list(tokens) for tokens in zip(*turns, strict=True)] == alone
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(session), strict=True))


def test_a_longer_run_begins_with_the_shorter(model):
    assert list(generate(model, PROMPT, 20))[:8] == list(generate(model, PROMPT, 8))


def test_seeds_and_forks(ssm):
    runs = [list(generate(ssm, PROMPT, 20, seed=seed)) for seed in (0, 1)]
    assert runs[0] == list(generate(ssm, PROMPT, 20)) and runs[0] != runs[1]
    session = generate(ssm, PROMPT, 0).state
    assert list(generate(ssm, [], 20, state=session)) == runs[0]
    assert list(generate(ssm, [], 20, state=session.fork(1))) == runs[1]
    assert list(generate(ssm, [], 20, state=session, seed=1)) == runs[1]


@pytest.mark.parametrize("pattern", ["MM", "MA"])
def test_more_prompt_continues_the_text(pattern):
    model = build(pattern, torch.float64)
    generation = generate(model, PROMPT, 5)
    text = PROMPT + list(generation) + [8, 8, 2]
    got = generate(model, [8, 8, 2], 10, state=generation.state)
    assert list(got) == list(generate(model, text, 10))
    assert got.state.tokens == len(text) + 10


def test_stop_token(ssm):
    free = list(generate(ssm, PROMPT, 40))
    token = free[6]
    generation = generate(ssm, PROMPT, 40, stop=[token])
    assert list(generation) == free[: free.index(token) + 1]
    assert generation.finish == "stop" and list(generation) == []


def test_stop_sequence_and_the_end(ssm):
    free = list(generate(ssm, PROMPT, 40))
    sequence = tuple(free[4:7])
    first = next(i for i in range(3, 41) if tuple(free[i - 3 : i]) == sequence)
    generation = generate(ssm, PROMPT, 40, stop=[[0] * 9, sequence])
    assert list(generation) == free[:first] and generation.finish == "stop"
    ended = generate(ssm, PROMPT, 4)
    assert ended.finish == "" and len(list(ended)) == 4 and ended.finish == "length"


def test_stop_sequence_across_an_interruption(ssm):
    free = list(generate(ssm, PROMPT, 10))
    first = generate(ssm, PROMPT, 4)
    list(first)
    second = generate(ssm, [], 10, state=first.state, stop=[free[2:6]])
    assert list(second) == free[4:6] and second.finish == "stop"


def test_stop_sequence_does_not_reach_into_the_prompt(ssm):
    free = list(generate(ssm, PROMPT, 3))
    assert list(generate(ssm, PROMPT, 3, stop=[[PROMPT[-1], free[0]]])) == free
    earlier = generate(ssm, PROMPT, 5)
    list(earlier)
    free = list(generate(ssm, PROMPT, 3, state=earlier.state))
    assert list(generate(ssm, PROMPT, 3, stop=[[PROMPT[-1], free[0]]], state=earlier.state)) == free


def test_the_model_is_left_as_it_was(ssm):
    ssm.train()
    generation = generate(ssm, PROMPT, 2)
    for _ in generation:
        assert ssm.training
    state = generation.state
    ssm.eval()
    assert not any(leaf.requires_grad or leaf.is_inference() for leaf in leaves(state))


def test_kinds_of_prompts(ssm):
    want = list(generate(ssm, PROMPT, 5))
    for prompt in (bytes(PROMPT), tuple(PROMPT), torch.tensor(PROMPT), torch.tensor(PROMPT, dtype=torch.int32)):
        assert list(generate(ssm, prompt, 5)) == want


def test_state_size_is_constant_without_attention(ssm):
    sizes = {generate(ssm, PROMPT * n, 1).state.nbytes for n in (1, 10, 400)}
    assert len(sizes) == 1
    hybrid = build("MA")
    assert nbytes(generate(hybrid, PROMPT * 10, 1).state) > nbytes(generate(hybrid, PROMPT, 1).state)


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_memory_does_not_grow_with_the_prompt():
    """200,000 tokens in the memory of 100; features of the whole length would take 25 MiB, its logits 200."""
    code = """
import resource, torch
from dualform import LanguageModel, ModelConfig, generate
from dualform.layers.mamba2 import Mamba2Config
torch.set_num_threads(1)
torch.manual_seed(0)
model = LanguageModel(ModelConfig(256, 32, {"M": (Mamba2Config(d_state=16, d_head=16),)}, "M"))
for length in (100, 200_000):
    state = generate(model, bytes(i % 251 for i in range(length)), 0).state
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, state.nbytes)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peak, size, long_peak, long_size = map(int, run.stdout.split())
    assert long_size == size and long_peak <= 1.05 * peak


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt_tokens": []}, "prompt is empty"),
        ({"prompt_tokens": "text"}, "is text"),
        ({"prompt_tokens": [1, V]}, "vocabulary is 0 to 16"),
        ({"prompt_tokens": [-1]}, "vocabulary"),
        ({"prompt_tokens": [[1, 2]]}, r"shape \(1, 2\)"),
        ({"prompt_tokens": torch.ones(3)}, "float32"),
        ({"prompt_tokens": [1.5]}, "prompt_tokens"),
        ({"prompt_tokens": [None]}, "prompt_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": 3}, "stop"),
        ({"stop": [[]]}, "stop"),
        ({"stop": [V]}, "stop"),
        ({"stop": [[0] * (WINDOW + 1)]}, "stop"),
        ({"state": (torch.zeros(1),)}, "expected a Session"),
    ],
)
def test_bad_arguments_are_named(ssm, change, message):
    arguments = {"prompt_tokens": PROMPT, "max_new_tokens": 4, **change}
    with pytest.raises(ArgumentError, match=message):
        generate(ssm, **arguments)


def test_a_session_of_another_vocabulary_is_refused(ssm):
    session = generate(ssm, PROMPT, 0).state
    with pytest.raises(ArgumentError, match="logits"):
        generate(ssm, [], 4, state=session._replace(logits=torch.zeros(1, V + 1)))
