"""Whether requests have the same bits alone and in company, on the user's own machine: ``exact=True``."""

from collections.abc import Callable, Iterable

import torch

from dualform.check.cases import Case
from dualform.core.deviation import Worst, deviation, worst
from dualform.generation.batch import Engine
from dualform.generation.engine import generate
from dualform.generation.options import Sampling
from dualform.layers.registry import MIXERS
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel

_VOCAB, _WIDTH, _TOKENS = 61, 64, 9
_SAMPLINGS = Sampling(temperature=0.0), Sampling(top_p=0.9), Sampling(repetition_penalty=1.3)
Build = Callable[[], LanguageModel]


def builds(cases: Iterable[Case], device: torch.device, dtype: torch.dtype) -> dict[tuple[str, str], Build]:
    """Models by name and kind: one for every mixer of the registry, and the language models among the cases."""
    found: dict[tuple[str, str], Build] = {}
    for kind in MIXERS:
        found[kind, kind] = lambda kind=kind: _model(lambda: _of(kind), device, dtype)
    for case in cases:
        if case.name.startswith("lm "):
            found[case.name, "lm"] = lambda case=case: _model(lambda: case.build(device, dtype)[0], device, dtype)
    return found


def exactness(build: Build, length: int) -> Worst:
    """Logits after some tokens, alone and among requests that join and leave; an infinite error for other tokens.

    Args:
        build: makes the model.
        length: of the longest prompt.
    """
    model = build()
    vocab, lengths = model.config.vocab_size, (length, 1, max(1, length // 3))
    prompts = [[(5 * row + 3 * at * at) % vocab for at in range(lengths[row])] for row in range(3)]
    engine = Engine(model, rows=2, exact=True)
    asked = [
        engine.admit(prompt, _TOKENS + row, sampling=_SAMPLINGS[row], seed=row) for row, prompt in enumerate(prompts)
    ]
    for _ in engine:
        pass
    found = []
    for row, (one, prompt) in enumerate(zip(asked, prompts, strict=True)):
        alone = generate(model, prompt, _TOKENS + row, sampling=_SAMPLINGS[row], seed=row, exact=True)
        tokens = torch.tensor(list(alone))
        found.append(deviation(torch.tensor(one.tokens), tokens, f"tokens of request {row}"))
        found.append(deviation(engine.release(one).logits, alone.state.logits, f"logits of request {row}"))
    return worst(found)


def _of(kind: str) -> LanguageModel:
    return LanguageModel(ModelConfig(_VOCAB, _WIDTH, {"X": (MIXERS[kind](),)}, "X"))


def _model(make: Callable[[], LanguageModel], device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A model of the same weights every time, peaked enough for its tokens to differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().to(device, dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model
