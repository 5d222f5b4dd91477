"""The block, of which every model is a stack, and the configs that say what it is: parts that hold parts."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.options import options
from dualform.core.recurrence import State
from dualform.layers.context import Context, save_from, value_for
from dualform.layers.drop import Drop, check_rates, left
from dualform.layers.low_rank import adapt
from dualform.layers.mixer import Mixer, PartConfig, Prepared, Step
from dualform.layers.norms import check_norm_kind, counting, make_norm
from dualform.layers.part import ELSEWHERE, Part, as_weights, check_parts
from dualform.layers.stream_step import StreamStep

Call = Callable[[Any, Tensor], Tensor]  # (part, y) -> what it makes of y; (how it stands, that) -> what is left of it
Residual = Callable[[Any, Tensor], Tensor | None]  # (part, x) -> the stream behind it


@options
class SublayerConfig:
    """A part, and how it stands in a block: ``x = stream x + scale after(part(scale_in norm(x)))``.

    A part alone is the short form of one with all defaults: ``x = x + part(rms(x))``.

    Args:
        part: the config of what is inside: a mixer, a feed-forward, a chain or parallel branches.
        norm: the norm before it: ``rms``, ``rms_offset``, ``layer``, ``layer_no_bias``, ``batch``, or None.
        after: the norm of its output, of the same names.
        eps: epsilon of both; None is the model's.
        scale_in: a factor of what the part reads.
        scale: a factor of what is added.
        stream: a factor of what it is added to; with 0 the output takes its place.
        normed: whether it is added to ``norm(x)`` in place of x.
        joined: the name of a value that is concatenated to x before the norm; ``embedding`` is what enters the first
            block. The part then reads 2 D features, and still makes D.
        saved: a name under which the output is kept for later parts; it is then not added.
        low_rank: rank of matrices that every use of a shared block adds to the part's first map; 0 for none.
        dropout: the share of the numbers of its output that training drops; None is the model's where it is added.
        drop_path: the share of rows, or of packed sequences, to which training adds nothing; None is the model's.
    """

    part: PartConfig
    norm: str | None = "rms"
    after: str | None = None
    eps: float | None = None
    scale_in: float = 1.0
    scale: float = 1.0
    stream: float = 1.0
    normed: bool = False
    joined: str | None = None
    saved: str | None = None
    low_rank: int = 0
    dropout: float | None = None
    drop_path: float | None = None

    def __post_init__(self) -> None:
        for name in ("norm", "after"):
            check_norm_kind(f"sublayer: {name}", getattr(self, name))
        for name in ("scale_in", "scale", "stream"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"sublayer: {name} is {getattr(self, name)}, expected a finite number")
        if self.eps is not None and not 0 < self.eps < math.inf:
            raise ConfigError(f"sublayer: eps is {self.eps}, expected a small positive number, or none")
        if self.low_rank < 0:
            raise ConfigError(f"sublayer: low_rank is {self.low_rank}, expected at least 0")
        check_rates("sublayer", dropout=self.dropout, drop_path=self.drop_path)
        if self.drop_path and not self.added:
            raise ConfigError(f"sublayer: drop_path is {self.drop_path} of an output that is not added to the stream")

    @property
    def added(self) -> bool:
        """Whether its output is added to the stream, and neither takes its place nor is saved for later."""
        return self.stream != 0 and self.saved is None

    def build(self, d_model: int, norm_eps: float = 1e-5) -> "Block":
        """A block of this sub-layer alone."""
        return Block((self,), d_model, norm_eps)


@options
class ChainConfig:
    """Sub-layers one after the other, as one part; with ``stream=0`` each takes the place of what it reads.

    Args:
        parts: the sub-layers, in order.
    """

    parts: tuple[PartConfig, ...]

    def __post_init__(self) -> None:
        check_parts("chain", self.parts)

    def build(self, d_model: int, norm_eps: float = 1e-5) -> "Block":
        """The parts as one."""
        return Block(self.parts, d_model, norm_eps)


@options
class ParallelConfig:
    """Branches that read the same, and whose outputs are added: ``sum_i scale_i after_i(part_i(norm_i(x)))``.

    Branches that share one norm have ``norm=None`` and stand together in a sub-layer with that norm; a part alone has
    an RMS norm of its own.

    Args:
        parts: the branches.
    """

    parts: tuple[PartConfig, ...]

    def __post_init__(self) -> None:
        check_parts("parallel", self.parts)
        if any((s.stream, s.normed) != (1.0, False) for s in map(standing, self.parts)):
            raise ConfigError("parallel: a branch has stream or normed, but nothing that it is added to")

    def build(self, d_model: int, norm_eps: float = 1e-5) -> "Block":
        """The branches as one part."""
        return Block(self.parts, d_model, norm_eps, parallel=True)


COMPOSED = (SublayerConfig, ChainConfig, ParallelConfig)
"""Configs that hold the configs of other parts."""


def standing(part: PartConfig) -> SublayerConfig:
    """How a part stands in a block."""
    return part if isinstance(part, SublayerConfig) else SublayerConfig(part)


class Block(nn.Module):
    """``x = x + part(norm(x))`` for each part: a Recurrence on features ``(B, T, D)``.

    A :class:`SublayerConfig` says where that differs. In parallel the parts read the same x, and the result is the sum
    of what they make, without x. A part may be a block itself.

    The state is a tuple with one state per mixer and per block inside; feed-forwards carry none. The stream ``x`` keeps
    the dtype it comes in, float32 in a language model; only what a part reads has the dtype of its norm's weight.

    ``intervals`` and ``rate`` go to every mixer, see :class:`~dualform.layers.mixer.Mixer`; a mixer whose ``forward``
    lacks the keyword refuses it. ``context`` goes to the parts that ask for it, see
    :class:`~dualform.layers.context.Context`.

    Args:
        parts: the configs of the sub-layers, in order.
        d_model: D.
        norm_eps: epsilon of the norms that have none of their own.
        parallel: whether the parts are branches.
    """

    def __init__(self, parts: tuple[PartConfig, ...], d_model: int, norm_eps: float = 1e-5, *, parallel: bool = False):
        super().__init__()
        self.standing, self.parallel = tuple(map(standing, parts)), parallel
        widths = [2 * d_model if s.joined else d_model for s in self.standing]
        self.parts = nn.ModuleList(
            _build(s.part, width, norm_eps) for s, width in zip(self.standing, widths, strict=True)
        )
        self.norms = nn.ModuleList(
            make_norm(s.norm, width, s.eps or norm_eps) for s, width in zip(self.standing, widths, strict=True)
        )
        self.after = nn.ModuleList(make_norm(s.after, d_model, s.eps or norm_eps) for s in self.standing)
        for s, part in zip(self.standing, self.parts, strict=True):
            if s.low_rank:
                adapt(part, s.low_rank)
        self._refused = {name: self.lacking(name) for name in ("intervals", "rate")}
        self.in_context: bool = any(
            bool(s.joined or s.saved) or getattr(part, "in_context", False)
            for s, part in zip(self.standing, self.parts, strict=True)
        )
        self._drops: bool = any(s.dropout or s.drop_path for s in self.standing)

    def init_state(self, batch: int, *, max_len: int = 0) -> State:
        """One state per mixer."""
        return tuple(mixer.init_state(batch, max_len=max_len) for mixer in self._mixers())

    @property
    def causal(self) -> bool:
        """Whether no output depends on a later input: true unless a mixer is bidirectional."""
        return all(mixer.causal for mixer in self._mixers())

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Any = None,
        intervals: Tensor | None = None,
        rate: float = 1.0,
        context: Context | None = None,
        drop: Drop | None = None,
    ) -> tuple[Tensor, State]:
        """``x`` ``(B, T, D)`` -> the same shape, and the state.

        ``drop`` is what training drops of the sub-layers that do not say it themselves.

        Raises:
            ArgumentError: when the state is not one of this block, or a mixer takes no ``intervals`` or ``rate``.
        """
        timing = self.timing("Block", intervals=intervals, rate=rate)
        old, new = self._states(state), []

        def call(part: Any, y: Tensor) -> Tensor:
            extra = {"context": context} if getattr(part, "in_context", False) else {}
            if not _mixes(part):
                return part(y, **extra)
            made, left = part(y, old[len(new)], cu_seqlens=cu_seqlens, **timing, **extra)
            new.append(left)
            return made

        drops = self.training and torch.is_grad_enabled() and (self._drops or drop is not None)
        dropped = partial(left, drop or Drop(), cu_seqlens) if drops else None
        return self._run(x, call, context, dropped), tuple(new)

    def step(
        self,
        x: Tensor,
        state: State,
        *,
        interval: Tensor | None = None,
        rate: float = 1.0,
        context: Context | None = None,
    ) -> tuple[Tensor, State]:
        """One element ``(B, D)``."""
        given = self.timing("Block", rate=rate)
        steps = [partial(part.step, **given) for part in self._mixers()]
        return self._step(steps, {}, x, state, interval=interval, context=context)

    def prepare(self, *, rate: float = 1.0, known: dict[Any, StreamStep] | None = None) -> Prepared:
        """Prepared steps, see :class:`~dualform.layers.mixer.Prepared`; ``known`` are its residuals, if at hand."""
        given = self.timing("Block", rate=rate)
        steps = [part.prepare(**given).step for part in self._mixers()]
        return Prepared(partial(self._step, steps, self.residuals() if known is None and rate == 1 else known or {}))

    def residuals(self) -> dict[Any, StreamStep]:
        """The parts whose steps take the stream to the stream, norm and sum included, and those steps."""
        found = {}
        for s, norm, part, _ in self._sublayers():
            usual = SublayerConfig(s.part, eps=s.eps, dropout=s.dropout, drop_path=s.drop_path)  # steps drop nothing
            plain = s == usual and not self.parallel and isinstance(part, Part)
            if plain and (step := part.prepare_residual(norm)) is not None:
                found[part] = step
        return found

    def _step(
        self,
        steps: list[Step],
        residuals: dict[Any, StreamStep],
        x: Tensor,
        state: State,
        *,
        interval: Tensor | None = None,
        context: Context | None = None,
    ) -> tuple[Tensor, State]:
        """One element, given the steps of the mixers in order, and those of :meth:`residuals`."""
        timing = self.timing("Block", interval=interval)
        old, new = self._states(state), []

        def call(part: Any, y: Tensor) -> Tensor:
            extra = {"context": context} if getattr(part, "in_context", False) else {}
            if not _mixes(part):
                return part(y[:, None], **extra)[:, 0]
            made, left = steps[len(new)](y, old[len(new)], **timing, **extra)
            new.append(left)
            return made

        def residual(part: Any, x: Tensor) -> Tensor | None:
            state = old[len(new)] if _mixes(part) else ()
            if part not in residuals or timing or (made := residuals[part](x, state)) is None:
                return None
            new.extend([made[1]] if _mixes(part) else [])
            return made[0]

        return self._run(x, call, context, residual=residual if residuals else None), tuple(new)

    def _run(
        self,
        x: Tensor,
        call: Call,
        context: Context | None,
        dropped: Call | None = None,
        residual: Residual | None = None,
    ) -> Tensor:
        """The sub-layers over ``x``, ``(B, T, D)`` or ``(B, D)``, given what calls a part and what drops its output.

        ``residual(part, x)`` is the stream behind a part that one call takes from stream to stream, or None.
        """
        made: Tensor | None = None  # by the part before, and not yet added
        total: Tensor | None = None  # of the branches
        counted = None if context is None else context.counted
        for s, norm, part, after in self._sublayers():
            norm, after = counting(norm, counted), counting(after, counted)
            if residual is not None:
                x, made = x if made is None else x + made, None
                if (behind := residual(part, x)) is not None:
                    x = behind
                    continue
            if s.joined is not None:
                x = x if made is None else x + made
                y = norm(torch.cat([x, value_for(x, context, s.joined)], -1))
            else:
                y, x = (norm(x), x) if made is None else norm(made, x)
            if s.norm is None and not isinstance(part, Block):
                y = as_weights(part, y)
            if s.normed:
                x = y.to(x.dtype)
            out: Tensor = after(call(part, y if s.scale_in == 1 else s.scale_in * y))
            if s.scale != 1:
                out = s.scale * out.to(x.dtype)
            if dropped is not None:
                out = dropped(s, out)
            made = None
            if s.saved is not None:
                save_from(x, context, s.saved, out)
            elif self.parallel:
                total = out if total is None else total + out
            elif s.stream == 0:
                x = out.to(x.dtype)
            else:
                made, x = out, x if s.stream == 1 else s.stream * x
        if self.parallel:
            return torch.zeros_like(x) if total is None else total
        return x if made is None else x + made

    def timing(self, where: str, *, rate: float = 1.0, **times: Tensor | None) -> dict[str, Any]:
        """The keywords to call mixers with: ``intervals`` or ``interval``, and ``rate``, where they are given.

        Raises:
            ArgumentError: names a mixer that does not take one of them.
        """
        given: dict[str, Any] = {name: value for name, value in times.items() if value is not None}
        if rate != 1:
            given["rate"] = rate
        for name in given:
            if refused := self._refused["rate" if name == "rate" else "intervals"]:
                raise ArgumentError(
                    f"{where}: {name} is given, and {refused[0]} does not take it", hint=ELSEWHERE[name]
                )
        return given

    def lacking(self, keyword: str) -> list[str]:
        """The classes of the mixers whose ``forward`` does not have a keyword."""
        found = []
        for part in self._mixers():
            if isinstance(part, Block):
                found += part.lacking(keyword)
            elif keyword not in signature(part.forward).parameters:
                found.append(type(part).__name__)
        return found

    @torch.no_grad()
    def initialise(self, residual_parts: int) -> None:
        """Start the biases of linear maps at zero, and scale down what each part adds to the stream.

        It is divided by the root of the number of parts in the whole model, so that the variance of the stream does
        not grow with depth: Radford et al. (2019), section 2.3, as in Mamba's own initialisation. Scaled are the
        parameters that a part names in ``residual``; a part without them, such as an LSTM as wide as the stream, starts
        as it is. A bias that must not start at zero is a parameter of its own, such as Mamba's ``dt_bias``.
        """
        for part in self.parts:
            if isinstance(part, Block):
                part.initialise(residual_parts)
                continue
            for module in part.modules():
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            parameters = dict(part.named_parameters())
            for name in getattr(part, "residual", ()):
                if name in parameters:
                    parameters[name].div_(math.sqrt(residual_parts))

    def _mixers(self) -> list[Any]:
        return [part for part in self.parts if _mixes(part)]

    def _sublayers(self) -> Iterator[tuple[SublayerConfig, Any, Any, Any]]:
        """How a part stands, the norm before it, the part, and the norm after it."""
        return zip(self.standing, self.norms, self.parts, self.after, strict=True)

    def _states(self, state: State | None) -> tuple[State | None, ...]:
        mixers = len(self._mixers())
        if state is None:
            return (None,) * mixers
        if not isinstance(state, tuple) or len(state) != mixers:
            raise ArgumentError(f"Block: state is not a tuple of {mixers}, one state per mixer")
        return state


def _build(part: PartConfig, d_model: int, norm_eps: float) -> nn.Module:
    return part.build(d_model, norm_eps) if isinstance(part, COMPOSED) else part.build(d_model)


def _mixes(part: Any) -> bool:
    """Whether a part has a state."""
    return isinstance(part, Mixer | Block)
