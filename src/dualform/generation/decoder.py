"""Decoding: rows of a model that go on by one token at a time, on the device.

The token that is drawn stays on the device, and goes into the next step from there. On a GPU a step and the draw behind
it are one CUDA graph, which is started before the host reads the token that goes into it: the host holds nothing up. A
graph is captured when a second token is asked for: the first is drawn from the logits of the prompt.

A row has a slot, its place in the tensors of all. On a GPU there is a slot for each row, free ones too, as graphs want
memory that stays; on a CPU there are slots for the rows that are taken, and a step costs what those cost.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dualform.core.recurrence import State
from dualform.core.tree import leaves, may_write, nbytes, tree_map
from dualform.generation.capture import captured
from dualform.generation.exact import rows_together
from dualform.generation.options import Sampling
from dualform.generation.prefill import growing
from dualform.generation.sampling import Wants, choose, likeliest, scored, table, uniforms
from dualform.generation.slots import DRAWS, Slots, free_slot
from dualform.layers.projection import kernels_run
from dualform.models.lm import LanguageModel
from dualform.ops.native.draw import draw

_LEAST_ROOM = 256  # tokens that a growing cache has room for, in a graph
_IDLE = 128  # tokens that a free row takes before it begins anew; its caches do not grow beyond
_GRAPHS = 8  # of one step each, for different wants of the rows


class Decoder:
    """Rows that go on together: :meth:`next` gives a token of each.

    A row is put in after its last token was read, and taken out with the state after all tokens that were given. What
    a row holds changes nothing for the others. On a GPU a row that is free goes on from the token 0, and nobody reads
    what it says.

    Args:
        model: in evaluation mode; its steps are prepared at the first, see :class:`~dualform.layers.mixer.Prepared`.
        rows: B, how many there are, all free.
        logprobs: how many of the most likely tokens are told with their log-probabilities, beside that of the token
            that is given; None tells none.
        graphs: whether a step is captured in a CUDA graph, on a device that has them.
        state_dtype: that states of float32 are held in between steps, such as bfloat16, which halves their memory and,
            on a GPU, the time that reading and writing them takes. By default they stay what they are.
        exact: whether a row is summed in the same order however many there are; then there are at most
            :func:`~dualform.generation.exact.rows_together`.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: int,
        *,
        logprobs: int | None = None,
        graphs: bool = True,
        state_dtype: torch.dtype | None = None,
        exact: bool = False,
    ):
        device = next(model.parameters()).device
        self._model, self._rows, self._exact = model, rows, exact
        self._least = min(2, rows_together(model)) if exact else 1  # slots; a single row is summed in another order
        self._ahead = device.type == "cuda"  # whether a step is under way before its token was read
        self._graphs, self._captured = graphs and self._ahead, dict[Wants, Any]()
        self._taken: list[int | None] = []  # the row in each slot
        self._samplings: list[Sampling | None] = []  # of each slot; None in a free one
        self._seeds, self._positions = list[int](), list[int]()  # of the random streams, and the places in them
        self._wants = Wants.of(())
        self._stale = False  # whether the tokens at hand were given, and are not in the state yet
        self._changed = False  # whether rows were put in since tokens were drawn
        self._room = 0  # tokens that growing caches have room for, in graphs
        self._column = 0  # of the numbers for the draw
        self._dtype = state_dtype
        self._dtypes: list[torch.dtype] = []  # of the states that rows bring, and take with them
        self._grows = growing(model)
        home = torch.device("cpu") if device.type == "mps" else device  # of float64
        self._top = None if logprobs is None else min(logprobs, model.config.vocab_size)
        with torch.inference_mode():
            self._state: State | None = None
            self._blank_state = model.init_state(1)
            self._blank = free_slot(device, home, model.config.vocab_size, self._top)
            self._slots: Slots = tree_map(lambda leaf: leaf[:0], self._blank)
            self._at = torch.zeros(1, dtype=torch.int64, device=home)  # the column, on the device
            self._lay(0)
        self._steps: Any = None  # prepared at the first of them: the first token of a prompt does not wait for it

    def put(
        self, row: int, state: State, logits: Tensor, history: Tensor, sampling: Sampling, seed: int, position: int
    ) -> None:
        """Put a sequence into a free row. Its state is used up.

        Args:
            row: 0 to B - 1.
            state: of the sequence, one row.
            logits: of its next token, float32 ``(1, V)``.
            history: its last tokens, ``(1, WINDOW)``; -1 fills the empty places on the left.
            sampling: how its tokens are drawn.
            seed: of its random stream.
            position: tokens that it has seen, the place in this stream.
        """
        with torch.inference_mode():
            self._catch_up()
            self._dtypes = [leaf.dtype for leaf in leaves(state)]
            state = self._held(state)
            slot = self._claim(row, state)
            self._samplings[slot], self._seeds[slot], self._positions[slot] = sampling, seed, position
            self._wants = Wants.of(s for s in self._samplings if s is not None)
            self._write(slot, state)
            here = self._slots
            here.logits[slot].copy_(logits[0])
            here.history[slot].copy_(history[0])
            here.options[slot].copy_(table([sampling])[0])
            if self._wants.drawn:
                draws = uniforms([seed], [position], DRAWS - self._column)
                here.draws[slot, self._column :].copy_(torch.from_numpy(draws)[0])
                self._at.fill_(self._column)
            self._changed = True

    def next(self) -> list[int | None]:
        """A token of each row; None where the logits of a row are not finite, and of a free row any."""
        with torch.inference_mode():
            if self._stale:
                self._advance(capture=True)
                self._stale = False
            self._let_go()
            if self._changed:
                self._choose()  # once more in the other rows, which gives the same tokens
                self._changed = False
            ahead = self._ahead and (not self._graphs or self._warm(1))
            self._host.copy_(self._report, non_blocking=ahead)
            if self._top is not None:
                self._host_scores.copy_(self._slots.scores, non_blocking=ahead)
            if ahead:
                read = torch.cuda.Event()
                read.record()
                self._advance(capture=False)
                read.synchronize()
            self._stale = not ahead  # tokens at hand do not wait for a graph to be captured
            tokens, finite = self._host.tolist()
        given: list[int | None] = [0] * self._rows
        for row, token, fine in zip(self._taken, tokens, finite, strict=True):
            if row is not None:
                given[row] = token if fine else None
        return given

    def logprobs(self, row: int) -> tuple[float, list[tuple[int, float]]]:
        """The log-probability of the token that a row was given last, and the most likely ones with theirs.

        Of the model's own distribution, before penalty, temperature and truncations.
        """
        found, n = self._host_scores[self._taken.index(row)].tolist(), self._top or 0
        return found[0], [(int(token), score) for token, score in zip(found[1 + n :], found[1 : 1 + n], strict=True)]

    def read(self, row: int) -> tuple[State, Tensor]:
        """The state of a row after every token of it that was given, and the logits behind it: copies."""
        with torch.inference_mode():
            self._catch_up()
        slot, of = self._taken.index(row), iter(zip(self._grows, self._dtypes, strict=True))
        seen, roomy = self._positions[slot], len(self._taken) > 1 or self._room > 0  # for the longest row, or graphs

        def one(leaf: Tensor) -> Tensor:
            grows, dtype = next(of)
            leaf = leaf[slot : slot + 1, :seen] if grows and roomy else leaf[slot : slot + 1]
            return leaf.to(dtype, copy=True)  # outside, so that autograd may see it

        return tree_map(one, self._state), self._slots.logits[slot : slot + 1].clone()

    @property
    def nbytes(self) -> int:
        """Bytes of the states of all rows that are there."""
        return 0 if self._state is None else nbytes(self._state)

    def free(self, row: int) -> None:
        """Leave a row to others."""
        with torch.inference_mode():
            self._catch_up()
            slot = self._taken.index(row)
            self._taken[slot] = self._samplings[slot] = None
            self._wants = Wants.of(s for s in self._samplings if s is not None)
            stays = self._ahead and not (self._exact and any(self._grows))  # the room of a cache is who had it before's
            if not stays and self._taken.count(None) == len(self._taken):
                self._arrange([], 0, None)
                self._state, self._room = None, 0
                self._captured.clear()
            elif self._ahead:
                self._begin_anew(slot)
                tree_map(lambda own, blank: own[slot].copy_(blank[0]), self._slots, self._blank)

    def _begin_anew(self, slot: int) -> None:
        self._positions[slot] = 0
        self._write(slot, self._blank_state)

    def _catch_up(self) -> None:
        if self._stale:
            self._advance(capture=self._exact)  # a graph may round otherwise than steps without one
            self._stale = False

    def _advance(self, *, capture: bool) -> None:
        """One step by the tokens at hand, and the draw of the next ones; by a graph that is there, or is captured."""
        self._steps = self._steps or self._model.prepare()
        self._positions = [position + 1 for position in self._positions]
        for slot, position in enumerate(self._positions):
            if self._samplings[slot] is None and position > _IDLE:
                self._begin_anew(slot)
        self._column += 1
        if self._column == DRAWS:
            self._refill()
        graph = self._graph() if self._graphs and (capture or self._warm()) else None
        if graph is not None:
            graph.replay()
        elif self._captured and max(self._positions) <= self._room:
            self._keep(self._step())  # where the graphs look for it
        else:
            self._captured.clear()
            self._state, self._room = self._held(self._step()), 0

    def _step(self) -> State:
        history = self._slots.history
        if self._wants.penalty:
            history.copy_(torch.cat([history[:, 1:], self._token[:, None]], 1))
        if self._wants.drawn:
            self._at += 1
        logits, state = self._steps.step(self._token, self._state)
        self._slots.logits.copy_(logits)
        self._choose()
        return state

    def _choose(self) -> None:
        here, wants = self._slots, self._wants
        if here.logits.is_cpu and kernels_run("cpu") and self._top is None:  # which draws each row by itself
            history = here.history if wants.penalty else None
            draw(here.logits, here.options, here.draws[:, self._column], history, self._report)
        elif not self._exact:
            self._choose_of(here, wants, self._report)
        else:
            for at, wants in self._apart():
                self._choose_of(Slots(*(leaf[at] for leaf in here)), wants, self._report[:, at])

    def _choose_of(self, slots: Slots, wants: Wants, report: Tensor) -> None:
        if wants.drawn or wants.penalty:
            draws = slots.draws.index_select(1, self._at)[:, 0] if wants.drawn else slots.draws[:, 0]
            token, finite = choose(slots.logits, wants, slots.options, draws, slots.history)
            report[0].copy_(token)
            report[1].copy_(finite)
        else:
            likeliest(slots.logits, report)
        if self._top is not None:
            slots.scores.copy_(scored(slots.logits, report[0], self._top))

    def _apart(self) -> Iterator[tuple[slice, Wants]]:
        """Each row that is taken by itself, and what it wants."""
        for slot, sampling in enumerate(self._samplings):
            if sampling is not None:
                yield slice(slot, slot + 1), Wants.of([sampling])

    def _refill(self) -> None:
        """The random numbers of the next draws, where those at hand are used up."""
        self._column = 0
        if self._wants.drawn:
            draws = torch.from_numpy(uniforms(self._seeds, self._positions, DRAWS))
            self._slots.draws.copy_(draws.pin_memory() if self._ahead else draws, non_blocking=True)
            self._at.fill_(-1)  # a step begins with the next column

    # The slots, and the memory of the states.

    def _claim(self, row: int, state: State) -> int:
        """A slot for a row with such a state."""
        if None not in self._taken:
            there = len(self._taken)
            more = self._rows if self._ahead else max(self._least - there, min(max(there, 1), self._rows - there))
            self._arrange(list(range(there)), more, state)
        slot = self._taken.index(None)
        self._taken[slot] = row
        return slot

    def _let_go(self) -> None:
        """Do without the slots of rows that were freed, where memory need not stay."""
        kept = [slot for slot, row in enumerate(self._taken) if row is not None]
        wanted = max(len(kept), self._least)
        if not self._ahead and kept and wanted < len(self._taken):
            self._arrange(kept, wanted - len(kept), self._state)

    def _arrange(self, kept: list[int], free: int, like: State) -> None:
        """Some of the slots, in this order, and so many free ones; the state has the dtypes of ``like``."""

        def moved(old: Tensor, blank: Tensor) -> Tensor:
            more = blank.to(old.dtype).expand(free, *blank.shape[1:])
            if blank.dim() > 1 and blank.shape[1] < old.shape[1]:  # a cache that has grown
                more = old.new_zeros(free, *old.shape[1:])
            return torch.cat([old[kept], more]) if free else old[kept]

        self._slots = tree_map(moved, self._slots, self._blank)
        if self._state is not None:
            self._state = tree_map(moved, self._state, self._blank_state)
        elif free == 1:
            self._state = like
        else:
            start = self._model.init_state(free)
            self._state = tree_map(lambda all, one: all.to(one.dtype, copy=True), start, like)
        self._taken = [*(self._taken[slot] for slot in kept), *[None] * free]
        self._samplings = [*(self._samplings[slot] for slot in kept), *[None] * free]
        self._seeds = [*(self._seeds[slot] for slot in kept), *[0] * free]
        self._positions = [*(self._positions[slot] for slot in kept), *[0] * free]
        self._lay(len(self._taken))
        self._changed = True

    def _lay(self, slots: int) -> None:
        """Memory for what slots say: tokens, and whether logits are finite."""
        device, wide = self._slots.logits.device, self._slots.scores.shape[1]
        self._report = torch.zeros(2, slots, dtype=torch.int64, device=device)
        self._token = self._report[0]
        self._host = torch.zeros(2, slots, dtype=torch.int64)
        self._host_scores = torch.zeros(slots, wide, dtype=torch.float64)
        if self._ahead and slots:
            self._host = self._host.pin_memory()
            self._host_scores = self._host_scores.pin_memory() if wide else self._host_scores

    def _held(self, state: State) -> State:
        """The state in the dtypes that it is held in."""
        if self._dtype is None:
            return state
        return tree_map(lambda leaf: leaf.to(self._dtype) if leaf.dtype == torch.float32 else leaf, state)

    def _write(self, slot: int, state: State) -> None:
        """Put the state of one row where the states of all are, which stay where they are if there is room."""
        if self._state is state:
            return
        needed, found = self._positions[slot], leaves(state)
        growing = [(own.shape[1], one.shape[1]) for own, one, grows in self._pairs(found) if grows]
        short = any(have < min(needed, brought) for have, brought in growing)
        if short or not all(map(may_write, leaves(self._state))):
            self._state = self._roomy(self._state, 2 ** (needed - 1).bit_length() if short else 0)
            self._captured.clear()
        for own, one, grows in self._pairs(found):
            if grows:
                slots = min(own.shape[1], one.shape[1])
                own[slot].zero_()
                own[slot, :slots].copy_(one[0, :slots])
            else:
                own[slot].copy_(one[0])

    def _pairs(self, found: list[Tensor]) -> Any:
        """The states of all rows, those of one, and whether they grow."""
        return zip(leaves(self._state), found, self._grows, strict=True)

    def _roomy(self, state: State, room: int) -> State:
        """The state with memory of its own, where caches that grow have room for so many tokens."""
        grown = self._model.init_state(len(self._taken), max_len=room)

        def moved(old: Tensor, new: Tensor) -> Tensor:
            if old.shape == new.shape or old.dim() < 2 or old.shape[1] >= new.shape[1]:
                return old.clone(memory_format=torch.contiguous_format)
            new = new.to(old.dtype)
            new[:, : old.shape[1]] = old
            return new

        return tree_map(moved, state, grown)

    # On a GPU.

    def _warm(self, more: int = 0) -> bool:
        """Whether a graph of a step is there, and has room for so many tokens beyond those that were seen."""
        return self._wants in self._captured and max(self._positions) + more <= self._room

    def _graph(self) -> Any:
        """A step in a CUDA graph; None where it could not be captured."""
        if max(self._positions) > self._room:
            self._settle()
        if self._wants not in self._captured:
            self._capture()
        return self._captured.get(self._wants)

    def _settle(self) -> None:
        """The states in memory that graphs read and write, with room that follows from the tokens seen alone."""
        room = 2 ** max(_LEAST_ROOM - 1, max(self._positions)).bit_length()
        self._room = room if any(self._grows) else sys.maxsize
        self._state = self._roomy(self._state, room if any(self._grows) else 0)
        self._captured.clear()

    def _capture(self) -> None:
        """A step in a CUDA graph, which reads and writes the memory that it finds here."""
        if len(self._captured) >= _GRAPHS:
            self._captured.clear()
        moving = (self._state, self._slots, self._at, self._report)
        graph = captured(lambda: self._keep(self._step()), moving)
        if graph is None:
            self._graphs = False
            self._captured.clear()
        else:
            self._captured[self._wants] = graph

    def _keep(self, state: State) -> None:
        """The state where the graph looks for it: steps that do not write there leave it elsewhere."""
        for here, made in zip(leaves(self._state), leaves(state), strict=True):
            if here.data_ptr() != made.data_ptr():
                here.copy_(made)
