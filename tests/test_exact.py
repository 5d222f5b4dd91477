"""``exact=True``: a request has the same bits alone and in company, whoever joins and leaves."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualform.core.tree import leaves
from dualform.generation import batch, request
from dualform.generation.batch import Engine, generate_batch
from dualform.generation.engine import generate
from dualform.generation.exact import rows_together
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.s4d import S4DConfig
from dualform.layers.s5 import S5Config
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.ops.native import library
from dualform.ops.op import backend
from test_batch import SAMPLINGS
from test_decoder import GREEDY
from test_played import played

__all__ = ["played"]

V, D = 31, 18
KINDS = {
    "m": (MambaConfig(d_state=5, d_inner=37),),
    "M": (Mamba2Config(d_state=7, d_head=5, d_inner=35),),
    "S": (S4DConfig(d_state=6),),
    "s": (S5Config(d_state=6),),
    "A": (AttentionConfig(heads=3), MLPConfig(d_hidden=29)),
    "W": (AttentionConfig(heads=3, window=5),),
    "G": (AttentionConfig(heads=3, gate=True), MLPConfig(d_hidden=29)),  # the gate has no kernel
}
native = pytest.mark.skipif(bool(library.why_missing()), reason=library.why_missing())


def build(pattern, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(V, D, {k: KINDS[k] for k in set(pattern)}, pattern, **options)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model.eval()


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """Prompts are read seven tokens at a time."""
    monkeypatch.setattr(request, "_LEAST_PIECE", 1)
    monkeypatch.setattr(request, "PREFILL", {"cpu": 7 * D})


def same(session, alone):
    """Whether a session has the bits of another: state, logits and all."""
    return all(torch.equal(a, b) for a, b in zip(leaves(session), leaves(alone), strict=True))


def random_company(model, dice, exact=True):
    """Requests that join and leave at random: for each, whether it has the bits that it has alone."""
    engine, came, ended = Engine(model, dice.choice([2, 3, 5, 18]), exact=exact), [], []
    for _ in range(40):
        for _ in range(dice.choice([0, 0, 1, 4]) if len(came) < 14 else 0):
            prompt = [dice.randrange(V) for _ in range(dice.choice([1, 2, 6, 7, 8, 20]))]
            options = {"sampling": dice.choice(SAMPLINGS), "seed": dice.randrange(100)}
            came.append((engine.admit(prompt, dice.randrange(25), **options), prompt, options))
        engine.step()
        if engine.running and dice.random() < 0.2:
            one = dice.choice(engine.running)
            ended.append((one, engine.release(one)))
    list(engine)
    released = [one for one, _ in ended]
    ended += [(one, engine.release(one)) for one, _, _ in came if one not in released]
    asked = {one: (prompt, options) for one, prompt, options in came}
    found = []
    for one, session in ended:
        prompt, options = asked[one]
        alone = generate(model, prompt, len(one.tokens), **options, exact=exact)
        found.append(list(alone) == one.tokens and same(session, alone.state))
    return found


@pytest.mark.parametrize("pattern", ["mm", "MM", "mM", "SS", "Sms", "MA", "mWSA", "MG"])
@pytest.mark.parametrize("seed", range(3))
def test_the_bits_are_those_alone(pattern, seed):
    found = random_company(build(pattern), random.Random(seed))
    assert len(found) > 8 and all(found)


@pytest.mark.parametrize("pattern", ["mM", "MA", "mWSA"])
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(dice=st.randoms(use_true_random=False))
def test_the_bits_are_those_alone_in_company_that_is_sought(pattern, dice):
    assert all(random_company(build(pattern), dice))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", ["mM", "MW"])
def test_the_bits_are_those_alone_in_every_dtype(pattern, dtype):
    assert all(random_company(build(pattern, dtype), random.Random(3)))


@native
@pytest.mark.parametrize("pattern", ["mM", "MG"])
def test_without_it_bits_differ(pattern):
    """Otherwise these tests would show nothing."""
    assert not all(random_company(build(pattern), random.Random(0), exact=False))


@native
def test_rows_of_kernels_go_on_together():
    assert rows_together(build("mM")) == rows_together(build("mm", torch.bfloat16)) == 16
    assert rows_together(build("mM", tie_embeddings=False)) == rows_together(build("SsM")) == 16
    assert rows_together(build("MA")) == rows_together(build("mWSA")) == 16
    alone = [build("MG"), build("mm", torch.float64), build("mm", logit_cap=30.0)]
    alone += [build("mm", embed_norm="layer"), build("mm", norm="layer")]
    hooked = build("mm", tie_embeddings=False)
    hooked.head.register_forward_hook(lambda *given: None)
    assert [rows_together(model) for model in (*alone, hooked)] == [1] * 6
    with backend("torch"):
        assert rows_together(build("mM")) == 1


@native
def test_a_step_is_one_for_all_rows(monkeypatch):
    model, sizes = build("mM"), []
    step_features = model._step_features

    def counted(steps, x, *rest):
        sizes.append(len(x))
        return step_features(steps, x, *rest)

    monkeypatch.setattr(model, "_step_features", counted)
    generate_batch(model, [[1]] * 5, 4, sampling=GREEDY, exact=True)
    assert set(sizes) == {5}


@pytest.mark.parametrize("pattern", ["mM", "MW"])
def test_a_session_goes_on_with_the_same_bits(pattern):
    model, prompt = build(pattern), list(range(12))
    whole = generate(model, prompt, 20, seed=2, exact=True)
    want = list(whole)
    engine = Engine(model, 4, exact=True)
    one, _ = engine.admit(prompt, 20, seed=2), engine.admit([3], 20)
    while len(one.tokens) < 6:
        engine.step()
    session = engine.release(one)
    rest = generate(model, [], 14, state=session, exact=True)
    assert one.tokens + list(rest) == want and same(rest.state, whole.state)


def test_what_a_batch_continues_is_what_each_prompt_says_alone():
    model, prompts = build("MA"), [[1], list(range(17)), [5, 6]]
    found = generate_batch(model, prompts, 12, seed=4, rows=2, exact=True)
    assert found == [list(generate(model, p, 12, seed=4 + i, exact=True)) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("pattern", ["mM", "MA", "mWA"])
def test_graphs_that_are_played_are_those_of_one_row(pattern, played, monkeypatch):
    """As on a GPU, where a graph of a cache has the room of its row alone, and not that of who had the row before."""
    monkeypatch.setattr("dualform.generation.exact.kernels_run", lambda device: False)
    monkeypatch.setattr("dualform.generation.engine.Decoder", batch.Decoder)
    found = random_company(build(pattern), random.Random(5))
    assert all(found) and {len(decoder._taken) for decoder, _ in played} <= {0, 1}
