"""Decoding: rows of a model that go on by one token at a time, on the device.

The token that is drawn stays on the device, and goes into the next step from there. On a GPU a step and the draw behind
it are one CUDA graph, which is started before the host reads the token that goes into it: the host holds nothing up.
"""

import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from dualform.core.recurrence import State
from dualform.core.tree import clone, leaves, tree_map
from dualform.generation.options import Sampling
from dualform.generation.sampling import choose, not_finite, uniforms
from dualform.models.lm import LanguageModel
from dualform.ops.op import SlowBackendWarning

_DRAWS = 64  # random numbers of a row that are on the device at a time
_LEAST_ROOM = 256  # tokens that a growing cache has room for, in a graph


class Decoder:
    """Rows that were read up to their last token, and go on: :meth:`next` gives a token of each.

    The state is that after all tokens that were given. Every step is the same operations, so that where rows are put
    down and go on changes nothing.

    Args:
        model: in evaluation mode; steps are prepared here, see :class:`~dualform.layers.mixer.Prepared`.
        state: of B rows; it is used up.
        logits: of the next tokens, float32 ``(B, V)``.
        history: the last tokens of each row, ``(B, L)``; -1 fills the empty places on the left.
        sampling: how tokens are drawn.
        seeds: of the rows' random streams.
        positions: tokens that each row has seen, the places in these streams.
        graphs: whether a step is captured in a CUDA graph, on a device that has them.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: State,
        logits: Tensor,
        history: Tensor,
        sampling: Sampling,
        seeds: Sequence[int],
        positions: Sequence[int],
        *,
        graphs: bool = True,
    ):
        rows, device = len(logits), logits.device
        self._model, self._sampling = model, sampling
        self._seeds, self._positions = list(seeds), list(positions)
        self._ahead = device.type == "cuda"  # whether a step is under way before its token was read
        self._graphs, self._graph = graphs and self._ahead, None
        self._stale = False  # whether the token at hand was given, and is not in the state yet
        with torch.inference_mode():
            self._state, self._logits = state, logits.clone()
            self._history = history.to(device, copy=True) if sampling.repetition_penalty != 1 else None
            self._draws = torch.zeros(rows, _DRAWS, dtype=torch.float64, device=device)
            self._at = torch.zeros(1, dtype=torch.int64, device=device)  # of the next draw
            self._report = torch.zeros(2, rows, dtype=torch.int64, device=device)  # tokens; are logits finite
            self._token = self._report[0]
            self._host = torch.zeros(2, rows, dtype=torch.int64, pin_memory=self._ahead)
            self._steps = model.prepare()
            self._drawn = _DRAWS
            self._refill()
            self._choose()

    def next(self) -> list[int]:
        """A token of each row.

        Raises:
            ArgumentError: where the logits of a row are not finite.
        """
        with torch.inference_mode():
            if self._ahead:
                self._host.copy_(self._report, non_blocking=True)
                read = torch.cuda.Event()
                read.record()
                self._advance()
                read.synchronize()
                tokens, finite = self._host.tolist()
            else:
                self._catch_up()
                tokens, finite = self._report.tolist()
                self._stale = True
        if not all(finite):
            raise not_finite()
        return tokens

    @property
    def state(self) -> tuple[State, Tensor]:
        """The state after every token that was given, and the logits behind it: copies."""
        with torch.inference_mode():
            self._catch_up()
        return clone(self._state), self._logits.clone()  # outside, so that autograd may see them

    def _catch_up(self) -> None:
        if self._stale:
            self._advance()
            self._stale = False

    def _advance(self) -> None:
        """One step by the tokens at hand, and the draw of the next ones."""
        self._positions = [position + 1 for position in self._positions]
        self._refill()
        if self._graphs and (self._graph is None or max(self._positions) > self._room):
            self._capture()
        if self._graph is None:
            self._state = self._step()
        else:
            self._graph.replay()

    def _step(self) -> State:
        if self._history is not None:
            self._history.copy_(torch.cat([self._history[:, 1:], self._token[:, None]], 1))
        logits, state = self._steps.step(self._token, self._state)
        self._logits.copy_(logits)
        self._choose()
        return state

    def _choose(self) -> None:
        draws = self._draws[:, 0]
        if self._sampling.temperature > 0:
            draws = self._draws.index_select(1, self._at)[:, 0]
            self._at += 1
        token, finite = choose(self._logits, self._sampling, draws, self._history)
        self._token.copy_(token)
        self._report[1].copy_(finite)

    def _refill(self) -> None:
        """The random numbers of the next draws, where those at hand are used up."""
        self._drawn += 1
        if self._drawn <= _DRAWS:
            return
        self._drawn = 1
        if self._sampling.temperature > 0:
            draws = torch.from_numpy(uniforms(self._seeds, self._positions, _DRAWS))
            self._draws.copy_(draws.pin_memory() if self._ahead else draws, non_blocking=True)
            self._at.zero_()

    # On a GPU.

    def _capture(self) -> None:
        """A step in a CUDA graph, which reads and writes the memory that it finds here."""
        self._choose_room()
        self._state = self._roomy(self._state)
        moving = (self._state, self._logits, self._at, self._report)
        moving = moving if self._history is None else (*moving, self._history)
        before = clone(moving)
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._keep(self._step())  # what is compiled or chosen once, is so here
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=aside):
                    self._keep(self._step())
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = graph
        except Exception as error:
            torch.cuda.synchronize()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"generation runs slower: a step could not be captured in a CUDA graph ({reason})",
                SlowBackendWarning,
                stacklevel=2,
            )
            self._graphs, self._graph = False, None
        tree_map(lambda now, then: now.copy_(then), moving, before)

    def _choose_room(self) -> None:
        """The tokens that growing caches have room for: they follow from those seen, wherever rows were put down."""
        small, large = (leaves(self._model.init_state(1, max_len=n)) for n in (1, 2))
        grows = any(a.shape != b.shape for a, b in zip(small, large, strict=True))
        self._room = 2 ** max(_LEAST_ROOM - 1, max(self._positions)).bit_length() if grows else sys.maxsize

    def _keep(self, state: State) -> None:
        """The state where the graph looks for it: steps that do not write there leave it elsewhere."""
        for here, made in zip(leaves(self._state), leaves(state), strict=True):
            if here.data_ptr() != made.data_ptr():
                here.copy_(made)

    def _roomy(self, state: State) -> State:
        """The state with memory of its own, where caches that grow have room for as many tokens as the graph."""
        room = 0 if self._room == sys.maxsize else self._room
        grown = self._model.init_state(len(self._logits), max_len=room)

        def moved(old: Tensor, new: Tensor) -> Tensor:
            if old.shape == new.shape or old.dim() < 2 or old.shape[1] >= new.shape[1]:
                return old.clone()
            new = new.to(old.dtype)
            new[:, : old.shape[1]] = old
            return new

        return tree_map(moved, state, grown)
