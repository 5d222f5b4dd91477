"""Norms joined with the addition of the residual stream: ``mamba_ssm.ops.triton.layer_norm``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors, wide
from dualform.ops.add_norm import add_norm
from dualform.ops.device import explains_device
from dualform.ops.gated_norm import gated_norm


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """``r = dropout(rowscale x) + dropout(x1) + residual``, ``y = norm(r) weight + bias``.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)``.
        residual: ``(..., D)``.
        x1: ``(..., D)``, a second branch.
        weight1: ``(D,)``, of a second output ``norm(r) weight1 + bias1``.
        bias1: ``(D,)``.
        eps: added to the variance, or to the mean square.
        dropout_p: share of x and of x1 that is set to zero; what is left is divided by ``1 - dropout_p``.
        rowscale: ``(...,)``, multiplies x.
        prenorm: whether r is returned, too.
        residual_in_fp32: whether r is in float32 where no residual is given; otherwise it has the residual's dtype.
        zero_centered_weight: whether 1 is added to the weights.
        is_rms_norm: ``r / rms(r)`` instead of ``(r - mean) / std``.
        return_dropout_mask: must be false.

    Returns:
        y in the dtype of x, computed in float32 or wider; then the second output, and r, as they are asked for.

    Raises:
        ArgumentError: for shapes that do not fit together, and where masks are asked for.
    """
    where = "rms_norm_fn" if is_rms_norm else "layer_norm_fn"
    if return_dropout_mask:
        raise ArgumentError(
            f"{where}: return_dropout_mask is not supported", hint="apply torch.nn.functional.dropout to x before"
        )
    check_tensors(
        where, weight=(weight, "D"), bias=(bias, "? D"), weight1=(weight1, "? D"), bias1=(bias1, "? D"), x=(x, "* ...")
    )
    for name, m in (("x", x), ("x1", x1), ("residual", residual)):
        if m is not None and (m.shape != x.shape or m.shape[-1:] != weight.shape):
            want = (*x.shape[:-1], *weight.shape)
            raise ArgumentError(f"{where}: {name} has shape {tuple(m.shape)}, expected {want}")
    if rowscale is not None and rowscale.shape != x.shape[:-1]:
        raise ArgumentError(f"{where}: rowscale has shape {tuple(rowscale.shape)}, expected {tuple(x.shape[:-1])}")
    made, kept = x, torch.float32 if residual_in_fp32 else x.dtype
    if rowscale is not None or x1 is not None or dropout_p:
        made = _branches(x, x1, rowscale, dropout_p, wide(x, x1, residual))

    def normed(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        weight = weight.to(wide(weight)) + 1 if zero_centered_weight else weight
        options = {"eps": eps, "center": not is_rms_norm, "dtype": x.dtype}
        if residual is None:
            return gated_norm(made, weight, bias, **options), made.to(kept)
        return add_norm(made, residual, weight, bias, **options, residual_dtype=residual.dtype)

    y, r = normed(weight, bias)
    found = [y] if weight1 is None else [y, normed(weight1, bias1)[0]]
    found += [r] if prenorm else []
    return y if len(found) == 1 else tuple(found)


def _branches(x: Tensor, x1: Tensor | None, rowscale: Tensor | None, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """``dropout(rowscale x) + dropout(x1)`` in a wide dtype."""
    r = x.to(dtype)
    r = r if rowscale is None else r * rowscale[..., None].to(dtype)
    r = F.dropout(r, dropout_p) if dropout_p else r
    if x1 is None:
        return r
    branch = x1.to(dtype)
    return r + (F.dropout(branch, dropout_p) if dropout_p else branch)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`layer_norm_fn` without a mean."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
    )


@explains_device
class RMSNorm(nn.Module):
    """:func:`rms_norm_fn` with its weight.

    Args:
        hidden_size: D.
        eps: added to the mean square.
        dropout_p: as there, while training.
        zero_centered_weight: whether the weight starts at zero, and 1 is added to it.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps, self.zero_centered_weight = eps, zero_centered_weight
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias: None
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A weight that multiplies by one."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """``(..., D) -> (..., D)``, and the new residual with ``prenorm``."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )
