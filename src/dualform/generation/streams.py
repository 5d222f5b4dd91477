"""Streams of numbers, many side by side: what a model says of every sample as it comes, in constant memory.

A stream has a slot: a row of a tile of rows that are stepped together. It keeps it, and every tile has the same number
of rows, so that what comes out does not depend on which streams report together, to the last bit.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.recurrence import State
from dualform.core.tree import clone, concat, leaves, take, tree_map
from dualform.gaussian.belief import Belief
from dualform.gaussian.continuous import ContinuousLinearGaussian
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.parameters import Parameters
from dualform.gaussian.recurrent import Updated
from dualform.generation.prefill import growing
from dualform.models.pooled import PooledModel
from dualform.models.pooling import make_pooling
from dualform.models.readout import Classes, Numbers, Readout

TILE = 64  # rows that are stepped together, where there are many streams
_GAP = 10_000  # the most steps of a model in discrete time between two samples


class Said(NamedTuple):
    """What a model says of one sample of each row."""

    cells: Tensor  # (B, K), float64, by the model's columns; NaN where there is nothing to say
    score: Tensor  # (B,), float64: -log10 of the probability of a sample as far off; NaN where there is none


class Watched:
    """A model as streams see it.

    Attributes:
        channels: numbers that a sample has.
        columns: what is said of a sample, by name.
        words: of a column that holds an index, what the indices are called.
        scores: whether samples have a score.
        elapses: whether the time between samples counts in any case.
        refuses_missing: why a sample may not have missing values; empty where it may.
    """

    channels: int
    columns: tuple[str, ...]
    words: dict[str, tuple[str, ...]]
    scores: bool = True
    elapses: bool = False
    refuses_missing: str = ""

    def start(self, rows: int) -> State:
        """The state before the first sample."""
        raise NotImplementedError

    def check_intervals(self) -> None:
        """That the model may be told the time between samples.

        Raises:
            ArgumentError: for one that knows no time.
        """

    def refuses_interval(self, interval: float) -> str:
        """What is wrong with a time between samples, in steps of the model; empty for one that may be."""
        return ""

    def stepper(self) -> Any:
        """A function ``(x, interval, state) -> (Said, state)`` for rows that are always the same ones.

        ``x`` is ``(B, C)``, float64, NaN where a value is missing; ``interval`` ``(B,)``, in steps of the model, or
        None for 1 throughout.
        """
        raise NotImplementedError


class Streams:
    """Streams of one model, each in its slot.

    Args:
        watched: the model.
        tile: rows that are stepped together.
    """

    def __init__(self, watched: Watched, tile: int = TILE):
        self.watched, self.tile = watched, tile
        self._states: list[State] = []
        self._steppers: list[Any] = []
        self._add(watched.start(tile))

    @property
    def slots(self) -> int:
        """How many there are, taken or free."""
        return self.tile * len(self._states)

    @torch.no_grad()
    def step(self, slots: Sequence[int], x: Tensor, interval: Tensor | None = None) -> Said:
        """One sample of each of some streams.

        Args:
            slots: of the streams, each at most once; a new one takes the next slot that is free.
            x: ``(R, C)``, float64; NaN is missing.
            interval: ``(R,)``, the time since the sample before, in steps of the model; None is 1 throughout.
        """
        while max(slots, default=-1) >= self.slots:
            self._add(self.watched.start(self.tile))
        of_tiles: dict[int, list[int]] = {}
        for i, slot in enumerate(slots):
            of_tiles.setdefault(slot // self.tile, []).append(i)
        cells = x.new_full((len(slots), len(self.watched.columns)), torch.nan)
        score = x.new_full((len(slots),), torch.nan)
        for number, which in of_tiles.items():
            said = self._step(number, [slots[i] % self.tile for i in which], x[which], interval, which)
            cells[which], score[which] = said
        return Said(cells, score)

    def _step(self, number: int, rows: list[int], x: Tensor, interval: Tensor | None, which: list[int]) -> Said:
        """A step of a tile; rows that have no sample are computed with zeros, and put back."""
        state = self._states[number]
        idle = sorted(set(range(self.tile)) - set(rows))
        kept = take(state, idle) if idle else None
        full = x.new_zeros(self.tile, x.shape[1])
        full[rows] = x
        times = None if interval is None else full.new_ones(self.tile)
        if times is not None and interval is not None:
            times[rows] = interval[which]
        said, state = self._steppers[number](full, times, state)
        if kept is not None:
            state = tree_map(lambda leaf, old: _restored(leaf, idle, old), state, kept)
        self._states[number] = state
        return Said(said.cells[rows], said.score[rows])

    def state(self) -> State:
        """The states of all slots, a copy."""
        return clone(concat(self._states))

    def restore(self, state: State) -> None:
        """Go on from what :meth:`state` gave."""
        self._states, self._steppers = [], []
        for first in range(0, len(leaves(state)[0]), self.tile):
            self._add(take(state, slice(first, first + self.tile)))

    @torch.no_grad()
    def _add(self, state: State) -> None:
        self._states.append(state)
        self._steppers.append(self.watched.stepper())


def _restored(leaf: Tensor, rows: list[int], old: Tensor) -> Tensor:
    leaf[rows] = old
    return leaf


class WatchedReadout(Watched):
    """A classifier or regressor: a class and its probability, or values and a band.

    The score is of the inputs: how far they are from those of training, by the mean and the deviation of each channel
    that the model scales them with, as if they were normal and independent.

    Args:
        model: which reads features.
        window: the number of last elements that a model pools over which takes the mean of all; None leaves it.

    Raises:
        ArgumentError: for a model that reads tokens, has no step, or keeps all that it has read.
    """

    def __init__(self, model: Readout, window: int | None = None):
        kind = type(model).__name__
        if model.inputs is None or model.entrance is None:
            raise ArgumentError(f"the model is a {kind} that reads tokens, expected one that reads numbers")
        if not model.causal:
            hint = "train one without bidirectional parts"
            raise ArgumentError(f"the {kind} is bidirectional: it reads whole sequences, and no streams", hint=hint)
        if window is not None:
            _forget(model, window)
        if any(growing(model)):
            hint = "give its attention a window"
            raise ArgumentError(f"the {kind} keeps all that it reads, and a stream has no end", hint=hint)
        self.model, self.channels, self.words = model.eval(), model.inputs, {}
        self.scores = bool(model.entrance.standardise)
        if model.entrance.missing not in ("marked", "carried"):
            self.refuses_missing = "the model knows no missing values; missing='carried' makes one that does"
        self.columns, self._pick = self._shown(model)

    def _shown(self, model: Readout) -> tuple[tuple[str, ...], Any]:
        """The columns, and the function that makes their cells of outputs."""
        count = range(model.outputs)
        if isinstance(model, Classes):
            names = model.class_names or tuple(map(str, count))
            if model.multi_label:
                return tuple(f"probability_{name}" for name in names), lambda y: y.sigmoid()
            self.words = {"class": names}
            return ("class", "probability"), lambda y: torch.stack(y.softmax(-1).max(-1)[::-1], -1).double()
        each = ["value" if model.outputs == 1 else f"value_{i}" for i in count]
        if not isinstance(model, Numbers) or model.quantiles is None:
            return tuple(each), lambda y: y
        distances = [abs(q - 0.5) for q in sorted(model.quantiles)]
        middle = distances.index(min(distances))
        names = [part for name in each for part in (name, f"{name}_low", f"{name}_high")]
        return tuple(names), lambda y: y.sort(-1).values[..., [middle, 0, -1]].flatten(1)  # those that cross, in order

    def start(self, rows: int) -> State:
        return self.model.init_state(rows)

    @torch.no_grad()
    def check_intervals(self) -> None:
        x = torch.zeros(1, self.channels, dtype=torch.float64)
        self.stepper()(x, torch.ones(1, dtype=torch.float64), self.start(1))

    def stepper(self) -> Any:
        prepared = self.model.prepare()

        def step(x: Tensor, interval: Tensor | None, state: State) -> tuple[Said, State]:
            y, state = prepared.step(x, state, **({} if interval is None else {"interval": interval}))
            return Said(self._pick(y.double()), self._score(x)), state

        return step

    def _score(self, x: Tensor) -> Tensor:
        entrance = self.model.entrance
        if entrance is None or not self.scores:
            return x.new_full((len(x),), torch.nan)
        off = (x - entrance.mean) / entrance.deviation
        return surprise(off.square().nansum(-1), (~x.isnan()).sum(-1))


def _forget(model: Readout, window: int) -> None:
    """Let a model that takes the mean of all take that of the last elements."""
    if window < 1:
        raise ArgumentError(f"window is {window}, expected at least 1 element")
    if not isinstance(model, PooledModel) or model.pooling != "mean":
        what = f"pools by {model.pooling!r}" if isinstance(model, PooledModel) else "does not pool"
        raise ArgumentError(f"window is given, and the {type(model).__name__} {what}: expected the mean")
    model.pooling, model.window = "window", window
    model.pool = make_pooling(type(model).__name__, "window", model.config.d_model, window)


class WatchedGaussian(Watched):
    """A linear-Gaussian model: what each value was expected to be, the band around it, and the estimate after it.

    The score is of the innovation, by its covariance; while a direction of the state is diffuse there is none.

    Args:
        model: in discrete or in continuous time.
        names: of its channels.
        level: the probability of the band.

    Raises:
        ArgumentError: for a model with inputs, with matrices that vary in time or with axes of a batch, or in
            continuous time with a prior that is not of the first observation.
    """

    def __init__(self, model: Parameters, names: Sequence[str], level: float = 0.95):
        kind = type(model).__name__
        self.model: Any = model
        self.channels, self.words = model.d_obs, {}
        self.elapses = isinstance(model, ContinuousLinearGaussian)
        if model.B is not None or model.D is not None:
            raise ArgumentError(f"the {kind} has inputs (B or D), which a stream of observations does not bring")
        if model.time_varying:
            what = ", ".join(model.time_varying)
            raise ArgumentError(f"{what} of the {kind} vary in time, and a stream goes on beyond the last of them")
        if len(model.batch):
            raise ArgumentError(f"the {kind} is a batch {tuple(model.batch)} of models, expected one")
        if self.elapses and model.prior != "first":
            raise ArgumentError(f"the {kind} has prior='before', whose time nobody says here; expected prior='first'")
        self.columns = tuple(f"{name}_{what}" for name in names for what in ("expected", "low", "high", "estimate"))
        self._half = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))

    def start(self, rows: int) -> State:
        return self.model.init_state(rows)

    def refuses_interval(self, interval: float) -> str:
        if self.elapses:
            return ""
        if abs(interval - round(interval)) > 0.01 or round(interval) < 1:
            return f"{interval:.6g} steps after the sample before, and a model in discrete time makes whole ones"
        return f"{interval:.6g} steps after the sample before, more than {_GAP:,}" if interval > _GAP else ""

    def stepper(self) -> Any:
        return self._step

    def _step(self, x: Tensor, interval: Tensor | None, belief: Belief) -> tuple[Said, State]:
        before = self._moved(belief, interval)
        found: Updated = self.model.update(before, x)
        C = self.model.C.double()
        expected = self._seen(before)
        spread = self._half * found.innovation_cov.double().diagonal(dim1=-2, dim2=-1).sqrt()
        vague = (C @ before.diffuse.double()).abs().sum(-1) > 0
        estimate = self._seen(found.belief).masked_fill(
            (C @ found.belief.diffuse.double()).abs().sum(-1) > 0, torch.nan
        )
        band = (m.masked_fill(vague, torch.nan) for m in (expected, expected - spread, expected + spread))
        score = surprise(found.distance.double(), (~x.isnan()).sum(-1))
        score = score.masked_fill(before.diffuse.abs().sum((-2, -1)) > 0, torch.nan)
        return Said(torch.stack([*band, estimate], -1).flatten(1), score), found.belief

    def _seen(self, belief: Belief) -> Tensor:
        """What is observed of the mean, without noise."""
        y = belief.mean.double() @ self.model.C.double().T
        return y if self.model.d is None else y + self.model.d.double()

    def _moved(self, belief: Belief, interval: Tensor | None) -> Belief:
        if isinstance(self.model, LinearGaussian):
            left = torch.ones(len(belief.mean)) if interval is None else interval.round()
            out = belief
            for _ in range(int(left.max())):
                after, going = self.model.predict(out), left > 0
                out = after if going.all() else tree_map(lambda new, old, on=going: _where(on, new, old), after, out)
                left = left - 1
            return out
        assert interval is not None
        return self.model.predict(belief, torch.where(belief.steps > 0, interval, 0.0))


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (new.dim() - 1)), new, old)


def surprise(distance: Tensor, degrees: Tensor) -> Tensor:
    """``-log10 P(chi^2 >= distance)`` of so many degrees of freedom, each float64; NaN where there are none.

    Far out, where the probability is below the least number, by the first term of its asymptotic expansion.
    """
    k, half = degrees.double().clamp(min=1) / 2, distance / 2
    near = -torch.special.gammaincc(k, half).log10()
    far = (half - (k - 1) * half.clamp(min=1).log() + torch.lgamma(k)) / torch.log(half.new_tensor(10.0))
    return torch.where(half < 600, near, far).masked_fill(degrees == 0, torch.nan)


def watched(model: Any, names: Sequence[str], *, level: float = 0.95, window: int | None = None) -> Watched:
    """A model as streams see it.

    Args:
        model: a classifier or regressor, or a linear-Gaussian model.
        names: of the channels that samples have.
        level: the probability of the band of a linear-Gaussian model.
        window: the last elements that are pooled over, see :class:`WatchedReadout`.

    Raises:
        ArgumentError: for a model that cannot be watched with.
    """
    if isinstance(model, Parameters):
        if window is not None:
            raise ArgumentError(f"window is given, and the {type(model).__name__} does not pool")
        return WatchedGaussian(model, names, level)
    if not isinstance(model, Readout):
        kinds = "a classifier, a regressor or a linear-Gaussian model"
        raise ArgumentError(f"the model is a {type(model).__name__}, expected {kinds}")
    return WatchedReadout(model, window)
