"""Generation: read a prompt in pieces, then draw one token at a time; stop anywhere and continue from a session."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from numbers import Integral

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.options import brief
from dualform.core.tree import clone
from dualform.generation.decoder import Decoder
from dualform.generation.options import Sampling
from dualform.generation.session import WINDOW, Session, mark
from dualform.models.lm import LanguageModel

# Features of the residual stream in one piece of a prompt: bounds the memory of a prompt of any length. Small on a CPU,
# where larger pieces are not faster and the caches are small; on an accelerator a piece is thousands of tokens.
PREFILL = {"cpu": 2**15, "accelerator": 2**21}
_LEAST_PIECE = 64  # tokens
_DEFAULT = Sampling()
_MODEL = "dualform.load reads one from a folder, and LanguageModel(config) makes one"
_SAMPLING = "such as dualform.Sampling(temperature=0.8)"
_ELSEWHERE = {
    field.name: f"it is an option of Sampling: generate(..., sampling=Sampling({field.name}={field.default}))"
    for field in fields(Sampling)
}


@explained(elsewhere=_ELSEWHERE)
def generate(
    model: LanguageModel,
    prompt_tokens: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    sampling: Sampling = _DEFAULT,
    stop: Iterable[int | Sequence[int]] = (),
    seed: int | None = None,
    state: Session | None = None,
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

    Raises:
        ArgumentError: for an empty prompt without a state, tokens outside the vocabulary, or a session that does
            not fit the model.
    """
    if not isinstance(getattr(getattr(model, "config", None), "vocab_size", None), int):
        raise ArgumentError(f"generate: model is {type(model).__name__}, expected a LanguageModel", hint=_MODEL)
    if not isinstance(sampling, Sampling):
        raise ArgumentError(f"generate: sampling is {brief(sampling)}, expected a Sampling", hint=_SAMPLING)
    vocab = model.config.vocab_size
    prompt = _token_tensor("generate: prompt_tokens", prompt_tokens, vocab)
    if not len(prompt) and state is None:
        raise ArgumentError("generate: the prompt is empty", hint="give at least one token, or a state to continue")
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 0:
        raise ArgumentError(f"generate: max_new_tokens is {brief(max_new_tokens)}, expected a whole number, 0 or more")
    if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 2**63):
        raise ArgumentError(f"generate: seed is {brief(seed)}, expected a whole number in [0, 2^63)")
    stops = _stop_sequences(stop, vocab)
    if state is None:
        # Capacity for the prompt alone: it must not depend on how many tokens a call happens to ask for.
        state = Session.start(model, seed=seed or 0, max_len=len(prompt))
    else:
        _check_session(state, model)
        state = state.to(next(model.parameters()).device)
        state = state if seed is None else state._replace(seed=torch.full_like(state.seed, seed))
    return Generation(model, prompt, max_new_tokens, sampling, stops, state)


class Generation(Iterator[int]):
    """Tokens, one at a time, and where the generation stands. Made by :func:`generate`, from a session of its own.

    Attributes:
        finish: why it ended, ``"length"`` or ``"stop"``; empty while it has not.
    """

    finish: str = ""

    def __init__(
        self,
        model: LanguageModel,
        prompt: Tensor,
        max_new_tokens: int,
        sampling: Sampling,
        stops: list[tuple[int, ...]],
        session: Session,
    ):
        self.model, self.sampling, self.stops = model, sampling, stops
        self._device = next(model.parameters()).device
        features = PREFILL["cpu" if self._device.type == "cpu" else "accelerator"]
        self._piece = max(_LEAST_PIECE, features // model.config.d_model)
        self._remaining = max_new_tokens
        self._prompt = prompt
        self._decoder: Decoder | None = None
        self._state, self._logits = session.state, session.logits
        self._history = deque((token for token in session.history[0].tolist() if token >= 0), maxlen=WINDOW)
        self._generated = 0 if len(prompt) else int(session.generated)
        self._position, self._seed, self._mark = int(session.position), int(session.seed), session.model

    def __next__(self) -> int:
        if self.finish or not self._remaining:
            self.finish = self.finish or "length"
            raise StopIteration
        with _evaluating(self.model):
            self._read()
            if self._decoder is None:
                given = self._state, self._logits, self._window()
                self._decoder = Decoder(self.model, *given, self.sampling, [self._seed], [self._position])
                self._state = None
            (token,) = self._decoder.next()
        self._remember([token])
        self._generated += 1
        self._remaining -= 1
        if self._stopped():
            self.finish = "stop"
        return token

    @property
    def state(self) -> Session:
        """The session after every token yielded so far: a copy, to be kept, saved, forked or continued."""
        with _evaluating(self.model):
            self._read()
            state, logits = clone((self._state, self._logits)) if self._decoder is None else self._decoder.state
        generated, position, seed = (torch.tensor([n]) for n in (self._generated, self._position, self._seed))
        return Session(state, logits, self._window(), generated, position, seed, clone(self._mark))

    def _window(self) -> Tensor:
        """The last of the tokens that were seen, as a session holds them."""
        history = torch.full((1, WINDOW), -1, dtype=torch.int64)
        if self._history:
            history[0, -len(self._history) :] = torch.tensor(self._history)
        return history

    def _read(self) -> None:
        """Bring the state up to the end of the prompt, in pieces."""
        with torch.inference_mode():
            while len(self._prompt):
                piece, rest = self._prompt[: self._piece], self._prompt[self._piece :]
                features, self._state = self.model.features(piece[None].to(self._device), self._state)
                self._prompt = rest
                self._remember(piece[-WINDOW:].tolist(), len(piece))
                if not len(rest):
                    self._logits = self.model.logits(features[:, -1:])[:, 0].float()

    def _remember(self, tokens: list[int], seen: int = 1) -> None:
        self._history.extend(tokens)
        self._position += seen

    def _stopped(self) -> bool:
        recent = tuple(self._history)
        return any(len(s) <= self._generated and recent[-len(s) :] == s for s in self.stops)


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _token_tensor(where: str, tokens: Sequence[int] | Tensor, vocab: int) -> Tensor:
    if isinstance(tokens, str):
        raise ArgumentError(
            f"{where} is text, expected token ids",
            hint="encode it first: dualform.models.tokenizer.ByteTokenizer().encode(text)",
        )
    if not isinstance(tokens, Tensor):
        try:
            tokens = torch.tensor(tokens if isinstance(tokens, list) else list(tokens))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"{where}: expected a flat sequence of token ids ({error})") from None
    if tokens.shape == (0,):
        return torch.zeros(0, dtype=torch.int64)
    if tokens.dim() != 1 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ArgumentError(
            f"{where} is {tokens.dtype} of shape {tuple(tokens.shape)}, expected whole numbers of shape (T,)",
            hint="one sequence, without a batch axis",
        )
    tokens = tokens.detach().to("cpu", torch.int64)
    if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab):
        raise ArgumentError(
            f"{where} holds tokens from {int(tokens.min())} to {int(tokens.max())}; the vocabulary is 0 to {vocab - 1}"
        )
    return tokens


def _stop_sequences(stop: Iterable[int | Sequence[int]], vocab: int) -> list[tuple[int, ...]]:
    if isinstance(stop, (int, str)):
        raise ArgumentError(f"generate: stop is {stop!r}, expected a collection of token ids or sequences of them")
    stops = []
    for item in stop:
        tokens = _token_tensor("generate: stop", [item] if isinstance(item, int) else item, vocab)
        if not 1 <= len(tokens) <= WINDOW:
            raise ArgumentError(f"generate: a stop sequence has {len(tokens)} tokens, expected 1 to {WINDOW}")
        stops.append(tuple(tokens.tolist()))
    return stops


def _check_session(session: Session, model: LanguageModel) -> None:
    if not isinstance(session, Session):
        raise ArgumentError(
            f"generate: state is {type(session).__name__}, expected a Session", hint="generation.state is one"
        )
    if len(session.model) != 1:
        raise ArgumentError(
            f"generate: state has {len(session.model)} rows, expected 1",
            hint="one sequence at a time: dualform.core.tree.take(state, [0])",
        )
    if not torch.equal(session.model.cpu(), mark(model)):
        raise ArgumentError(
            "generate: state is a session of another model",
            hint="a session goes on only with the config, the weights and the dtype that made it",
        )
    if tuple(session.logits.shape) != (1, model.config.vocab_size):
        shape = tuple(session.logits.shape)
        raise ArgumentError(f"generate: state has logits of shape {shape}, expected (1, {model.config.vocab_size})")
