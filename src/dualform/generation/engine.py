"""Generation: read a prompt in pieces, then draw one token at a time; stop anywhere and continue from a session."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields

from torch import Tensor

from dualform.core.calls import explained
from dualform.generation.decoder import Decoder
from dualform.generation.options import Sampling
from dualform.generation.request import Request, check_model, request
from dualform.generation.sampling import not_finite
from dualform.generation.session import Session
from dualform.models.lm import LanguageModel

DEFAULT = Sampling()
ELSEWHERE = {
    field.name: f"it is an option of Sampling: generate(..., sampling=Sampling({field.name}={field.default}))"
    for field in fields(Sampling)
}


@explained(elsewhere=ELSEWHERE)
def generate(
    model: LanguageModel,
    prompt_tokens: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    sampling: Sampling = DEFAULT,
    stop: Iterable[int | Sequence[int]] = (),
    seed: int | None = None,
    state: Session | None = None,
    exact: bool = False,
) -> "Generation":
    """Continue a prompt: an iterator of tokens that hands back its state at any moment.

    ::

        generation = generate(model, prompt, 100, sampling=Sampling(temperature=0.8), seed=1)
        for token in generation: ...
        more = generate(model, [], 100, sampling=generation.sampling, state=generation.state)

    The second call yields the tokens that a first call of 200 would have yielded next, bit for bit on one machine.
    The prompt is read in pieces when the first token is asked for, so memory does not grow with it beyond what the
    model's state itself holds.

    Args:
        model: evaluated without gradients, on its own device; its training flag is left as it was. Its weights should
            not change before the last token: what follows from them alone is computed once, at the first step.
        prompt_tokens: token ids of one sequence, a list, bytes or a tensor ``(T,)``; may be empty with a state.
        max_new_tokens: the most tokens to yield; 0 only reads the prompt, when ``state`` is asked for.
        sampling: how a token is drawn; the default is ``Sampling()``, the model's own distribution.
        stop: token ids, or sequences of token ids, that end the generation. They are yielded before it ends.
        seed: of the random stream, in [0, 2^63). The default is 0, or the stream of ``state``; with both, the
            continuation leaves that stream for another.
        state: a session to continue. It is not changed, and may be continued again.
        exact: whether logits are bit for bit those that an ``Engine(model, exact=True)`` has for the same request, in
            whatever company; see there.

    Raises:
        ArgumentError: for an empty prompt without a state, tokens outside the vocabulary, or a session that does
            not fit the model.
    """
    check_model("generate", model)
    options = {"sampling": sampling, "stop": stop, "seed": seed, "state": state}
    asked = request("generate", model, prompt_tokens, max_new_tokens, **options)
    asked.exact = exact
    return Generation(model, asked)


class Generation(Iterator[int]):
    """Tokens, one at a time, and where the generation stands. Made by :func:`generate`."""

    def __init__(self, model: LanguageModel, asked: Request):
        self.model = model
        self._asked = asked
        self._decoder: Decoder | None = None

    @property
    def finish(self) -> str:
        """Why it ended, ``"length"`` or ``"stop"``; empty while it has not."""
        return self._asked.finish

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return self._asked.sampling

    def __next__(self) -> int:
        if self._asked.exhausted:
            raise StopIteration
        with evaluating(self.model):
            self._read()
            if self._decoder is None:
                self._decoder = Decoder(self.model, 1, exact=self._asked.exact)
                self._decoder.put(0, *self._asked.hand_over())
            (token,) = self._decoder.next()
        if token is None:
            raise not_finite()
        self._asked.hear(token)
        return token

    @property
    def state(self) -> Session:
        """The session after every token yielded so far: a copy, to be kept, saved, forked or continued."""
        with evaluating(self.model):
            self._read()
            return self._asked.session(None if self._decoder is None else self._decoder.read(0))

    def _read(self) -> None:
        """Bring the state up to the end of the prompt, in pieces."""
        while self._asked.read():
            pass


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """The model in evaluation mode, and as it was afterwards."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
