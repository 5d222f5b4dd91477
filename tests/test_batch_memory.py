"""A batch that memory does not hold is refused before it starts, and says how many rows fit."""

import pytest
import torch

from dualform.core.errors import ArgumentError
from dualform.core.tree import leaves, nbytes
from dualform.generation import memory
from dualform.generation.batch import Engine, generate_batch
from dualform.generation.engine import generate
from dualform.generation.memory import available_bytes, check_memory, row_bytes, shared_bytes
from test_batch import build
from test_generate import PROMPT

CPU = torch.device("cpu")


def leave(monkeypatch, count):
    """So many bytes are left."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: count)


@pytest.mark.parametrize("pattern", ["MM", "MA"])
def test_the_rows_that_fit_are_told(pattern, monkeypatch):
    model = build(pattern)
    most = len(PROMPT) + 30
    leave(monkeypatch, shared_bytes(model) + 3 * row_bytes(model, most))
    engine = Engine(model, rows=8)
    requests = [engine.admit(PROMPT, 30, seed=seed) for seed in range(3)]
    with pytest.raises(ArgumentError, match=r"Engine.admit: 4 rows of up to 38 tokens need .* on cpu: 3 rows fit") as e:
        engine.admit(PROMPT, 30)
    assert "rows=3: more requests wait" in str(e.value) and len(engine.waiting) == 3
    list(engine)
    assert [one.tokens for one in requests] == [list(generate(model, PROMPT, 30, seed=seed)) for seed in range(3)]
    small = Engine(model, rows=3)  # more requests than rows wait
    assert [len(small.admit(PROMPT, 30).tokens) for _ in range(9)] == [0] * 9


def test_narrow_states_fit_more_often(monkeypatch):
    """Their rows take half the memory for states, and what is given back is float32 again."""
    model = build("MM", torch.float32)
    wide, narrow = row_bytes(model, 38), row_bytes(model, 38, torch.bfloat16)
    assert narrow < wide and wide - narrow == nbytes(model.init_state(1))  # twice half of a state
    leave(monkeypatch, shared_bytes(model) + 2 * narrow)
    engine = Engine(model, rows=2, state_dtype=torch.bfloat16)
    requests = [engine.admit(PROMPT, 30, seed=seed) for seed in range(2)]
    list(engine)
    assert [len(one.tokens) for one in requests] == [30, 30]
    assert {leaf.dtype for leaf in leaves(engine.release(requests[0]).state)} == {torch.float32}
    with pytest.raises(ArgumentError, match=r"state_dtype is torch\.int8"):
        Engine(model, state_dtype=torch.int8)


def test_a_batch_is_refused_before_it_starts(monkeypatch):
    model = build("MA")
    want = generate_batch(model, [PROMPT] * 4, 9, rows=2)
    leave(monkeypatch, shared_bytes(model) + 2 * row_bytes(model, len(PROMPT) + 9))
    monkeypatch.setattr(model, "features", None)  # nothing is read
    with pytest.raises(ArgumentError, match=r"generate_batch: 4 rows of up to 17 tokens.*: 2 rows fit"):
        generate_batch(model, [PROMPT] * 4, 9)
    monkeypatch.undo()
    leave(monkeypatch, shared_bytes(model) + 2 * row_bytes(model, len(PROMPT) + 9))
    assert generate_batch(model, [PROMPT] * 4, 9, rows=2) == want


def test_a_cache_that_grows_counts_and_a_state_of_constant_size_does_not(monkeypatch):
    pure, growing = build("MM"), build("MA")
    assert row_bytes(pure, 10) == row_bytes(pure, 10**6) and row_bytes(growing, 10**6) > 10**4 * row_bytes(growing, 10)
    leave(monkeypatch, 2**22)
    check_memory("here", pure, 4, 10**9)
    with pytest.raises(ArgumentError, match="not even one row fits"):
        check_memory("here", growing, 1, 10**6)
    engine = Engine(growing)
    session = generate(growing, PROMPT, 0).state
    engine.admit([1], 20, state=session)
    with pytest.raises(ArgumentError, match="2 rows of up to 1,000,0"):
        engine.admit([1], 10**6)


@pytest.mark.parametrize("pattern", ["MM", "MA", "MW"])
def test_the_account_is_what_rows_come_to_hold(pattern):
    """Half of it is for the moment in which states are copied."""
    model = build(pattern)
    engine = Engine(model, rows=3)
    requests = [engine.admit(PROMPT[: 2 + i], 70) for i in range(3)]
    while len(requests[0].tokens) < 68:
        engine.step()
    (decoder,) = engine._decoders
    logits = 3 * model.config.vocab_size * (4 + 48)
    assert decoder.nbytes == nbytes(decoder._state)
    assert decoder.nbytes <= (3 * row_bytes(model, 74) - logits) // 2 <= 2 * decoder.nbytes


def test_what_is_held_already_is_not_counted_twice(monkeypatch):
    model = build("MM")
    engine = Engine(model, rows=4)
    engine.admit(PROMPT, 30)
    engine.step()
    held = engine._decoders[0].nbytes
    leave(monkeypatch, shared_bytes(model) + 2 * row_bytes(model, 38) - held)
    engine.admit(PROMPT, 30)
    with pytest.raises(ArgumentError, match="2 rows fit"):
        engine.admit(PROMPT, 30)


def test_requests_that_have_ended_do_not_count(monkeypatch):
    """A long one leaves room for many short ones."""
    model = build("MA")
    leave(monkeypatch, shared_bytes(model) + row_bytes(model, 2000))
    engine = Engine(model, rows=8)
    engine.release(engine.admit(PROMPT, 1000))
    short = [engine.admit(PROMPT, 9) for _ in range(8)]
    with pytest.raises(ArgumentError, match="8 rows of up to 1,008 tokens"):
        engine.admit(PROMPT, 1000)
    list(engine)
    assert all(one.finish == "length" for one in short)
    engine.admit(PROMPT, 1000)


def test_a_container_and_the_machine_say_what_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert available_bytes(CPU) is None and available_bytes(torch.device("meta")) is None
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:   7 kB\n")
    assert available_bytes(CPU) == 7 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 4000\ninactive_file 500\n")
    assert available_bytes(CPU) == 7 * 1024
    (tmp_path / "memory.max").write_text("6000\n")
    assert available_bytes(CPU) == 1500


@pytest.mark.gpu
def test_a_gpu_says_what_is_left():
    assert 0 < available_bytes(torch.device("cuda")) <= torch.cuda.get_device_properties(0).total_memory
    model = build("MM").cuda()
    with pytest.raises(ArgumentError, match=r"Engine: .* rows fit"):
        Engine(model, rows=10**10)
