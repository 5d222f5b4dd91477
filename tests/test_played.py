"""Graphs of steps, played on a CPU: when they are captured, what they have in them, and that rows come and go."""

import random

import pytest
import torch

from dualform.core.tree import leaves
from dualform.generation.batch import Engine
from dualform.generation.decoder import Decoder
from dualform.generation.engine import generate
from test_batch import build, join_and_leave, short_pieces
from test_decoder import GREEDY
from test_generate import EVERYTHING, PROMPT

__all__ = ["short_pieces"]


@pytest.fixture
def played(monkeypatch):
    """What a GPU does: a step under way before its token is read, in memory that stays until a cache has to grow.

    The decoders that captured a graph, and what their rows wanted.
    """
    captured = []

    def capture(self):
        places, wants = [leaf.data_ptr() for leaf in leaves(self._state)], self._wants
        captured.append((self, wants))

        class Played:
            @staticmethod
            def replay():
                assert [leaf.data_ptr() for leaf in leaves(self._state)] == places and self._wants == wants
                self._keep(self._step())

        self._captured[wants] = Played

    def decoder(*given, **options):
        found = Decoder(*given, **options)
        found._graphs = found._ahead = True
        return found

    class Event:
        def record(self):
            self.recorded = True

        def synchronize(self):
            assert self.recorded

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr("dualform.generation.decoder._LEAST_ROOM", 16)
    monkeypatch.setattr("dualform.generation.decoder._GRAPHS", 3)
    monkeypatch.setattr("dualform.generation.decoder._IDLE", 9)
    monkeypatch.setattr(Decoder, "_capture", capture)
    monkeypatch.setattr("dualform.generation.batch.Decoder", decoder)
    return captured


@pytest.mark.parametrize("pattern", ["MM", "MA", "mWA"])
@pytest.mark.parametrize("seed", range(3))
def test_rows_that_join_and_leave_graphs_that_are_played(pattern, seed, short_pieces, played):
    join_and_leave(build(pattern), random.Random(10 + seed))
    assert len({wants for _, wants in played}) > 1


@pytest.mark.parametrize("pattern", ["MM", "MA"])
def test_the_first_token_waits_for_no_graph(pattern, played):
    """Nor does that of a request that comes later, whatever it wants; and a graph that is there is played again."""
    model = build(pattern)
    engine = Engine(model, rows=3)
    requests = [engine.admit(PROMPT, 9, sampling=GREEDY)]
    engine.step()
    assert played == [] and len(requests[0].tokens) == 1
    engine.step()
    assert len(played) == 1
    requests.append(engine.admit([1], 9, sampling=GREEDY))
    engine.step()
    assert len(requests[1].tokens) == 1 and len(played) == 1
    requests.append(engine.admit([2], 3, sampling=EVERYTHING))
    engine.step()
    assert len(requests[2].tokens) == 1 and len(played) == 1
    engine.step()
    assert len(played) == 2
    list(engine)
    for one, prompt, most in zip(requests, (PROMPT, [1], [2]), (9, 9, 3), strict=True):
        assert one.tokens == list(generate(model, prompt, most, sampling=one.sampling))


def test_a_state_after_the_first_token_waits_for_no_graph(played):
    model = build("MA")
    engine = Engine(model, rows=2)
    one = engine.admit(PROMPT, 9)
    engine.step()
    session = engine.release(one)
    assert played == [] and one.tokens + list(generate(model, [], 8, state=session)) == list(generate(model, PROMPT, 9))


@pytest.mark.parametrize("pattern", ["MA", "MW"])
def test_a_free_row_does_not_grow(pattern, played):
    """Where graphs are played, which have every row in them."""
    model = build(pattern)
    engine = Engine(model, rows=3)
    ended, long = engine.admit(PROMPT, 2), engine.admit([1], 60)
    list(engine)
    assert ended.tokens == list(generate(model, PROMPT, 2)) and long.tokens == list(generate(model, [1], 60))
    *_, length = leaves(engine._decoders[0]._state)
    assert length.dtype == torch.int64 and len(length) == 3 and int(length.max()) <= 10
