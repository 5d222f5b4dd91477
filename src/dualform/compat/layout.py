"""Upstream's layouts: time last, where dualform's operators have it second; and what says so when they are mixed up."""

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
    """``(B, T, D)`` -> ``(B, D, T)``, contiguous where ``like`` is: callers take views of the result.

    Scans and convolutions of whole sequences return it so; only that of a few steps is copied here.
    """
    y = y.transpose(1, 2)
    return y.contiguous() if like.is_contiguous() else y


def to_the_end(cu_seqlens: Tensor, length: int) -> Tensor:
    """Borders ``(n + 1,)``, and one more sequence ``(n + 2,)`` of what lies behind the last: padding, if any."""
    return torch.cat([cu_seqlens, cu_seqlens.new_full((1,), length)])
