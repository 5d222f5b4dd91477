"""Hyena's long filters: functions of time given by a small network under a decaying window."""

import math
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from dualform.core.shapes import smaller, wide
from dualform.layers.mixer import Hint
from dualform.ops.dispatch import exactly


class ImplicitFilter(nn.Module):
    """``k_t = W_out s(W s(.. s(W z_t + b) .. ) + b) (exp(-t' rate) + floor)``, ``s(u) = sin(frequency u)``.

    ``t' = t / (l_max - 1)`` runs from 0 to 1. The positional features z, one row for each t, start as ``t'``, then
    the real and the imaginary parts of ``exp(-2 pi i f t / l_max)`` for f from 0 to ``(d_embed - 1) / 2 - 1``; as in
    the original they are trained, slowly. So a filter has ``l_max`` taps and is zero beyond.

    Args:
        count: filters per channel.
        d_model: D.
        l_max: K, taps.
        d_embed: width of z, odd.
        d_filter: width of the network.
        hidden: maps between its first and its last.
        frequency: of the sine at the start.
        window: ``(slow, fast, floor)``: the time constants of the last and the first channel's window as shares of
            l_max, down to a hundredth, and what a window tends to.

    References:
        Poli et al. (2023), arXiv:2302.10866, section 3.3 and appendix D.3.
    """

    rate: Tensor
    hints: ClassVar[dict[str, Hint]] = {
        "positions": Hint(decay=False, max_lr=1e-5),
        "frequency": Hint(decay=False),
    }

    def __init__(
        self,
        count: int,
        d_model: int,
        l_max: int,
        *,
        d_embed: int,
        d_filter: int,
        hidden: int,
        frequency: float,
        window: tuple[float, float, float],
    ):
        super().__init__()
        self.count, self.d_model, self.l_max = count, d_model, l_max
        slow, fast, self.floor = window
        self.positions = nn.Parameter(_features(l_max, d_embed).to(torch.get_default_dtype()))
        widths = [d_embed, *[d_filter] * (hidden + 1)]
        self.maps = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.out = nn.Linear(d_filter, count * d_model, bias=False)
        self.frequency = nn.Parameter(torch.full((d_filter,), float(frequency)))
        rates = torch.linspace(math.log(100) / slow, math.log(100) / fast, count * d_model)
        # a copy: the transpose of one column counts as contiguous, and has strides that DistributedDataParallel refuses
        rate = rates.view(d_model, count).T.clone(memory_format=torch.contiguous_format)
        self.register_buffer("rate", rate)

    def forward(self, length: int) -> Float[Tensor, "K count D"]:
        """The first ``length`` taps, at most ``l_max``, in float32 or wider."""
        dtype, length = wide(self.frequency), smaller(length, self.l_max)
        z, times = self.positions.narrow(0, 0, length).to(dtype), torch.arange(length, device=self.rate.device)
        with exactly(z.device.type):
            for layer in self.maps:
                z = torch.sin(self.frequency.to(dtype) * _in(dtype, layer, z))
            k = _in(dtype, self.out, z).unflatten(-1, (self.count, self.d_model))
        times = times.to(dtype)[:, None, None] / max(self.l_max - 1, 1)
        return k * ((-times * self.rate.to(dtype)).exp() + self.floor)


def _in(dtype: torch.dtype, layer: nn.Module, z: Tensor) -> Tensor:
    """``layer(z)`` with its parameters in ``dtype``; the layer may be what wraps a linear map."""
    return functional_call(layer, {name: p.to(dtype) for name, p in layer.named_parameters()}, z)


def _features(l_max: int, d_embed: int) -> Tensor:
    t, bands = torch.arange(l_max, dtype=torch.float64), (d_embed - 1) // 2
    turn = 2 * math.pi / l_max * t[:, None] * torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
    return torch.cat([t[:, None] / max(l_max - 1, 1), turn.cos(), -turn.sin()], 1)
