"""Sessions on disk: the same continuation bit for bit, and a sentence for every file that cannot give one."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch

from dualform.core.errors import ArgumentError, CheckpointError
from dualform.core.tree import clone, concat, leaves, named_leaves, take
from dualform.generation.engine import generate
from dualform.generation.options import Sampling
from dualform.generation.session import WINDOW, Session
from dualform.layers.attention import AttentionConfig
from dualform.layers.hyena import HyenaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.saving.state import save_state

SAMPLING = Sampling(temperature=1.1, top_p=0.95, repetition_penalty=1.1)
PROMPT = b"import os\n"


def build(seed=0, d_model=12):
    torch.manual_seed(seed)
    parts = {"M": (Mamba2Config(d_state=8, d_head=4),), "A": (AttentionConfig(heads=2),)}
    return LanguageModel(ModelConfig(256, d_model, parts, "MAM")).eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.mark.parametrize("k", [0, 1, 9])
def test_a_saved_session_goes_on_bit_for_bit(model, tmp_path, k):
    unbroken = generate(model, PROMPT, 30, sampling=SAMPLING, seed=11)
    tokens = list(unbroken)
    generation = generate(model, PROMPT, k, sampling=SAMPLING, seed=11)
    head = list(generation)
    generation.state.save(tmp_path / "a.state", model)
    session = Session.load(tmp_path / "a.state", model)
    assert [n for n, _ in named_leaves(session)] == [n for n, _ in named_leaves(generation.state)]
    assert all(torch.equal(a, b) for a, b in zip(leaves(session), leaves(generation.state), strict=True))
    assert head + list(generate(model, [], 30 - k, sampling=SAMPLING, state=session)) == tokens


def test_another_process_goes_on_bit_for_bit(model, tmp_path):
    unbroken = list(generate(model, PROMPT, 20, sampling=SAMPLING, seed=2))
    generation = generate(model, PROMPT, 8, sampling=SAMPLING, seed=2)
    list(generation)
    generation.state.save(tmp_path / "a.state", model)
    model.save(tmp_path / "model")
    code = f"""
import dualform, torch
from dualform.generation.session import Session
torch.set_num_threads(1)
model = dualform.load({str(tmp_path / "model")!r})
session = Session.load({str(tmp_path / "a.state")!r}, model)
sampling = dualform.Sampling(temperature=1.1, top_p=0.95, repetition_penalty=1.1)
print(list(dualform.generate(model, [], 12, sampling=sampling, state=session)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == str(unbroken[8:]), run.stderr


def test_a_fork_shares_nothing(model):
    session = generate(model, PROMPT, 0).state
    fork = session.fork()
    before = [leaf.clone() for leaf in leaves(session)]
    for leaf in leaves(fork):
        leaf.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(session), strict=True))
    assert int(session.fork(5).seed) == 5 and int(session.seed) == 0


def test_history_is_bounded_and_starts_empty(model):
    assert int((generate(model, PROMPT, 0).state.history >= 0).sum()) == len(PROMPT)
    session = generate(model, PROMPT * 100, 3).state
    assert session.history.shape == (1, WINDOW) and session.tokens == 1000
    assert bytes(session.history[0, -10:].tolist()) == PROMPT


def test_sessions_are_rows_of_a_batch():
    """A session is a tree, batch first: two of them join and part again by the functions for every state."""
    torch.manual_seed(0)
    ssm = LanguageModel(ModelConfig(256, 12, {"M": (Mamba2Config(d_state=8, d_head=4),)}, "MM")).eval()
    a, b = (generate(ssm, prompt, 0).state for prompt in (b"one", b"another"))
    both = concat([a, b])
    for i, session in enumerate((a, b)):
        row = take(both, slice(i, i + 1))
        assert list(generate(ssm, [], 10, state=row)) == list(generate(ssm, [], 10, state=session))


def test_a_session_of_another_model_is_refused(model, tmp_path):
    path = tmp_path / "a.state"
    generate(model, PROMPT, 3).state.save(path, model)
    for other in (build(seed=1), build(d_model=16), build().double()):
        with pytest.raises(CheckpointError, match="saved with model") as error:
            Session.load(path, other)
        assert str(path) in str(error.value) and "hint" in str(error.value)


def test_a_session_in_memory_knows_its_model(model):
    """By its config and its weights, wherever they are; not by the object."""
    session = generate(model, PROMPT, 3).state
    assert list(generate(copy.deepcopy(model), [], 3, state=session)) == list(generate(model, [], 3, state=session))
    config = model.config
    others = [build(seed=1), build(d_model=16), copy.deepcopy(model).to(torch.bfloat16)]
    torch.manual_seed(0)
    others.append(LanguageModel(dataclasses.replace(config, norm_eps=1e-4)).eval())
    for other in others:
        with pytest.raises(ArgumentError, match=r"generate: state is a session of another model\n.*weights"):
            generate(other, [], 3, state=session)
    with pytest.raises(ArgumentError, match="generate: state has 2 rows, expected 1"):
        generate(model, [], 3, state=concat([session, session]))


def test_files_that_are_no_session(model, tmp_path):
    path = tmp_path / "a.state"
    with pytest.raises(CheckpointError, match=r"a\.state"):
        Session.load(path, model)
    path.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match=r"a\.state"):
        Session.load(path, model)
    save_state(model.init_state(1), path)
    with pytest.raises(CheckpointError, match="not of a generation"):
        Session.load(path, model)
    generate(model, PROMPT, 3).state.save(path, model)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"a\.state"):
        Session.load(path, model)


def test_saving_replaces_the_file_or_leaves_it(model, tmp_path):
    path = tmp_path / "a.state"
    generation = generate(model, PROMPT, 5)
    generation.state.save(path, model)
    list(generation)
    generation.state.save(path, model)
    assert Session.load(path, model).tokens == len(PROMPT) + 5
    assert [p.name for p in tmp_path.iterdir()] == ["a.state"]
    with pytest.raises(CheckpointError, match="cannot save"):
        generation.state.save(tmp_path, model)


def memory(tree):
    return {leaf.untyped_storage().data_ptr() for leaf in leaves(tree) if leaf.numel()}


def test_what_is_taken_from_a_state_has_memory_of_its_own(model):
    """Steps without gradients may write into the state that they are given."""
    session = generate(model, PROMPT, 3).state
    before = clone(session)
    two = concat([session, session])
    assert not memory(two) & memory(session)
    for rows in (slice(0, 1), [0], torch.tensor([0]), slice(None)):
        assert not memory(take(session, rows)) & memory(session)
    assert not memory(session.fork()) & memory(session) and not memory(session.fork(3)) & memory(session)
    assert not memory(session.to("cpu")) & memory(session)
    going = generate(model, [], 4, state=session)
    first = going.state
    list(going)
    assert not memory(first) & memory(session) and not memory(going.state) & memory(first)
    for leaf in leaves(take(two, slice(1, 2))):
        leaf.zero_()
    assert all(torch.equal(a, b) for a, b in zip(leaves(session), leaves(before), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves(take(two, [1])), leaves(before), strict=True))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s._replace(position=s.position - 30), "position is -17, expected 0 or more"),
        (lambda s: s._replace(generated=s.position + 1), r"generated is \[14\] of \[13\] tokens seen"),
        (lambda s: s._replace(generated=-s.generated), r"generated is \[-3\]"),
        (lambda s: s._replace(seed=s.seed - 1), "seed is -1"),
        (lambda s: s._replace(history=s.history + 200), "history holds tokens from 199 to .*vocabulary is 0 to 255"),
        (lambda s: s._replace(history=s.history - 1), "history holds tokens from -2"),
        (lambda s: s._replace(history=s.history.roll(1)), "history holds 13 tokens, after"),
        (lambda s: s._replace(position=s.position + 9), r"history holds 13 tokens, after \[22\] were seen"),
        (lambda s: with_length(s, 10**9), r"1.0.k holds \[1000000000\] tokens, and \[13\] were seen"),
        (lambda s: with_slots(s, 12), "1.0.k holds 13 tokens, and has 12 slots"),
    ],
)
def test_numbers_that_contradict_one_another_are_refused(model, tmp_path, change, said):
    generation = generate(model, PROMPT, 3)
    assert len(list(generation)) == 3
    change(generation.state).save(tmp_path / "a.state", model)
    with pytest.raises(CheckpointError, match=said) as error:
        Session.load(tmp_path / "a.state", model)
    assert "a.state" in str(error.value)


def with_length(session, length):
    (mamba,), (attention,), (last,) = session.state
    return session._replace(state=((mamba,), (attention._replace(length=attention.length * 0 + length),), (last,)))


def with_slots(session, slots):
    (mamba,), (attention,), (last,) = session.state
    attention = attention._replace(k=attention.k[:, :slots], v=attention.v[:, :slots])
    return session._replace(state=((mamba,), (attention,), (last,)))


def test_caches_of_every_kind_are_loaded_at_every_length(tmp_path):
    """A window that turns, a cache that doubles, a history that reaches its limit."""
    torch.manual_seed(0)
    parts = {
        "W": (AttentionConfig(heads=2, window=5),),
        "A": (AttentionConfig(heads=2),),
        "H": (HyenaConfig(l_max=9, d_embed=3, d_filter=4),),
    }
    model = LanguageModel(ModelConfig(256, 4, parts, "WAH")).eval()
    session = Session.start(model)
    for count in (0, 1, 3, 4, 2, 20):
        session = generate(model, [7], count, state=session).state
        session.save(tmp_path / "s", model)
        again = Session.load(tmp_path / "s", model)
        assert all(torch.equal(a, b) for a, b in zip(leaves(session), leaves(again), strict=True))
