"""What training leaves out at random: single numbers of what a sub-layer makes (dropout), or all of it (drop path)."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import wide


class Drop(NamedTuple):
    """The rates of sub-layers that have none of their own.

    Attributes:
        dropout: that of single numbers.
        drop_path: that of whole sub-layers, a scalar; None for none.
    """

    dropout: float = 0.0
    drop_path: Tensor | None = None


def check_rates(where: str, **rates: float | None) -> None:
    """That rates are shares of what there is.

    Raises:
        ConfigError: names a rate that is not in [0, 1).
    """
    for name, rate in rates.items():
        if rate is not None and not 0 <= rate < 1:
            raise ConfigError(f"{where}: {name} is {rate}, expected a share, from 0 to below 1")


def dropout(y: Tensor, rate: float) -> Tensor:
    """Each number is 0 with probability ``rate``, and otherwise divided by ``1 - rate``: ``y`` in the mean.

    References:
        Srivastava et al. (2014), Dropout: A Simple Way to Prevent Neural Networks from Overfitting, section 4.
    """
    return F.dropout(y, rate) if rate else y


def drop_path(y: Float[Tensor, "B T D"], rate: float | Tensor, cu_seqlens: Borders = None) -> Float[Tensor, "B T D"]:
    """Each row is 0 with probability ``rate``, and otherwise divided by ``1 - rate``: ``y`` in the mean.

    Of a packed line it is each sequence. The result is float32 or wider.

    References:
        Huang et al. (2016), Deep Networks with Stochastic Depth, arXiv:1603.09382, section 3.
    """
    packing = Packing.of("drop_path", cu_seqlens, y)
    rows = len(y) if packing is None else packing.rows
    kept = torch.rand(rows, dtype=wide(y), device=y.device) >= rate
    factor = kept.to(wide(y)) / (1 - rate)
    if packing is None:
        return factor[:, None, None] * y
    return factor[packing.places(y.shape[1])[0]][None, :, None] * y


def depth_rates(rate: float, depth: int, like: Tensor) -> tuple[Tensor, ...]:
    """``rate l / depth`` for the blocks ``l = 1..depth``: what is near the input is left out least.

    They are tensors on the device of ``like``: blocks that differ in their rate alone are one compiled program.

    References:
        Huang et al. (2016), arXiv:1603.09382, equation 4.
    """
    return (rate / depth * torch.arange(1, depth + 1, device=like.device, dtype=like.dtype)).unbind()


@runtime_checkable
class Dropping(Protocol):
    """What a sub-layer says: its rates, None for those of the model, and whether it is added to the stream."""

    @property
    def dropout(self) -> float | None: ...
    @property
    def drop_path(self) -> float | None: ...
    @property
    def added(self) -> bool: ...


def left(rates: Drop, cu_seqlens: Borders, sublayer: Dropping, y: Tensor) -> Tensor:
    """What training leaves of the output of a sub-layer; the model's ``rates`` are for those that are added."""
    if not sublayer.added:
        rates = Drop()
    y = dropout(y, rates.dropout if sublayer.dropout is None else sublayer.dropout)
    rate = rates.drop_path if sublayer.drop_path is None else sublayer.drop_path
    return y if rate is None or sublayer.drop_path == 0 else drop_path(y, rate, cu_seqlens)
