"""Upstream's layouts: time last, where dualform's operators have it second; and what says so when they are mixed up."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors

_TIMES = ("D T", "N T")


def check_layout(where: str, **tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """:func:`~dualform.core.shapes.check_tensors`, with a hint where a tensor has time before channels.

    Raises:
        ArgumentError: names the argument, what came, what was expected, and the transposition that would fit.
    """
    try:
        return check_tensors(where, **tensors)
    except ArgumentError as wrong:
        timed = [
            name
            for name, (m, spec) in tensors.items()
            if spec.endswith(_TIMES) and isinstance(m, Tensor) and m.dim() == len(spec.removeprefix("? ").split())
        ]
        for swapped in (*([name] for name in timed), timed):
            turned = {name: (tensors[name][0].transpose(-1, -2), tensors[name][1]) for name in swapped}  # pyright: ignore[reportOptionalMemberAccess]
            if swapped and _fit(where, {**tensors, **turned}):
                hint = f"time is the last axis here: give {', '.join(f'{name}.transpose(-1, -2)' for name in swapped)}"
                raise ArgumentError(str(wrong), hint=hint) from None
        raise


def _fit(where: str, tensors: dict[str, tuple[Tensor | None, str]]) -> bool:
    try:
        check_tensors(where, **tensors)
    except ArgumentError:
        return False
    return True


def time_second(x: Tensor) -> Tensor:
    """``(B, D, T)`` -> ``(B, T, D)``, a view."""
    return x.transpose(1, 2)


def time_last(y: Tensor, like: Tensor) -> Tensor:
    """``(B, T, D)`` -> ``(B, D, T)``, contiguous where ``like`` is: callers take views of the result."""
    y = y.transpose(1, 2)
    return y.contiguous() if like.is_contiguous() else y


def to_the_end(cu_seqlens: Tensor, length: int) -> Tensor:
    """Borders ``(n + 1,)``, and one more sequence ``(n + 2,)`` of what lies behind the last: padding, if any."""
    return torch.cat([cu_seqlens, cu_seqlens.new_full((1,), length)])


class Runs(NamedTuple):
    """The sequences that ``seq_idx`` ``(B, T)`` marks, laid end to end on one line of B T steps.

    A sequence is a run of equal ids within a row; only neighbours are compared.
    """

    cu_seqlens: Tensor  # (n + 1,) int64
    first: Tensor  # (B,), the first sequence of each row
    last: Tensor  # (B,), the last one

    @classmethod
    def of(cls, where: str, seq_idx: Tensor, x: Tensor) -> "Runs":
        """The runs of ``seq_idx`` in ``x`` ``(B, T, ...)``, which takes one synchronisation of a GPU.

        Raises:
            ArgumentError: for a shape other than ``(B, T)``, another device than that of x, or a dtype that is not an
                integer's.
        """
        check_tensors(where, x=(x, "B T ..."), seq_idx=(seq_idx, "B T"))
        batch, length = seq_idx.shape
        if seq_idx.is_floating_point() or seq_idx.is_complex():
            raise ArgumentError(f"{where}: seq_idx is {seq_idx.dtype}, expected int32, the sequence of each step")
        starts = torch.ones(batch, length, dtype=torch.bool, device=seq_idx.device)
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        borders = starts.flatten().nonzero()[:, 0]
        last = starts.sum(1).cumsum(0) - 1
        first = torch.cat([last.new_zeros(1), last[:-1] + 1])
        return cls(torch.cat([borders, borders.new_full((1,), batch * length)]), first, last)

    @property
    def rows(self) -> int:
        """n, how many sequences there are."""
        return self.cu_seqlens.shape[0] - 1

    def line(self, x: Tensor) -> Tensor:
        """``(B, T, ...)`` -> ``(1, B T, ...)``."""
        return x.reshape(1, -1, *x.shape[2:])

    def initial(self, state: Tensor | None) -> Tensor | None:
        """States of rows ``(B, ...)`` -> of sequences ``(n, ...)``: the first of each row gets its row's."""
        return None if state is None else state.new_zeros(self.rows, *state.shape[1:]).index_copy(0, self.first, state)
