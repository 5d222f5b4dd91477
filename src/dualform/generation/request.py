"""What is asked of a generation, and where it stands on the host: checked, read in pieces, heard token by token."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, DualformError
from dualform.core.options import brief
from dualform.core.recurrence import State
from dualform.core.tree import clone
from dualform.generation.options import Sampling
from dualform.generation.session import WINDOW, Session, mark
from dualform.models.lm import LanguageModel

# Features of the residual stream in one piece of a prompt: bounds the memory of a prompt of any length. Small on a CPU,
# where larger pieces are not faster and the caches are small. On an accelerator, whose kernels are over before the host
# has launched the next ones, a piece is many thousands of tokens; it takes half a gigabyte.
PREFILL = {"cpu": 2**15, "accelerator": 2**24}
_LEAST_PIECE = 64  # tokens
_MODEL = "dualform.load reads one from a folder, and LanguageModel(config) makes one"
_SAMPLING = "such as dualform.Sampling(temperature=0.8)"


def check_model(where: str, model: LanguageModel) -> None:
    """That it is one.

    Raises:
        ArgumentError: where it is not.
    """
    if not isinstance(getattr(getattr(model, "config", None), "vocab_size", None), int):
        raise ArgumentError(f"{where}: model is {type(model).__name__}, expected a LanguageModel", hint=_MODEL)


def prefill_tokens(model: LanguageModel) -> int:
    """Tokens of a prompt that are read at once."""
    device = next(model.parameters()).device.type
    return max(_LEAST_PIECE, PREFILL["cpu" if device == "cpu" else "accelerator"] // model.config.d_model)


class Request:
    """A text that a model continues: what was asked for, and how far it is. Made by ``Engine.admit``.

    Attributes:
        tokens: what came so far.
        logprobs: of each token its log-probability, and the most likely tokens with theirs, likeliest first, where the
            engine tells them: of the model's own distribution, before penalty, temperature and truncations.
        finish: why it ended: ``"length"``, ``"stop"``, ``"released"`` before its end, or ``"error"``; empty while it
            has not ended.
        error: what ended it, where ``finish`` is ``"error"``.
        sampling: how its tokens are drawn.
        most: tokens that it may come to have seen, those before it included.
        exact: whether its prompt is read in pieces whose borders follow from the places of tokens alone.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Tensor,
        max_new_tokens: int,
        sampling: Sampling,
        stops: list[tuple[int, ...]],
        begin: Callable[[], Session],
        before: int = 0,
    ):
        self.tokens: list[int] = []
        self.logprobs: list[tuple[float, list[tuple[int, float]]]] = []
        self.finish, self.sampling = "", sampling
        self.error: DualformError | None = None
        self._model, self._stops = model, stops
        self.exact, self.most = False, before + len(prompt) + max_new_tokens
        self._prompt, self._remaining = prompt, max_new_tokens
        self._begin: Callable[[], Session] | None = begin  # where there is no memory for it yet
        self._ended: Session | None = None

    def _start(self, session: Session) -> None:
        self._state, self._logits = session.state, session.logits
        self._history = deque((token for token in session.history[0].tolist() if token >= 0), maxlen=WINDOW)
        self._generated = 0 if len(self._prompt) else int(session.generated)
        self._position, self._seed, self._mark = int(session.position), int(session.seed), session.model

    @property
    def unread(self) -> int:
        """Tokens of the prompt that were not read yet."""
        return len(self._prompt)

    @property
    def started(self) -> bool:
        """Whether there is memory for it."""
        return self._begin is None

    @property
    def exhausted(self) -> bool:
        """Whether no token follows; :attr:`finish` then says why."""
        if not self.finish and not self._remaining:
            self.finish = "length"
        return bool(self.finish)

    def start(self) -> State:
        """The state that its next piece is read from; memory is taken for it now, where it was not."""
        if self._begin is not None:
            self._start(self._begin())
            self._begin = None
        return self._state

    def piece(self, tokens: int) -> Tensor:
        """The next tokens of the prompt, so many at most."""
        return self._prompt[:tokens]

    def read(self) -> int:
        """Read one piece of the prompt; the number of its tokens, 0 where all were read."""
        state = self.start()
        if not len(self._prompt):
            return 0
        size = prefill_tokens(self._model)
        if self.exact:
            size -= self._position % size
        piece = self.piece(size)
        with torch.inference_mode():
            features, state = self._model.features(piece[None].to(self._logits.device), state)
            self.took(len(piece), state, features[:, -1:])
        return len(piece)

    def took(self, tokens: int, state: State, features: Tensor) -> None:
        """So many tokens of the prompt were read: the state after them, and the features ``(1, 1, D)`` of the last."""
        piece, self._prompt = self._prompt[:tokens], self._prompt[tokens:]
        self._state = state
        self._history.extend(piece[-WINDOW:].tolist())
        self._position += tokens
        if not len(self._prompt):
            self._logits = self._model.logits(features)[:, 0].float()

    @property
    def position(self) -> int:
        """Tokens that were seen, once it has started."""
        return self._position

    def hear(self, token: int) -> None:
        """The next token."""
        self._history.append(token)
        self._position += 1
        self._generated += 1
        self._remaining -= 1
        if self._stops and self._stopped():
            self.finish = "stop"

    def _stopped(self) -> bool:
        recent = tuple(self._history)
        return any(len(s) <= self._generated and recent[-len(s) :] == s for s in self._stops)

    def end(self, session: Session | None, error: DualformError | None = None) -> None:
        """Keep where it ended, until it is asked for, or the error that ended it."""
        self._ended, self.error = session, error
        self.finish = "error" if error is not None else self.finish or "released"

    def take(self) -> Session | None:
        """Where it ended; None where that was taken before, or it has not ended.

        Raises:
            DualformError: where an error ended it.
        """
        if self.error is not None:
            raise self.error
        session, self._ended = self._ended, None
        return session

    def hand_over(self) -> tuple[State, Tensor, Tensor, Sampling, int, int]:
        """What a row of a :class:`~dualform.generation.decoder.Decoder` goes on from; it is gone from here."""
        state, self._state = self._state, None
        return state, self._logits, self._window(), self.sampling, self._seed, self._position

    def session(self, decoded: tuple[State, Tensor] | None = None) -> Session:
        """Where it stands, with the state and the logits that a decoder gave, or a copy of those of the prompt."""
        state, logits = decoded or clone((self._state, self._logits))
        generated, position, seed = (torch.tensor([n]) for n in (self._generated, self._position, self._seed))
        return Session(state, logits, self._window(), generated, position, seed, clone(self._mark))

    def _window(self) -> Tensor:
        """The last of the tokens that were seen, as a session holds them."""
        history = torch.full((1, WINDOW), -1, dtype=torch.int64)
        if self._history:
            history[0, -len(self._history) :] = torch.tensor(self._history)
        return history


def request(
    where: str,
    model: LanguageModel,
    prompt_tokens: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    sampling: Sampling,
    stop: Iterable[int | Sequence[int]],
    seed: int | None,
    state: Session | None,
) -> Request:
    """A request of these arguments, those of :func:`dualform.generate`; ``where`` is who is given them.

    Raises:
        ArgumentError: names the argument that does not fit.
    """
    if not isinstance(sampling, Sampling):
        raise ArgumentError(f"{where}: sampling is {brief(sampling)}, expected a Sampling", hint=_SAMPLING)
    vocab = model.config.vocab_size
    prompt = _token_tensor(f"{where}: prompt_tokens", prompt_tokens, vocab)
    if not len(prompt) and state is None:
        raise ArgumentError(f"{where}: the prompt is empty", hint="give at least one token, or a state to continue")
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 0:
        raise ArgumentError(f"{where}: max_new_tokens is {brief(max_new_tokens)}, expected a whole number, 0 or more")
    if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 2**63):
        raise ArgumentError(f"{where}: seed is {brief(seed)}, expected a whole number in [0, 2^63)")
    stops = _stop_sequences(where, stop, vocab)
    if state is not None:
        _check_session(where, state, model)
    begin, before = partial(_begin, model, state, seed, len(prompt)), 0 if state is None else state.tokens
    return Request(model, prompt, max_new_tokens, sampling, stops, begin, before)


def _begin(model: LanguageModel, state: Session | None, seed: int | None, prompt: int) -> Session:
    """The session that a request goes on from: one of its own."""
    if state is None:
        # Capacity for the prompt alone: it must not depend on how many tokens a call happens to ask for.
        return Session.start(model, seed=seed or 0, max_len=prompt)
    state = state.to(next(model.parameters()).device)
    return state if seed is None else state._replace(seed=torch.full_like(state.seed, seed))


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


def _stop_sequences(where: str, stop: Iterable[int | Sequence[int]], vocab: int) -> list[tuple[int, ...]]:
    if isinstance(stop, (int, str)):
        raise ArgumentError(f"{where}: stop is {stop!r}, expected a collection of token ids or sequences of them")
    stops = []
    for item in stop:
        tokens = _token_tensor(f"{where}: stop", [item] if isinstance(item, int) else item, vocab)
        if not 1 <= len(tokens) <= WINDOW:
            raise ArgumentError(f"{where}: a stop sequence has {len(tokens)} tokens, expected 1 to {WINDOW}")
        stops.append(tuple(tokens.tolist()))
    return stops


def _check_session(where: str, session: Session, model: LanguageModel) -> None:
    if not isinstance(session, Session):
        raise ArgumentError(
            f"{where}: state is {type(session).__name__}, expected a Session", hint="generation.state is one"
        )
    if len(session.model) != 1:
        raise ArgumentError(
            f"{where}: state has {len(session.model)} rows, expected 1",
            hint="one sequence at a time: dualform.core.tree.take(state, [0])",
        )
    if not torch.equal(session.model.cpu(), mark(model)):
        raise ArgumentError(
            f"{where}: state is a session of another model",
            hint="a session goes on only with the config, the weights and the dtype that made it",
        )
    if tuple(session.logits.shape) != (1, model.config.vocab_size):
        shape = tuple(session.logits.shape)
        raise ArgumentError(f"{where}: state has logits of shape {shape}, expected (1, {model.config.vocab_size})")
