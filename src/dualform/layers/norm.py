"""The norms of blocks and layers: RMS norm, alone, of a residual stream that is added to, and with a gate."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.shapes import wide
from dualform.ops.add_norm import add_norm
from dualform.ops.gated_norm import gated_norm
from dualform.ops.normalize import seen_through

_SMALL_ON_CPU, _SMALL = 2**16, 2**20  # numbers; below, the norm of PyTorch takes less time than a call of ours


class RMSNorm(nn.RMSNorm):
    """``rms(x) * weight``, where ``rms(v) = v / sqrt(mean(v^2) + eps)``, in the dtype of the weight.

    It is computed in float32 or wider, and rounded once.

    Args:
        width: the size of the last axis.
        eps: added to the mean square.
    """

    eps: Any

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__(width, eps=eps)

    def forward(self, x: Float[Tensor, "... D"], stream: Float[Tensor, "... D"] | None = None) -> Any:
        """The norm of x; where a residual stream is given, the norm of ``stream + x``, and that sum.

        The sum has the wider of their dtypes.
        """
        weight = self.weight
        if _plain(x):
            x = x if stream is None else stream + x
            y = _rms(x, weight, self.eps)
            return y if stream is None else (y, x)
        if stream is None:
            return gated_norm(x, weight, eps=self.eps, dtype=weight.dtype)
        dtype = torch.promote_types(x.dtype, stream.dtype)
        return add_norm(x, stream, weight, eps=self.eps, dtype=weight.dtype, residual_dtype=dtype)


def _plain(x: Tensor) -> bool:
    """Whether PyTorch's own norm is preferred: where PyTorch looks into it, or x is small, or a DTensor, say."""
    if torch.compiler.is_compiling() or x.numel() < (_SMALL_ON_CPU if x.is_cpu else _SMALL):
        return True
    return type(x) is not Tensor or seen_through()


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype is torch.float32 and weight.dtype is torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    dtype = wide(x, weight)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(weight.dtype)


class GatedRMSNorm(nn.Module):
    """``rms(y * silu(z)) * weight``, where ``rms(v) = v / sqrt(mean(v^2) + eps)``.

    The last axis is cut into ``groups`` slices of equal width, and the mean is taken over each slice by itself. The
    result is computed in float32 or wider, and has the dtype of ``y``.

    Args:
        width: the size of the last axis.
        groups: the number of slices. Under tensor parallelism a slice stays on one device.
        eps: added to the mean square.
        norm_before_gate: compute ``rms(y) * weight * silu(z)``, the order in gated linear attention.

    Raises:
        ConfigError: when ``groups`` does not divide ``width``.

    References:
        Zhang & Sennrich (2019), arXiv:1910.07467, equation 4; Dao & Gu (2024), arXiv:2405.21060, section 7.2.
    """

    def __init__(self, width: int, groups: int = 1, eps: float = 1e-5, *, norm_before_gate: bool = False):
        super().__init__()
        if groups < 1 or width % groups:
            raise ConfigError(
                f"gated RMS norm: width {width} is not a multiple of groups {groups}",
                hint="set groups to a divisor of the width",
            )
        self.groups, self.eps, self.norm_before_gate = groups, eps, norm_before_gate
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Float[Tensor, "... D"], z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Apply the gate ``z`` to ``y``, and normalise."""
        return gated_norm(y, self.weight, z=z, groups=self.groups, eps=self.eps, norm_before_gate=self.norm_before_gate)
