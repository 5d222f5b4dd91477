"""Packed sequences: documents laid end to end on the time axis, borders given by cumulative lengths.

``cu_seqlens`` is the convention of FlashAttention: ``(n + 1,)``, from 0 to T, never decreasing. An empty
sequence is allowed; its final state is its initial state. Padding, left or right, becomes packing at a
model's door (:func:`pack`), so there is one mechanism and not three.
"""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, Union

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, BackendError

T = TypeVar("T")
_EXAMPLE = "cumulative lengths, such as torch.tensor([0, 3, 7]) for sequences of 3 and 4"


class Packing(NamedTuple):
    """The borders of packed sequences, checked once where they enter and then passed down as one value.

    Make one with :meth:`of` and give it wherever ``cu_seqlens`` is asked for: to a model, a layer or an op. Reading
    the borders from a GPU takes one synchronisation, and a ``Packing`` remembers them. It is a tuple of tensors, so
    compilers and ``torch.utils._pytree`` take it as it is.

    Args:
        cu_seqlens: ``(n + 1,)``, int64, on the device of the data.
        host: the same on the CPU; None where values could not be read, inside of a compiled graph and while a CUDA
            graph is captured. Ops then check, or clamp, the borders themselves.
    """

    cu_seqlens: Tensor
    host: Tensor | None

    @classmethod
    def of(cls, where: str, cu_seqlens: "Borders", x: Tensor) -> "Packing | None":
        """The packing of ``x`` ``(B, T, ...)``, or None for a batch of rows.

        Args:
            where: name of the function, first word of every error.
            cu_seqlens: cumulative lengths on any device, a ``Packing``, or None.
            x: what is packed.

        Raises:
            ArgumentError: for a batch other than 1, a dtype other than int32 or int64, or borders that do not rise
                from 0 to T.
        """
        if cu_seqlens is None:
            return None
        known = isinstance(cu_seqlens, Packing)
        borders = cu_seqlens.as_tensor() if known else cu_seqlens
        _check_borders(where, borders, x.shape[0])
        if known and torch.compiler.is_compiling():
            return cu_seqlens
        if not readable(borders):
            return cls(borders.to(x.device, torch.int64), None)
        return cls.of_host(_checked(where, borders, x.shape[1]), x.device)

    @classmethod
    def of_host(cls, host: Tensor, device: torch.device) -> "Packing":
        """The packing of borders on the CPU, int64, that are known to be right and that nobody writes to any more."""
        if not _is_ours(host):
            host._dualform = {}  # pyright: ignore[reportAttributeAccessIssue]
        return cls(host if host.device == device else once(host, device, lambda: _moved(host, device)), host)

    @property
    def rows(self) -> int:
        """n, how many sequences there are: one row of a state each."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """``(n,)``, of the sequences, on the CPU."""
        return self.host_borders().diff()

    @property
    def longest(self) -> int:
        """The length of the longest sequence."""
        return once(self.host_borders(), "longest", lambda: int(self.lengths.max()))

    @property
    def known(self) -> bool:
        """Whether the lengths can be read on the host, here and now, without waiting for a device."""
        return self.host is not None and readable(self.host)

    @property
    def common(self) -> int | None:
        """The length of every sequence, where all are equally long and that is known."""
        if not self.known:
            return None
        return once(self.host_borders(), "common", lambda: self.longest if self.lengths.unique().numel() == 1 else None)

    def places(self, length: int) -> tuple[Tensor, Tensor]:
        """``(ids, index)``, ``(T,)`` int64: the sequence of each of ``length`` packed steps, and its place in it."""

        def make() -> tuple[Tensor, Tensor]:
            ids = self.sequence_ids(length)
            return ids, torch.arange(length, device=ids.device) - self.cu_seqlens[ids]

        return once(self.host_borders(), ("places", self.cu_seqlens.device), make) if self.known else make()

    def in_rows(self, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """What ``run(rows, *inputs)`` makes of sequences that are laid out as rows, laid end to end again.

        Sequences of like length share a call, so that padding at most doubles them.

        Args:
            run: is given the rows of the state, a slice or ``(R,)`` int64, and the inputs as ``(R, L, ...)``, zero
                after the last step of a row; returns ``(R, L, ...)``.
            inputs: ``(1, T, ...)``, T above 0.
        """
        groups, places = self.groups()
        out = []
        for rows, steps, keep in groups:
            laid = [x[0].index_select(0, steps.flatten()).unflatten(0, steps.shape) for x in inputs]
            masked = [torch.where(keep.view(*keep.shape, *[1] * (x.dim() - 2)), x, 0) for x in laid]
            out.append(run(rows if len(rows) < self.rows else slice(None), *masked).flatten(0, 1))
        return torch.cat(out).index_select(0, places)[None]

    def groups(self) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        """Sequences of like length, side by side, so that padding at most doubles them; empty ones are left out.

        Returns:
            For each group, the rows of its sequences ``(R,)``, the places of their steps on the line ``(R, L)``, and
            which of these there are ``(R, L)``; and where each step of the line lies among the steps of all groups.
        """
        *groups, places = self.table("in rows", _groups)
        return list(zip(*[iter(groups)] * 3, strict=True)), places

    def sequence_ids(self, length: int) -> Tensor:
        """The sequence of each of ``length`` packed steps, ``(T,)`` int64, on the device of the data."""
        return sequence_ids(self.cu_seqlens, length)

    def keep_mask(self) -> Tensor:
        """The mask ``(n, longest)`` that lays the sequences out as rows padded on the right."""
        steps = torch.arange(self.longest, device=self.cu_seqlens.device)
        return steps < self.cu_seqlens.diff()[:, None]

    def reversed(self) -> "Packing":
        """The packing of the same line read from its end."""
        return self._derived("reversed", lambda m: m[-1] - m.flip(0))

    def repeated(self, times: int) -> "Packing":
        """The packing of the same sequences laid end to end so many times."""

        def repeat(m: Tensor) -> Tensor:
            starts = m[:-1] + m[-1] * torch.arange(times, device=m.device)[:, None]
            return torch.cat([starts.flatten(), m[-1:] * times])

        return self._derived(("repeated", times), repeat)

    def _derived(self, key: Hashable, make: Callable[[Tensor], Tensor]) -> "Packing":
        """Other borders that are made of these; on the host once for each packing."""
        if self.host is None:
            return Packing(make(self.cu_seqlens), None)
        host = self.host
        return Packing.of_host(once(host, key, lambda: make(host)), self.cu_seqlens.device)

    def of_span(self, begin: int, end: int) -> tuple[slice, "Packing"]:
        """The rows that have steps between two times, or none at all there, and the packing of those steps."""
        host = self.host_borders()
        first = int(torch.searchsorted(host, begin, right=True)) - 1
        last = int(torch.searchsorted(host, end))
        part = host[first : last + 1].clamp(begin, end) - begin
        return slice(first, last), Packing.of_host(part, self.cu_seqlens.device)

    def not_empty(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(rows, first, last)`` of the sequences that have steps: their rows, first and last steps, int64."""

        def make(host: Tensor) -> tuple[Tensor, ...]:
            rows = (host.diff() > 0).nonzero()[:, 0]
            return rows, host[:-1][rows], host[1:][rows] - 1

        rows, first, last = self.table("not_empty", make)
        return rows, first, last

    def starting(self, begin: int, end: int) -> tuple[Tensor, Tensor] | None:
        """``(steps, rows)`` of the sequences that start in ``[begin, end)``, steps counted from ``begin``; or None."""
        return self._among(1, begin, end)

    def ending(self, begin: int, end: int) -> tuple[Tensor, Tensor] | None:
        """``(steps, rows)`` of the sequences whose last step lies in ``[begin, end)``; None if there is none."""
        return self._among(2, begin, end)

    def _among(self, which: int, begin: int, end: int) -> tuple[Tensor, Tensor] | None:
        there = self.not_empty()
        here = there if there[0].device.type == "cpu" else Packing(self.host_borders(), self.host).not_empty()
        i, j = torch.searchsorted(here[which], torch.tensor([begin, end])).tolist()
        return None if i == j else (there[which][i:j] - begin, there[0][i:j])

    def table(self, name: Hashable, make: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Tensors made of the borders on the host, moved to the device of the data; made once for each name."""
        host, device = self.host_borders(), self.cu_seqlens.device
        return once(host, (name, device), lambda: tuple(_moved(m, device) for m in make(host)))

    def times(self, factor: int) -> "Packing":
        """The packing of the same sequences with ``factor`` steps for each of theirs."""
        if factor == 1:
            return self
        if self.host is None or torch.compiler.is_compiling():
            return Packing(self.cu_seqlens * factor, None if self.host is None else self.host * factor)
        host, device = self.host, self.cu_seqlens.device
        return once(host, ("times", factor, device), lambda: Packing.of_host(host * factor, device))

    def host_borders(self) -> Tensor:
        """``(n + 1,)``, int64, on the CPU.

        Raises:
            BackendError: where they could not be read.
        """
        if self.host is None:
            raise BackendError(
                "cu_seqlens: their values cannot be read while a CUDA graph is captured, and this backend needs them",
                hint="make dualform.Packing.of('forward', cu_seqlens, x) before, and give that as cu_seqlens",
            )
        return self.host

    # What the dispatcher sees, and how an op sees it again.

    def as_tensor(self) -> Tensor:
        """One tensor that stands for the packing: that on the CPU where there is one."""
        return self.cu_seqlens if self.host is None else self.host

    @classmethod
    def inside(cls, where: str, borders: Tensor | None, x: Tensor) -> tuple["Packing | None", Tensor | None]:
        """The packing inside of an op, which is given :meth:`as_tensor`, checked again.

        While a CUDA graph is captured nothing can be read: the borders are clamped to a valid packing, and the second
        result, a bool on the device, says whether they were wrong. It is None where they were checked.
        """
        if borders is None:
            return None, None
        _check_borders(where, borders, x.shape[0])
        if readable(borders):
            return cls.of_host(_checked(where, borders, x.shape[1]), x.device), None
        borders = borders.to(x.device, torch.int64)
        return clamped(borders, x.shape[1])


Borders = Union[Tensor, Packing, None]  # noqa: UP007  # jaxtyping's hook evaluates it
"""What ``cu_seqlens`` may be."""


def readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read on the host here and now."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta" or type(tensor) is not Tensor:
        return False
    capturing = getattr(getattr(torch, tensor.device.type, None), "is_current_stream_capturing", None)
    return capturing is None or not capturing()


def clamped(borders: Tensor, length: int) -> tuple[Packing, Tensor]:
    """The nearest borders that rise from 0 to ``length``, and whether those given did not, without reading them."""
    inside = borders.clamp(0, length).cummax(0).values
    inside = torch.cat([torch.zeros_like(inside[:1]), inside[1:-1], torch.full_like(inside[:1], length)])
    return Packing(inside, None), (inside != borders).any()


def _check_borders(where: str, cu_seqlens: Any, batch: int) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise ArgumentError(f"{where}: cu_seqlens is {type(cu_seqlens).__name__}, expected a tensor", hint=_EXAMPLE)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"{where}: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, "
            "expected int32 or int64 of shape (n + 1,)",
            hint=_EXAMPLE,
        )
    if batch != 1:
        raise ArgumentError(
            f"{where}: with cu_seqlens the batch axis must be 1, got {batch}",
            hint="lay the sequences end to end on the time axis",
        )


def _is_ours(host: Tensor) -> bool:
    """Whether borders belong to a packing, so that nobody else writes to them and tables can be kept with them."""
    return getattr(host, "_dualform", None) is not None


def _checked(where: str, borders: Tensor, length: int) -> Tensor:
    """The borders on the host, int64, in memory that is not the caller's."""
    with _unwatched():
        borders = _unwrapped(where, borders)
        host = borders if _is_ours(borders) else borders.to("cpu", torch.int64, copy=True)
        values = host.numpy()
    if values[0] != 0 or values[-1] != length or (values[1:] < values[:-1]).any():
        shown = values.tolist() if len(values) <= 16 else [*values[:8].tolist(), "...", *values[-8:].tolist()]
        raise ArgumentError(f"{where}: cu_seqlens {shown} must rise from 0 to the length {length}")
    return host


def _unwatched() -> AbstractContextManager[Any]:
    """Inside, new tensors are plain even under a transform of ``torch.func``, whose own cannot be read or kept."""
    return torch._C._DisableFuncTorch()  # pyright: ignore[reportAttributeAccessIssue]


def _unwrapped(where: str, borders: Tensor) -> Tensor:
    """Borders that were computed under a transform of ``torch.func``, as a plain tensor."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while functorch.is_functorch_wrapped_tensor(borders):
        if functorch.is_batchedtensor(borders):
            raise ArgumentError(
                f"{where}: cu_seqlens differ along an axis of torch.func.vmap, expected the same for all",
                hint="lay the sequences of all on one line, with one cu_seqlens",
            )
        borders = functorch.get_unwrapped(borders)
    return borders


def _moved(m: Tensor, device: torch.device) -> Tensor:
    return m.to(device, non_blocking=True)


def once(host: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """What is made of a packing's borders on the host, kept with their tensor, which is the same one in every op."""
    known: dict[Hashable, T] = host._dualform  # pyright: ignore[reportAttributeAccessIssue]
    if key not in known:
        # A tensor of inference mode, or of a transform, could not be used in training afterwards.
        with torch.inference_mode(False), _unwatched():
            known[key] = make()
    return known[key]


def _groups(host: Tensor) -> tuple[Tensor, ...]:
    """What :meth:`Packing.groups` gives, from the borders, one tensor after the other."""
    lengths, alike = host.diff(), dict[int, list[int]]()
    for row, length in enumerate(lengths.tolist()):
        if length:
            alike.setdefault((length - 1).bit_length(), []).append(row)
    found, order = [], []
    for group in alike.values():
        rows = torch.tensor(group)
        steps = host[rows, None] + torch.arange(int(lengths[rows].max()))
        keep = steps < host[rows + 1, None]
        order.append(torch.where(keep, steps, host[-1]).flatten())
        found += [rows, steps.clamp(max=int(host[-1]) - 1), keep]
    places = torch.cat(order or [host[:0]]).argsort(stable=True)[: int(host[-1])]
    return *found, places


def from_lengths(lengths: Tensor) -> Tensor:
    """Lengths ``(n,)`` -> cumulative lengths ``(n + 1,)``, int64."""
    return torch.cat([lengths.new_zeros(1, dtype=torch.int64), lengths.to(torch.int64).cumsum(0)])


def sequence_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """The sequence each of ``length`` packed positions belongs to, ``(T,)``."""
    positions = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


def pack(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the padding: ``x`` ``(B, T, ...)`` and a bool mask ``(B, T)`` -> ``(1, total, ...)`` and cu_seqlens."""
    return x[keep][None], from_lengths(keep.sum(1))


def unpack(x: Tensor, keep: Tensor) -> Tensor:
    """The inverse of :func:`pack`: ``(1, total, ...)`` -> ``(B, T, ...)``, zeros where ``keep`` is false."""
    out = x.new_zeros(*keep.shape, *x.shape[2:])
    out[keep] = x[0]
    return out


def each_alone(
    run: Callable[..., tuple[Tensor, Tensor]], packing: Packing | None, state: Tensor, *inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """What packing means: ``run(*inputs, state) -> (y, state)`` on every sequence by itself, laid end to end."""
    if packing is None:
        return run(*inputs, state)
    borders = list(enumerate(pairwise(packing.as_tensor().tolist())))
    results = [run(*(x[:, start:end] for x in inputs), state[i : i + 1]) for i, (start, end) in borders]
    return torch.cat([y for y, _ in results], 1), torch.cat([h for _, h in results], 0)
