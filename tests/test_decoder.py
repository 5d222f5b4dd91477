"""Rows that go on by one token at a time: alone and in company, in memory of their own, and captured on a GPU."""

import operator
import sys
import warnings

import pytest
import torch

from dualform.core.tree import leaves
from dualform.generation.decoder import Decoder
from dualform.generation.engine import generate
from dualform.generation.options import Sampling
from dualform.generation.sampling import uniform, uniforms
from dualform.generation.session import WINDOW
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.registry import MIXERS
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from test_generate import EVERYTHING, PROMPT, V, build

# Kernels of products have no float32; that another backend takes their place is told.
pytestmark = pytest.mark.filterwarnings("ignore:.*runs on the slower backend")

GREEDY = Sampling(temperature=0.0)
SAMPLINGS = pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=["greedy", "everything"])


PARTS = {
    "M": (Mamba2Config(d_state=16, d_head=16),),
    "m": (MambaConfig(),),
    "A": (AttentionConfig(heads=4), MLPConfig()),
    "W": (AttentionConfig(heads=4, window=16), MLPConfig()),
}


def read(model, prompt):
    """What a row goes on from after a prompt: its state, logits, history."""
    with torch.inference_mode():
        start = model.init_state(1, max_len=len(prompt))
        features, state = model.features(torch.tensor([prompt], device=model.embed.weight.device), start)
        history = torch.full((1, WINDOW), -1)
        history[0, -len(prompt) :] = torch.tensor(prompt)
        return state, model.logits(features[:, -1:])[:, 0].float(), history


def decoder(model, prompts, sampling, **options):
    """A decoder whose rows go on from prompts that were read; ``sampling`` is that of all rows, or one of each."""
    found = Decoder(model, len(prompts), **options)
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    for row, (prompt, one) in enumerate(zip(prompts, samplings, strict=True)):
        found.put(row, *read(model, prompt), one, row, len(prompt))
    return found


def test_the_draws_of_an_array_are_those_of_one_number():
    seeds, positions = [0, 7, 2**63 - 1], [0, 5, 10**12]
    want = [[uniform(s, p + i) for i in range(5)] for s, p in zip(seeds, positions, strict=True)]
    assert uniforms(seeds, positions, 5).tolist() == want


@SAMPLINGS
def test_rows_go_on_as_each_does_alone(sampling):
    """For longer than random numbers are drawn in advance."""
    model = build("MM")
    prompts = [PROMPT, [1], [2, 7, 1, 8, 2, 8]]
    want = [list(generate(model, p, 70, sampling=sampling, seed=row)) for row, p in enumerate(prompts)]
    together = decoder(model, prompts, sampling)
    assert [list(row) for row in zip(*(together.next() for _ in range(70)), strict=True)] == want


@SAMPLINGS
@pytest.mark.parametrize("pattern", ["MM", "MA", "MW"])
def test_steps_in_memory_that_stays(pattern, sampling, monkeypatch):
    """What a captured graph does, played: each step reads and writes the same memory, until a cache has to grow."""
    monkeypatch.setattr("dualform.generation.decoder._LEAST_ROOM", 16)
    window = AttentionConfig(heads=2, window=5)
    parts = {"M": (Mamba2Config(d_state=8, d_head=4),), "A": (AttentionConfig(heads=2),), "W": (window, MLPConfig())}
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(V, 12, {k: parts[k] for k in pattern}, pattern)).eval()
    want = list(generate(model, PROMPT, 40, sampling=sampling, seed=0))
    rooms = []

    def capture(self):
        rooms.append(self._room)
        places = [leaf.data_ptr() for leaf in leaves(self._state)]

        class Played:
            @staticmethod
            def replay():
                self._keep(self._step())
                assert [leaf.data_ptr() for leaf in leaves(self._state)] == places

        self._captured[self._wants] = Played

    monkeypatch.setattr(Decoder, "_capture", capture)
    found = decoder(model, [PROMPT], sampling)
    found._graphs = True
    assert [found.next()[0] for _ in range(40)] == want
    assert rooms == ([16, 32, 64] if "A" in pattern else [sys.maxsize])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("pattern", ["MM", "mm", "MA"])
def test_states_may_be_held_in_16_bits(pattern, rows):
    """Those of float32 alone, which are given back as what they came; what else a row holds stays what it is."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(V, 64, {k: PARTS[k] for k in set(pattern)}, pattern)).eval()
    prompts = [PROMPT, [1], [2, 7, 1, 8, 2, 8]][:rows]
    wide, narrow = (decoder(model, prompts, GREEDY, state_dtype=dtype) for dtype in (None, torch.bfloat16))
    for _ in range(12):
        wide.next()
        narrow.next()
        with torch.inference_mode():
            narrow._report.copy_(wide._report)  # so that both go on from the same tokens
        assert all(leaf.dtype in (torch.bfloat16, torch.int64) for leaf in leaves(narrow._state))
    for row in range(rows):
        (state, logits), (found, close) = wide.read(row), narrow.read(row)
        assert [leaf.dtype for leaf in leaves(found)] == [leaf.dtype for leaf in leaves(state)]
        assert not torch.equal(close, logits)
        torch.testing.assert_close(close, logits, rtol=0.03, atol=0.03 * float(logits.abs().max()))


def test_logits_that_are_not_finite_are_told():
    """Of their row alone, with tokens that are tokens all the same: a step may be under way with them."""
    model = build("MM")
    want = [list(generate(model, PROMPT, 4, sampling=sampling, seed=0)) for sampling in (GREEDY, EVERYTHING)]
    for sampling, tokens in zip((GREEDY, EVERYTHING), want, strict=True):
        found, (state, logits, history) = Decoder(model, 2), read(model, PROMPT)
        logits = logits.clone()
        logits[0, 3] = torch.nan
        found.put(0, *read(model, PROMPT), sampling, 0, len(PROMPT))
        found.put(1, state, logits, history, sampling, 1, len(PROMPT))
        first = found.next()
        assert first == [tokens[0], None]
        assert ((found._token >= 0) & (found._token < V)).all()
        found.free(1)
        assert [found.next()[0] for _ in range(3)] == tokens[1:]


# On a GPU.


def on_gpu(parts, pattern, dtype):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(211, 64, parts, pattern)).cuda().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def same_in_a_graph(model, rows, sampling, tokens=24):
    """A decoder with graphs beside one without, which is given the tokens of the first.

    In a graph small products have kernels of their own: in 16 bits another token may be drawn once in a while.
    """
    prompts = torch.randint(211, (rows, 33), generator=torch.Generator().manual_seed(1)).tolist()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="generation runs slower")
        captured, plain = (decoder(model, prompts, sampling, graphs=graphs) for graphs in (True, False))
        plain._settle()  # attention over as much room gives the same numbers
        assert captured.next() == plain.next()
        same = 0
        for _ in range(tokens):
            given, own = captured.next(), plain._token.tolist()
            same += sum(map(operator.eq, given, own))
            with torch.inference_mode():
                plain._token.copy_(torch.tensor(given))
            assert plain.next() == given
    assert captured._captured and not plain._captured
    assert same == rows * tokens if model.embed.weight.dtype == torch.float32 else same > 0.9 * rows * tokens
    plain._room = captured._room  # caches of a single row are given with the room of whoever had it
    for row in range(rows):
        torch.testing.assert_close(captured.read(row), plain.read(row), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@SAMPLINGS
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["MM", "mm", "MAmW"])
def test_a_graph_changes_nothing(pattern, dtype, rows, sampling):
    same_in_a_graph(on_gpu({k: PARTS[k] for k in set(pattern)}, pattern, dtype), rows, sampling)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [kind for kind in MIXERS if kind not in ("mamba", "mamba2", "rwkv_channel")])
def test_every_mixer_is_captured(kind):
    same_in_a_graph(on_gpu({"X": (MIXERS[kind](),)}, "XX", torch.float32), 2, GREEDY)


@pytest.mark.gpu
@SAMPLINGS
def test_nothing_waits_but_for_the_tokens(sampling):
    """Neither a synchronisation nor memory for a token, once a step was captured."""
    model = on_gpu({k: PARTS[k] for k in "MA"}, "MA", torch.bfloat16)
    found = decoder(model, [[1, 2, 3], [4, 5, 6]], sampling)
    for _ in range(3):
        found.next()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            found.next()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_is_told(monkeypatch):
    from dualform.ops.op import SlowBackendWarning

    model = on_gpu({"M": PARTS["M"]}, "MM", torch.float32)
    monkeypatch.setattr(model, "_bounded", lambda y: y + 0 * y.sum().item())
    found = decoder(model, [[1, 2, 3]], GREEDY)
    with pytest.warns(SlowBackendWarning, match="could not be captured"):
        tokens = [found.next()[0] for _ in range(5)]
    assert tokens == list(generate(model.cpu(), [1, 2, 3], 5, sampling=GREEDY))
