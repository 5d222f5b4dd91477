"""Requests that share the rows of an engine: each has the tokens that it has alone, whoever comes and goes."""

import random

import pytest
import torch

import dualform
from dualform.core.errors import ArgumentError
from dualform.core.tree import leaves
from dualform.generation import request
from dualform.generation.batch import Engine, generate_batch
from dualform.generation.engine import generate
from dualform.generation.options import Sampling
from dualform.generation.session import Session
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.registry import MIXERS
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from test_decoder import GREEDY, PARTS, on_gpu
from test_generate import EVERYTHING, PROMPT, V

KINDS = {
    "M": (Mamba2Config(d_state=8, d_head=4),),
    "m": (MambaConfig(d_state=4),),
    "A": (AttentionConfig(heads=2),),
    "W": (AttentionConfig(heads=2, window=5), MLPConfig()),
}
SAMPLINGS = [
    GREEDY,
    EVERYTHING,
    Sampling(),
    Sampling(temperature=0.0, repetition_penalty=1.3),
    Sampling(temperature=1.4, top_k=3),
    Sampling(top_p=0.8),
    Sampling(min_p=0.1, presence_penalty=0.5),
    Sampling(temperature=0.6, top_k=V + 3, repetition_penalty=1.5),
]


def build(pattern, dtype=torch.float64):
    """A peaked model, so that no rounding decides between tokens."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(V, 12, {k: KINDS[k] for k in set(pattern)}, pattern)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model.eval()


@pytest.fixture(scope="module")
def ssm():
    return build("MM", torch.float32)


@pytest.fixture
def short_pieces(monkeypatch):
    """Prompts are read four tokens at a time."""
    monkeypatch.setattr(request, "_LEAST_PIECE", 1)
    monkeypatch.setattr(request, "PREFILL", {"cpu": 4 * 12})


def asked(dice, most=30):
    """A prompt, how many tokens, and options."""
    prompt = [dice.randrange(V) for _ in range(dice.choice([1, 2, 5, 11]))]
    options = {"sampling": dice.choice(SAMPLINGS), "seed": dice.randrange(100)}
    if dice.random() < 0.3:
        options["stop"] = [dice.randrange(V), [dice.randrange(V), dice.randrange(V)]]
    return prompt, dice.randrange(most), options


@pytest.mark.parametrize("pattern", ["MM", "mm", "MA", "mWA"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_join_and_leave_at_random(pattern, seed, short_pieces):
    join_and_leave(build(pattern), random.Random(seed))


def join_and_leave(model, dice):
    """Requests of all kinds, at random; each has the tokens that it has alone."""
    engine, came, heard = Engine(model, rows=dice.choice([1, 2, 3, 5])), [], {}
    for _ in range(60):
        for _ in range(dice.choice([0, 0, 0, 1, 3]) if len(came) < 12 else 0):
            prompt, most, options = asked(dice)
            came.append((engine.admit(prompt, most, **options), prompt, most, options))
        for one, token in engine.step():
            heard.setdefault(one, []).append(token)
        if engine.running and dice.random() < 0.1:
            one = dice.choice(engine.running)
            begun, session = len(one.tokens), engine.release(one)
            assert one.finish == "released"
            _, prompt, most, options = next(entry for entry in came if entry[0] is one)
            options = {k: v for k, v in options.items() if k != "seed"}
            if dice.random() < 0.5:
                rest = list(generate(model, [], most - begun, state=session, **options))
            else:
                again = engine.admit([], most - begun, state=session, **options)
                for other, token in engine:
                    heard.setdefault(other, []).append(token)
                rest = again.tokens
            heard.setdefault(one, []).extend(rest)
    for one, token in engine:
        heard.setdefault(one, []).append(token)
    assert not engine.running and not engine.waiting and len(came) > 5
    for one, prompt, most, options in came:
        alone = generate(model, prompt, most, **options)
        assert heard.get(one, []) == list(alone)
        assert one.finish in (alone.finish, "released")


@pytest.mark.parametrize("kind", MIXERS)
def test_every_mixer_has_rows(kind):
    """Of prompts of several lengths, that go on anywhere."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(V, 64, {"X": (MIXERS[kind](),)}, "X")).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    engine, prompts = Engine(model, rows=2), [[1], PROMPT * 4, PROMPT, [2, 3]]
    requests = [engine.admit(prompt, 4 + i, seed=i) for i, prompt in enumerate(prompts)]
    while len(requests[-1].tokens) < 3:
        engine.step()
    for i, (one, prompt) in enumerate(zip(requests, prompts, strict=True)):
        want = list(generate(model, prompt, 14, seed=i))
        assert one.tokens + list(generate(model, [], 14 - len(one.tokens), state=engine.release(one))) == want


@pytest.mark.parametrize("pattern", ["MM", "MA", "MW"])
def test_a_session_is_that_of_its_request_alone(pattern):
    model = build(pattern)
    engine = Engine(model, rows=3)
    requests = [engine.admit(PROMPT[: 3 + i], 20, sampling=EVERYTHING, seed=i) for i in range(3)]
    for _ in range(7):
        engine.step()
    for i, one in enumerate(requests):
        alone = generate(model, PROMPT[: 3 + i], 7, sampling=EVERYTHING, seed=i)
        assert one.tokens == list(alone)
        got, want = engine.release(one), alone.state
        for name in ("history", "generated", "position", "seed", "model"):
            assert torch.equal(getattr(got, name), getattr(want, name))
        torch.testing.assert_close(got.logits, want.logits)
        assert not any(leaf.is_inference() or leaf.requires_grad for leaf in leaves(got))


def test_a_session_of_an_engine_is_saved_and_read(ssm, tmp_path):
    for model in (ssm, build("MA")):
        engine = Engine(model, rows=2)
        short, long = engine.admit([1, 2], 30), engine.admit(PROMPT * 3, 30)
        for _ in range(5):
            engine.step()
        for one, prompt in ((short, [1, 2]), (long, PROMPT * 3)):
            engine.release(one).save(tmp_path / "a.session", model)
            session = Session.load(tmp_path / "a.session", model)
            assert list(generate(model, [], 9, state=session)) == list(generate(model, prompt, 14))[5:]


def test_a_request_that_ended_or_waits_is_released(ssm, short_pieces):
    engine, prompt = Engine(ssm, rows=1), PROMPT * 2
    first, second, third = (engine.admit(prompt, n, seed=n) for n in (6, 8, 0))
    while not first.finish:
        engine.step()
    assert first.finish == "length" and second in engine.waiting
    want = list(generate(ssm, prompt, 30, seed=6))
    assert list(generate(ssm, [], 24, state=engine.release(first))) == want[6:]
    session = engine.release(second)
    assert session.tokens == len(prompt) and second.finish == "released" and second.tokens == []
    assert list(generate(ssm, [], 30, state=session)) == list(generate(ssm, prompt, 30, seed=8))
    assert list(engine) == [] and third.finish == "length"
    assert list(generate(ssm, [], 5, state=engine.release(third), seed=6)) == want[:5]
    with pytest.raises(ArgumentError, match="released before"):
        engine.release(first)
    with pytest.raises(ArgumentError, match="another engine"):
        engine.release(Engine(ssm).admit(PROMPT, 3))


def test_a_stop_ends_one_request(ssm):
    free = list(generate(ssm, PROMPT, 20))
    engine = Engine(ssm, rows=2)
    stopped, other = engine.admit(PROMPT, 20, stop=[free[3:5]]), engine.admit(PROMPT, 20)
    list(engine)
    assert free[: len(stopped.tokens)] == stopped.tokens and stopped.tokens[-2:] == free[3:5]
    assert stopped.finish == "stop" and other.tokens == free and other.finish == "length"


def test_a_long_prompt_stalls_the_others_by_one_piece(ssm, short_pieces, monkeypatch):
    engine, read = Engine(ssm, rows=2), []
    features = ssm.features
    monkeypatch.setattr(ssm, "features", lambda x, *rest: (read.append(x.shape[1]), features(x, *rest))[1])
    running = engine.admit([1], 40)
    engine.step()
    read.clear()
    waits = engine.admit(PROMPT * 3, 5)  # 24 tokens: six pieces
    for pieces in range(1, 7):
        before = len(running.tokens)
        engine.step()
        assert read == [4] * pieces and len(running.tokens) == before + 1
    assert len(waits.tokens) == 1
    list(engine)
    assert waits.tokens == list(generate(ssm, PROMPT * 3, 5))


@pytest.mark.parametrize("pattern", ["MM", "MA", "MW"])
@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=["greedy", "everything"])
def test_what_is_not_finite_ends_its_own_request(pattern, sampling):
    """Nothing of it is left to who has the row next."""
    model = build(pattern)
    bad = generate(model, PROMPT * 2, 0).state
    for leaf in leaves(bad.state):
        if leaf.is_floating_point():
            leaf.fill_(torch.nan)
    engine = Engine(model, rows=3)
    fine = engine.admit(PROMPT, 12, sampling=sampling)
    ill = engine.admit([], 12, sampling=sampling, state=bad)
    later = engine.admit([3], 9, sampling=sampling, state=bad)
    after = [engine.admit([1 + seed], 12, sampling=sampling, seed=seed) for seed in range(3)]
    list(engine)
    assert ill.finish == later.finish == "error" and len(ill.tokens) == 1 and not later.tokens
    for one in (ill, later):
        with pytest.raises(ArgumentError, match="the logits are not finite"):
            engine.release(one)
    assert fine.tokens == list(generate(model, PROMPT, 12, sampling=sampling))
    for seed, one in enumerate(after):
        assert one.tokens == list(generate(model, [1 + seed], 12, sampling=sampling, seed=seed))


def test_a_step_has_the_rows_that_are_taken(ssm, monkeypatch):
    """Of a CPU: what a step costs is what those rows cost."""
    sizes = []
    step_features = ssm._step_features

    def counted(steps, x, *rest):
        sizes.append(len(x))
        return step_features(steps, x, *rest)

    monkeypatch.setattr(ssm, "_step_features", counted)
    engine = Engine(ssm, rows=16)
    requests = [engine.admit([seed], 3 + seed, seed=seed) for seed in range(6)]
    list(engine)
    assert sizes == sorted(sizes, reverse=True) and set(sizes) == set(range(1, 7))
    assert [one.tokens for one in requests] == [list(generate(ssm, [seed], 3 + seed, seed=seed)) for seed in range(6)]


def test_the_model_is_left_as_it_was(ssm):
    ssm.train()
    try:
        engine = Engine(ssm, rows=2)
        one = engine.admit(PROMPT, 4)
        for _ in engine:
            assert ssm.training
        engine.release(one)
        assert ssm.training
    finally:
        ssm.eval()
    assert one.tokens == list(generate(ssm, PROMPT, 4))


@pytest.mark.parametrize("pattern", ["MM", "MA"])
def test_a_batch_of_ragged_prompts(pattern):
    model = build(pattern)
    prompts = [PROMPT, [1], torch.tensor([2, 7]), bytes([5, 5, 5]), PROMPT * 4]
    samplings = SAMPLINGS[: len(prompts)]
    got = generate_batch(model, prompts, 9, sampling=samplings, stop=[4], seed=3, rows=2)
    for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        assert got[i] == list(generate(model, prompt, 9, sampling=sampling, stop=[4], seed=3 + i))
    assert dualform.generate_batch(model, [], 3) == []


@pytest.mark.parametrize("top", [0, 3, V + 5])
def test_log_probabilities_are_those_of_the_model(top):
    model = build("MA")
    engine = Engine(model, rows=2, logprobs=top)
    requests = [engine.admit(PROMPT[: 3 + i], 6, sampling=SAMPLINGS[i], seed=i) for i in range(4)]
    list(engine)
    for i, one in enumerate(requests):
        prompt = PROMPT[: 3 + i]
        assert one.tokens == list(generate(model, prompt, 6, sampling=SAMPLINGS[i], seed=i))
        with torch.no_grad():
            logits, _ = model(torch.tensor([prompt + one.tokens]))
        want = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        best = want.topk(min(top, V))
        assert len(one.logprobs) == 6
        for place, (score, likeliest) in enumerate(one.logprobs):
            assert score == pytest.approx(float(want[place, one.tokens[place]]), abs=1e-5)
            assert [token for token, _ in likeliest] == best.indices[place].tolist()
            assert [s for _, s in likeliest] == pytest.approx(best.values[place].tolist(), abs=1e-5)
    assert Engine(model).admit(PROMPT, 1).logprobs == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt_tokens": []}, "Engine.admit: the prompt is empty"),
        ({"prompt_tokens": "text"}, "Engine.admit: prompt_tokens is text"),
        ({"prompt_tokens": [V]}, "Engine.admit: prompt_tokens"),
        ({"max_new_tokens": -1}, "Engine.admit: max_new_tokens"),
        ({"sampling": 0.8}, "Engine.admit: sampling"),
        ({"seed": -1}, "Engine.admit: seed"),
        ({"stop": 3}, "Engine.admit: stop"),
        ({"state": 3}, "Engine.admit: state"),
        ({"temperature": 0.8}, "option of Sampling"),
    ],
)
def test_bad_arguments_are_named(ssm, change, message):
    engine = Engine(ssm)
    with pytest.raises(ArgumentError, match=message):
        engine.admit(**{"prompt_tokens": PROMPT, "max_new_tokens": 4, **change})
    assert engine.waiting == ()


def test_bad_engines_and_batches_are_named(ssm):
    for call, message in [
        (lambda: Engine(3), "Engine: model is int"),
        (lambda: Engine(ssm, 0), "Engine: rows is 0"),
        (lambda: Engine(ssm, 2.5), "Engine: rows is 2.5"),
        (lambda: Engine(ssm, logprobs=-1), "Engine: logprobs is -1"),
        (lambda: Engine(ssm).release(3), "request is 3"),
        (lambda: generate_batch(ssm, [PROMPT, "text"], 3), r"prompts\[1\]: prompt_tokens is text"),
        (lambda: generate_batch(ssm, PROMPT, 3), r"prompts\[0\]"),
        (lambda: generate_batch(ssm, 3, 3), "prompts is 3"),
        (lambda: generate_batch(ssm, [PROMPT], 3, sampling=[]), "sampling is"),
        (lambda: generate_batch(ssm, [PROMPT], 3, seed=None), "seed is None"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()


# On a GPU.


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*runs on the slower backend")
@pytest.mark.parametrize("pattern", ["MM", "mm", "MAmW"])
def test_rows_join_and_leave_graphs(pattern):
    """Those of one size, where each row does the same work whatever the others hold."""
    model, dice = on_gpu({k: PARTS[k] for k in set(pattern)}, pattern, torch.float32), random.Random(0)
    wanted = [asked(dice, 60) for _ in range(12)]
    alone = []
    for prompt, most, options in wanted:
        engine = Engine(model, rows=4)
        alone.append(engine.admit(prompt, most, **options))
        list(engine)
    engine = Engine(model, rows=4)
    together = [engine.admit(prompt, most, **options) for prompt, most, options in wanted]
    list(engine)
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert engine._decoders[0]._captured
