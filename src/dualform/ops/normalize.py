"""What the norms are made of: their definition, and the same in PyTorch's own kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_real, check_tensors
from dualform.ops.derivatives import transformed
from dualform.ops.op import forced


def normalize(v: Tensor, groups: int, eps: float, center: bool) -> Tensor:
    """``v / rms(v)`` over each of ``groups`` slices of the last axis; with ``center`` its mean is subtracted before.

    Here ``rms(v) = sqrt(mean(v^2) + eps)``.
    """
    v = v.unflatten(-1, (groups, -1))
    v = v - v.mean(-1, keepdim=True) if center else v
    return (v * (v.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2)


def normalize_fused(v: Tensor, groups: int, eps: float, center: bool) -> Tensor:
    """:func:`normalize` by the norms of PyTorch."""
    v = v.unflatten(-1, (groups, -1)) if groups > 1 else v
    v = F.layer_norm(v, v.shape[-1:], eps=eps) if center else F.rms_norm(v, v.shape[-1:], eps=eps)
    return v.flatten(-2) if groups > 1 else v


def scale(v: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``v * weight + bias`` in the dtype of v."""
    v = v * weight.to(v.dtype)
    return v if bias is None else v + bias.to(v.dtype)


def seen_through() -> bool:
    """Whether PyTorch looks into a call: a compiler, which joins what it sees, or a transform of ``torch.func``.

    A norm then is made of PyTorch's own operations, unless a backend was asked for.
    """
    if forced():
        return False
    return torch.compiler.is_compiling() or transformed() or torch._C._get_tracing_state() is not None


def check_rows(where: str, x: Tensor, weight: Tensor, bias: Tensor | None, **beside: Tensor | None) -> None:
    """That x, and what lies beside it, are rows ``(..., D)`` of one shape, with a weight and a bias ``(D,)``.

    Raises:
        ArgumentError: names the argument, what came and what was expected.
    """
    others = {name: (m, "? * ...") for name, m in beside.items()}
    check_tensors(where, x=(x, "* ..."), **others, weight=(weight, "D"), bias=(bias, "? D"))
    check_real(where, x=x, **beside, weight=weight, bias=bias)
    for name, m in {"x": x, **beside}.items():
        if m is not None and (m.shape[-1] != weight.shape[0] or m.shape[:-1] != x.shape[:-1]):
            want = (*x.shape[:-1], weight.shape[0])
            raise ArgumentError(
                f"{where}: {name} has shape {tuple(m.shape)}, expected {want}: that of x, and D of weight"
            )


def check_norm(where: str, eps: float, **dtypes: torch.dtype) -> None:
    """What the shapes of tensors do not say.

    Raises:
        ArgumentError: for an eps that is no number or below 0, or an output whose dtype is not floating.
    """
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ArgumentError(f"{where}: eps is {eps}, expected a small number that is not negative")
    for name, dtype in dtypes.items():
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ArgumentError(f"{where}: {name} is {dtype}, expected a floating dtype")
