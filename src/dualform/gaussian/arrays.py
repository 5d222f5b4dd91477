"""What people call a series: tensors, NumPy arrays, lists, tables of pandas; and results of the same kind."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, refuse


class Door:
    """One call's observations as a tensor, and the way back for its results.

    A tensor or a list gives tensors, a NumPy array NumPy arrays, and a Series or a DataFrame of pandas the same, except
    for means at its own times, which become a DataFrame with its index. Where a result has a gradient, everything stays
    a tensor.

    Args:
        where: the first word of an error.
        y: the observations.
        like: a tensor that says device and dtype where the observations do not.
        width: M; a series ``(T,)`` is taken for 1.
    """

    def __init__(self, where: str, y: Any, like: Tensor, width: int):
        self._frame = y if hasattr(y, "iloc") and hasattr(y, "to_numpy") else None
        self._numpy = isinstance(y, np.ndarray) or self._frame is not None
        if self._frame is not None:
            y = _values(where, self._frame)
        made = as_tensors(where, model=like, y=y)["y"]
        refuse_infinite(where, "y", made)
        shown = tuple(made.shape)
        if made.dim() == 1 and (width == 1 or not made.numel()):
            made = made.unsqueeze(-1) if width == 1 else made
        if made.dim() < 2 or made.shape[-1] != width:
            line = " or (T,)" if width == 1 else ""
            raise ArgumentError(
                f"{where}: y has shape {shown}, expected (B, T, {width}) or (T, {width}){line}",
                hint="the last axis is that of the components of an observation",
            )
        if made.is_complex():
            raise ArgumentError(f"{where}: complex values in y, expected real ones")
        self.y = made

    @property
    def rows(self) -> Tensor:
        """The observations ``(B, T, M)``, a row for each series."""
        return self.y.flatten(0, -3) if self.y.dim() > 2 else self.y[None]

    def out(self, *results: Tensor, timed: bool = False) -> tuple[Any, ...]:
        """Results in the form of what came; with ``timed``, the first has a row for each time of y."""
        if not self._numpy or any(value.requires_grad for value in results):
            return results
        first, *others = (value.cpu().numpy()[()] for value in results)
        return self._table(first) if timed else first, *others

    def _table(self, value: np.ndarray) -> Any:
        frame = self._frame
        if frame is None or value.ndim != 2:
            return value
        kind = type(frame.to_frame() if hasattr(frame, "to_frame") and frame.ndim == 1 else frame)
        return kind(value, index=frame.index)


def refuse_infinite(where: str, name: str, x: Tensor) -> None:
    """Raise for an infinite observation."""
    if not torch.compiler.is_compiling() and x.device.type == "cpu" and x.detach().sum().isfinite():
        return  # in one pass over what is complete
    refuse(where, name, x, x.detach().isinf(), "has infinite values", "NaN stands for a missing observation")


def _values(where: str, frame: Any) -> np.ndarray:
    """The numbers of a table of pandas, NaN where one is missing."""
    try:
        return frame.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{where}: y is not a numeric table ({error})") from error


def lengths_of(where: str, lengths: Any, full: tuple[int, ...], longest: int, device: torch.device) -> Tensor:
    """How many steps each row has, ``(rows,)`` int64.

    Raises:
        ArgumentError: for other shapes than the batch axes, or lengths that are negative or beyond T.
    """
    made = torch.as_tensor(lengths)
    if made.is_floating_point() or made.is_complex() or made.dtype == torch.bool or made.shape != torch.Size(full):
        raise ArgumentError(
            f"{where}: lengths are {made.dtype} {tuple(made.shape)}, expected integers of shape {tuple(full)}, one for "
            "each series"
        )
    made = made.reshape(-1).to(device, torch.int64)
    if made.numel() and (made.min() < 0 or made.max() > longest):
        bad = int(((made < 0) | (made > longest)).nonzero()[0])
        raise ArgumentError(f"{where}: lengths[{bad}] is {int(made[bad])}, expected 0 to {longest}, the steps of y")
    return made
