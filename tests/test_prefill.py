"""Prompts of several requests in one call: the tokens of each are those alone, whatever lies beside it."""

import random

import pytest
import torch

from dualform.core.tree import leaves
from dualform.generation.batch import Engine
from dualform.generation.engine import generate
from dualform.generation.prefill import growing, read_piece
from dualform.generation.request import request
from test_batch import SAMPLINGS, build, short_pieces
from test_generate import PROMPT, V

__all__ = ["short_pieces"]


@pytest.fixture
def calls(monkeypatch):
    """The lengths of the sequences of each call that reads prompts; ``calls(model)`` begins to listen."""

    def listen(model):
        heard, features = [], model.features

        def listening(x, state, **options):
            borders = options.get("cu_seqlens")
            heard.append([x.shape[1]] if borders is None else borders.diff().tolist())
            return features(x, state, **options)

        monkeypatch.setattr(model, "features", listening)
        return heard

    return listen


@pytest.mark.parametrize("pattern", ["MM", "MA", "mWA"])
def test_short_prompts_are_one_call(pattern, calls):
    model = build(pattern)
    engine, heard = Engine(model, rows=6), calls(model)
    prompts = [PROMPT, [1], PROMPT * 3, [2, 7], PROMPT[:5]]
    requests = [engine.admit(prompt, 9, sampling=SAMPLINGS[i], seed=i) for i, prompt in enumerate(prompts)]
    assert len(engine.step()) == 5 and heard == [[8, 1, 24, 2, 5]]
    list(engine)
    for i, (one, prompt) in enumerate(zip(requests, prompts, strict=True)):
        assert one.tokens == list(generate(model, prompt, 9, sampling=SAMPLINGS[i], seed=i))


def test_pieces_are_full_and_in_order(calls, short_pieces):
    """Four tokens at a time, of the first prompts first; as many as there are rows."""
    model = build("MA")
    engine, heard = Engine(model, rows=3), calls(model)
    prompts = [[1, 2], [3], [4, 5, 6, 7, 8, 9], [2], [5]]
    requests = [engine.admit(prompt, 5, seed=i) for i, prompt in enumerate(prompts)]
    engine.step()
    assert heard == [[2, 1, 1]] and [len(one.tokens) for one in requests] == [1, 1, 0, 0, 0]
    engine.step()
    engine.step()
    assert heard == [[2, 1, 1], [4], [1]] and [len(one.tokens) for one in requests] == [3, 3, 1, 0, 0]
    list(engine)
    assert heard[3:] == [[1, 1]]
    for i, (one, prompt) in enumerate(zip(requests, prompts, strict=True)):
        assert one.tokens == list(generate(model, prompt, 5, seed=i))


@pytest.mark.parametrize("pattern", ["MM", "MA", "mWA"])
def test_sessions_that_have_seen_much_and_little_go_on_together(pattern, calls):
    model, dice = build(pattern), random.Random(0)
    texts = [[dice.randrange(V) for _ in range(n)] for n in (40, 3, 11)]
    sessions = [generate(model, text, 0).state for text in texts]
    heard, engine = calls(model), Engine(model, rows=4)
    requests = [engine.admit(PROMPT[: 2 + i], 12, state=session, seed=i) for i, session in enumerate(sessions)]
    requests.append(engine.admit([], 12, state=sessions[0], seed=3))
    engine.step()
    assert heard == [[2, 3, 4]] and len(engine.running) == 4
    list(engine)
    want = [list(generate(model, text + PROMPT[: 2 + i], 12, seed=i)) for i, text in enumerate(texts)]
    assert [one.tokens for one in requests] == [*want, list(generate(model, texts[0], 12, seed=3))]
    for session, text in zip(sessions, texts, strict=True):  # left as they were
        assert all(map(torch.equal, leaves(session), leaves(generate(model, text, 0).state)))


@pytest.mark.parametrize("pattern", ["MM", "MA", "mWA"])
def test_a_state_is_that_of_its_prompt_alone(pattern):
    """With memory of its own, and caches no larger than they have to be."""
    model = build(pattern)
    options = {"sampling": SAMPLINGS[0], "stop": (), "seed": 0, "state": None}
    asked = [request("here", model, prompt, 3, **options) for prompt in (PROMPT * 2, [1], PROMPT)]
    read_piece(model, asked)
    for one, prompt in zip(asked, (PROMPT * 2, [1], PROMPT), strict=True):
        assert one.started and not one.unread and one.position == len(prompt)
        got, want = one.session(), generate(model, prompt, 0).state
        torch.testing.assert_close(tuple(got.state), tuple(want.state))
        torch.testing.assert_close(got.logits, want.logits)
        assert torch.equal(got.history, want.history)
    assert any(growing(model)) == ("A" in pattern)
