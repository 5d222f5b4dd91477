"""Norms joined with a gate: ``mamba_ssm.ops.triton.layernorm_gated``."""

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors
from dualform.ops.device import explains_device
from dualform.ops.gated_norm import gated_norm


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """``norm(x) * silu(z)``, or ``norm(x * silu(z))`` where the gate comes first.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)``.
        z: ``(..., D)``, gate; None for none.
        eps: added to the variance, or to the mean square.
        group_size: features that are normalised together; None is all of them.
        norm_before_gate: whether the gate multiplies what was normalised.
        is_rms_norm: ``x / rms(x)`` instead of ``(x - mean) / std``.

    Returns:
        ``(..., D)`` in the dtype of x, computed in float32 or wider.

    Raises:
        ArgumentError: for shapes that do not fit together, or a group size that does not divide D.
    """
    where = "rmsnorm_fn" if is_rms_norm else "layernorm_fn"
    check_tensors(where, weight=(weight, "D"), bias=(bias, "? D"))
    for name, m in (("x", x), ("z", z)):
        if m is not None and (m.shape != x.shape or m.shape[-1:] != weight.shape):
            want = (*x.shape[:-1], *weight.shape)
            raise ArgumentError(f"{where}: {name} has shape {tuple(m.shape)}, expected {want}")
    size = group_size or len(weight)
    if len(weight) % size:
        raise ArgumentError(f"{where}: group_size is {size}, which does not divide D = {len(weight)}")
    groups, center = len(weight) // size, not is_rms_norm
    return gated_norm(x, weight, bias, z=z, groups=groups, eps=eps, center=center, norm_before_gate=norm_before_gate)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """:func:`layernorm_fn` without a mean."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


@explains_device
class LayerNorm(nn.Module):
    """:func:`layernorm_fn` with its weight and bias.

    Args:
        hidden_size: D.
        eps: added to the variance.
        group_size: features that are normalised together; None is all of them.
        norm_before_gate: whether the gate multiplies what was normalised.
        device: of the parameters.
        dtype: of the parameters.
    """

    _rms = False

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if self._rms else nn.Parameter(torch.empty_like(self.weight)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A weight of one and a bias of zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """``(..., D) -> (..., D)``, with the gate z."""
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate, self._rms)


@explains_device
class RMSNorm(LayerNorm):
    """:func:`rmsnorm_fn` with its weight; arguments as :class:`LayerNorm`."""

    _rms = True
