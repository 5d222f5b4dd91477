"""RMS normalisation and a gate in one module, which Mamba-2 has before its output projection."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.shapes import wide


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
        dtype = wide(y, z)
        out, gate = y.to(dtype), F.silu(z.to(dtype))
        out = self._rms(out) * gate if self.norm_before_gate else self._rms(out * gate)
        return out.to(y.dtype)

    def _rms(self, v: Tensor) -> Tensor:
        slices = v.unflatten(-1, (self.groups, -1))
        return F.rms_norm(slices, slices.shape[-1:], eps=self.eps).flatten(-2) * self.weight.to(v.dtype)
