"""A norm and the gate before or behind it, which Mamba-2 has in front of its output projection."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import once_per_shape, wide
from dualform.ops.normalize import check_norm, check_rows, normalize, normalize_fused, scale, seen_through
from dualform.ops.op import Op
from dualform.ops.rerun import rerun

_WHERE = "gated_norm"


def gated_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    z: Tensor | None = None,
    groups: int = 1,
    eps: float = 1e-5,
    center: bool = False,
    norm_before_gate: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``v = x silu(z)`` and ``y = v / rms(v) * weight + bias``, where ``rms(v) = sqrt(mean(v^2) + eps)``.

    The mean is that of each of ``groups`` slices of the last axis. With ``norm_before_gate`` the gate multiplies what
    was normalised: ``y = (x / rms(x) * weight + bias) silu(z)``. With ``center`` the mean of v is subtracted before:
    LayerNorm instead of RMS norm. Everything is computed in float32, or in the widest dtype that comes in, and rounded
    once.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)``.
        z: ``(..., D)``, the gate; None for a norm without one.
        groups: G, slices of the last axis that are normalised each by itself.
        eps: added to the mean square.
        center: whether the mean is subtracted.
        norm_before_gate: whether the norm comes before the gate.
        dtype: of y; by default that of x.

    Returns:
        y ``(..., D)``.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit, groups that do not divide D, or an eps below 0.

    References:
        Zhang & Sennrich (2019), arXiv:1910.07467, equation 4; Dao & Gu (2024), arXiv:2405.21060, section 7.2.
    """
    _check_inputs(x, weight, bias, z, groups)
    dtype = x.dtype if dtype is None else dtype
    check_norm(_WHERE, eps, dtype=dtype)
    a = GatedNorm(x, weight, bias, z, groups, eps, center, norm_before_gate, dtype)
    (y,) = _run(a, normalize_fused) if seen_through() else gated_norm_op(a)
    return y


class GatedNorm(NamedTuple):
    """The arguments of the operator, as in :func:`gated_norm`."""

    x: Tensor  # (..., D)
    weight: Tensor  # (D,)
    bias: Tensor | None  # (D,)
    z: Tensor | None  # (..., D)
    groups: int
    eps: float
    center: bool
    norm_before_gate: bool
    dtype: torch.dtype

    @property
    def inside(self) -> torch.dtype:
        """What is computed in."""
        return wide(self.x, self.weight, self.bias, self.z)


@once_per_shape
def _check_inputs(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, groups: int) -> None:
    check_rows(_WHERE, x, weight, bias, z=z)
    if groups < 1 or weight.shape[0] % groups:
        raise ArgumentError(
            f"{_WHERE}: groups is {groups}, which does not divide D = {weight.shape[0]}",
            hint="set groups to a divisor of the width",
        )


def _check(a: GatedNorm) -> None:
    _check_inputs(a.x, a.weight, a.bias, a.z, a.groups)
    check_norm(_WHERE, a.eps, dtype=a.dtype)


def _run(a: GatedNorm, norm: Callable[[Tensor, int, float, bool], Tensor]) -> tuple[Tensor]:
    x, gate = a.x.to(a.inside), None if a.z is None else F.silu(a.z.to(a.inside))
    x = x if gate is None or a.norm_before_gate else x * gate
    y = scale(norm(x, a.groups, a.eps, a.center), a.weight, a.bias)
    return ((y * gate if gate is not None and a.norm_before_gate else y).to(a.dtype),)


def _fake(a: GatedNorm) -> list[Tensor]:
    return [a.x.new_empty(a.x.shape, dtype=a.dtype)]


gated_norm_op = Op(_WHERE, GatedNorm, lambda a: _run(a, normalize), fake=_fake, check=_check, outputs=1)
gated_norm_op.add(rerun(lambda a: [m.contiguous() for m in _run(a, normalize_fused)]))
