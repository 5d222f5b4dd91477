"""Many generations at a time: requests that join and leave the rows of one batch between its steps."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.options import brief
from dualform.generation.decoder import Decoder
from dualform.generation.engine import DEFAULT, ELSEWHERE, evaluating
from dualform.generation.exact import rows_together
from dualform.generation.memory import check_memory
from dualform.generation.options import Sampling
from dualform.generation.prefill import read_piece
from dualform.generation.request import Request, check_model, prefill_tokens, request
from dualform.generation.sampling import not_finite
from dualform.generation.session import Session
from dualform.models.lm import LanguageModel

_SHARE = 8  # prompts that are read one by one between two steps, at most: one costs at least this part of a piece


@explained(elsewhere=ELSEWHERE)
class Engine:
    """A batch of rows that decode together; each has a request of its own, which may come and go between steps.

    ::

        engine = Engine(model, rows=16)
        requests = [engine.admit(prompt, 100, sampling=Sampling(temperature=0.8), seed=1) for prompt in prompts]
        for request, token in engine:  # until all are done
            ...

    The tokens of a request are those that :func:`dualform.generate` yields for the same arguments, up to rounding:
    batches of different sizes may add in different orders, and then tokens differ where two candidates are as close as
    that. With ``exact=True`` they are those of ``generate(..., exact=True)``, and so are the logits bit for bit, on one
    machine with one number of threads: a row is summed in one order, whatever the others do, and prompts are read one
    by one, in pieces whose borders are multiples of one length. For stacks of Mamba, Mamba-2, S4D, DSS, S5, LRU,
    attention and feed-forwards on a CPU, where kernels run the whole step, that costs nothing where several rows are
    taken (Mamba-2 130M: 68 ms for 16 rows with it and without it), and a third more for a row alone; all other models
    then step one row after the other, so that n rows take n times as long. What is not finite in one row ends its
    request, and no other.

    Requests wait where all rows are taken, and are served in the order in which they came. A prompt is read in pieces,
    at most as much as one piece between two steps, so that a long prompt does not hold up those that are under way.
    Short ones share a piece, end to end in one call.

    Args:
        model: evaluated without gradients, on its own device; its training flag is left as it was. Its weights should
            not change any more: what follows from them alone is computed once, when the first request gets a row.
        rows: the most requests that decode at a time. On a GPU every step computes all of them, free ones too.
        logprobs: how many of the most likely tokens are told with their log-probabilities for every token of a request,
            beside that of the token itself; 0 tells the latter alone, None none, which costs nothing.
        exact: whether tokens and logits are bit for bit the same alone and in company.
        state_dtype: ``torch.bfloat16`` or ``torch.float16`` to hold the float32 states of rows in between steps,
            rounded once a step: half the memory, and on a GPU with many rows less time. Sessions get float32 back.
            None, the default, rounds nothing.

    Raises:
        ArgumentError: for what is no language model, fewer than one row, log-probabilities of fewer than no tokens, or
            another dtype; for more rows than fit into the memory of a GPU.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: int = 16,
        *,
        logprobs: int | None = None,
        exact: bool = False,
        state_dtype: torch.dtype | None = None,
    ):
        check_model("Engine", model)
        if isinstance(rows, bool) or not isinstance(rows, Integral) or rows < 1:
            raise ArgumentError(f"Engine: rows is {brief(rows)}, expected a whole number, 1 or more")
        if logprobs is not None and (isinstance(logprobs, bool) or not isinstance(logprobs, Integral) or logprobs < 0):
            raise ArgumentError(f"Engine: logprobs is {brief(logprobs)}, expected a whole number, 0 or more, or None")
        if state_dtype not in (None, torch.bfloat16, torch.float16):
            raise ArgumentError(f"Engine: state_dtype is {state_dtype}, expected torch.bfloat16, torch.float16 or None")
        self.model, self._state_dtype = model, state_dtype
        self._logprobs = None if logprobs is None else int(logprobs)
        self._rows: list[Request | None] = [None] * int(rows)
        self._queue: deque[Request] = deque()
        self._exact = exact
        self._share = min(int(rows), rows_together(model)) if exact else int(rows)  # rows of one decoder
        self._decoders: list[Decoder | None] = [None] * (-(-int(rows) // self._share))
        self._fits = 0, 0  # rows, and tokens of each, for which there is memory
        self._all = next(model.parameters()).device.type == "cuda"  # whether all rows are there from the first one on
        if self._all:
            check_memory("Engine", model, int(rows), 1, state_dtype=state_dtype)

    @property
    def running(self) -> tuple[Request, ...]:
        """The requests that have a row."""
        return tuple(one for one in self._rows if one is not None)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """The requests that have none yet, in their order."""
        return tuple(self._queue)

    def admit(
        self,
        prompt_tokens: Sequence[int] | Tensor,
        max_new_tokens: int,
        *,
        sampling: Sampling = DEFAULT,
        stop: Iterable[int | Sequence[int]] = (),
        seed: int | None = None,
        state: Session | None = None,
    ) -> Request:
        """Let a request in; it is served by the steps that follow, as soon as a row is free.

        Args:
            prompt_tokens: token ids of one sequence, a list, bytes or a tensor ``(T,)``; may be empty with a state.
            max_new_tokens: the most tokens that it gets; 0 only reads the prompt.
            sampling: how its tokens are drawn.
            stop: token ids, or sequences of token ids, that end it. They are given before it ends.
            seed: of its random stream, as for :func:`dualform.generate`.
            state: a session to continue. It is not changed.

        Raises:
            ArgumentError: as for :func:`dualform.generate`; and where the rows that are then taken, each as long as the
                longest may become, do not fit into memory: it says how many do.
        """
        options = {"sampling": sampling, "stop": stop, "seed": seed, "state": state}
        made = request("Engine.admit", self.model, prompt_tokens, max_new_tokens, **options)
        made.exact = self._exact
        self._let_in("Engine.admit", [made])
        return made

    def _let_in(self, where: str, asked: list[Request]) -> None:
        """Requests wait from now on, if memory holds their rows, each as long as the longest may become."""
        rows, longest = self._fits
        count = min(len(self._rows), len(self.running) + len(self._queue) + len(asked))
        most = max((one.most for one in asked), default=0)
        if count > rows or most > longest:
            most = max([most, *(one.most for one in (*self.running, *self._queue))])
            held = sum(decoder.nbytes for decoder in self._decoders if decoder is not None)
            rows = len(self._rows) if self._all else count
            check_memory(where, self.model, rows, most, held, self._state_dtype)
            self._fits = count, most
        self._queue.extend(asked)

    def step(self) -> list[tuple[Request, int]]:
        """Read at most one piece of prompts, then decode one token of every row: the requests with their tokens.

        Where no row is taken yet, the first prompt is read to its end. A request whose logits are not finite gets no
        token: its ``finish`` is ``"error"``, and its ``error`` says why.
        """
        given: list[tuple[Request, int]] = []
        with evaluating(self.model):
            self._fill()
            for row, token, scores in self._decode():
                if (one := self._rows[row]) is None:
                    continue
                if token is None:
                    one.end(None, not_finite())
                    self._leave(row)
                    continue
                one.hear(token)
                one.tokens.append(token)
                one.logprobs += scores
                given.append((one, token))
                if one.exhausted:
                    one.end(self._leave(row))
        return given

    def _decode(self) -> list[tuple[int, int | None, list[Any]]]:
        """The rows that are taken, with the token of each and its log-probabilities, where they are told."""
        found: list[tuple[int, int | None, list[Any]]] = []
        for first, decoder in zip(range(0, len(self._rows), self._share), self._decoders, strict=True):
            taken = [row for row, one in enumerate(self._rows[first : first + self._share]) if one is not None]
            if decoder is not None and taken:
                tokens = decoder.next()
                scores = [[] if self._logprobs is None else [decoder.logprobs(row)] for row in taken]
                found += [(first + row, tokens[row], told) for row, told in zip(taken, scores, strict=True)]
        return found

    def __iter__(self) -> Iterator[tuple[Request, int]]:
        while self._queue or self.running:
            yield from self.step()

    def release(self, request: Request) -> Session:
        """Take a request out, at any time, and its session, with which it goes on anywhere.

        The session is that after all tokens that were given; of a request that waits, the rest of its prompt is read
        first. A request that has ended holds its session until it is released, or nobody holds the request.

        Raises:
            ArgumentError: for a request that is not here, such as one that was released before, or that an error
                ended.
        """
        if not isinstance(request, Request):
            raise ArgumentError(
                f"Engine.release: request is {brief(request)}, expected a Request", hint="admit returns one"
            )
        if not request.finish:
            with evaluating(self.model):
                if request in self._queue:
                    while request.read():
                        pass
                    self._queue.remove(request)
                    request.end(request.session())
                elif request in self._rows:
                    request.end(self._leave(self._rows.index(request)))
        session = request.take()
        if session is None:
            raise ArgumentError("Engine.release: the request was released before, or is another engine's")
        return session

    def _fill(self) -> None:
        """Read one piece of prompts, or until a row is taken; and put in free rows those that were read."""
        while self._queue:
            free = self._rows.count(None)
            if self._exact:
                self._read_alone(free)
            else:
                read_piece(self.model, [one for one, _ in zip(self._queue, range(free), strict=False)])
            while self._queue and None in self._rows and self._queue[0].started and not self._queue[0].unread:
                self._seat(self._queue.popleft())
            if self.running:
                break

    def _read_alone(self, most: int) -> None:
        """Read prompts one by one, as much as one piece; each costs at least a part of one."""
        left = piece = prefill_tokens(self.model)
        for one, _ in zip(self._queue, range(most), strict=False):
            while one.unread or not one.started:
                cost = max(min(one.unread, piece), piece // _SHARE)
                if cost > left:
                    return
                left -= cost
                one.read()

    def _seat(self, one: Request) -> None:
        """Put a request whose prompt was read in a free row, if a token is to follow."""
        if one.exhausted:
            one.end(one.session())
            return
        row = self._rows.index(None)
        which, place = divmod(row, self._share)
        decoder = self._decoders[which]
        if decoder is None:
            decoder = Decoder(
                self.model,
                self._share,
                logprobs=self._logprobs,
                state_dtype=self._state_dtype,
                exact=self._exact,
            )
            self._decoders[which] = decoder
        decoder.put(place, *one.hand_over())
        self._rows[row] = one

    def _leave(self, row: int) -> Session | None:
        """Free a row; the session of its request, None where it has failed."""
        one, self._rows[row] = self._rows[row], None
        which, place = divmod(row, self._share)
        decoder = self._decoders[which]
        if one is None or decoder is None:
            return None
        session = None if one.error else one.session(decoder.read(place))
        decoder.free(place)
        return session


@explained(elsewhere=ELSEWHERE)
def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | Tensor],
    max_new_tokens: int,
    *,
    sampling: Sampling | Sequence[Sampling] = DEFAULT,
    stop: Iterable[int | Sequence[int]] = (),
    seed: int = 0,
    rows: int = 16,
    exact: bool = False,
) -> list[list[int]]:
    """Continue many prompts, of any lengths: the new tokens of each, in their order.

    Args:
        model: as for :func:`dualform.generate`.
        prompts: token ids of each.
        max_new_tokens: the most tokens for each.
        sampling: how tokens are drawn, of all or of each.
        stop: token ids, or sequences of token ids, that end a generation; they are its last tokens.
        seed: of the first prompt's random stream; the next one's is one more, and so on.
        rows: how many are decoded at a time.
        exact: whether tokens are those of each prompt by itself, whatever is decoded beside it; see :class:`Engine`.

    Raises:
        ArgumentError: for arguments that do not fit, logits of a prompt that are not finite, or a batch that memory
            does not hold: it says how many rows it does.
    """
    engine, stops = Engine(model, rows, exact=exact), list(stop) if isinstance(stop, Iterator) else stop
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence | Tensor):
        raise ArgumentError(f"generate_batch: prompts is {brief(prompts)}, expected a list of token ids for each")
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    if not isinstance(samplings, Sequence) or len(samplings) != len(prompts):
        raise ArgumentError(
            f"generate_batch: sampling is {brief(sampling)}, expected a Sampling, or one for each of "
            f"{len(prompts)} prompts"
        )
    if not isinstance(seed, Integral):
        raise ArgumentError(f"generate_batch: seed is {brief(seed)}, expected a whole number in [0, 2^63)")
    requests: list[Request] = []
    for i, (prompt, one) in enumerate(zip(prompts, samplings, strict=True)):
        where, options = f"generate_batch: prompts[{i}]", {"sampling": one, "stop": stops, "seed": seed + i}
        requests.append(request(where, model, prompt, max_new_tokens, **options, state=None))
        requests[-1].exact = exact
    engine._let_in("generate_batch", requests)  # pyright: ignore[reportPrivateUsage]
    for _ in engine:
        pass
    if failed := next((one.error for one in requests if one.error), None):
        raise failed
    return [one.tokens for one in requests]
