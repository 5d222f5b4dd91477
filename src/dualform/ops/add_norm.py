"""The norm of a residual stream to which something is added: one pass over memory for both."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.shapes import check_tensors, once_per_shape, wide
from dualform.ops.normalize import check_norm, check_rows, normalize, normalize_fused, scale, seen_through
from dualform.ops.op import Op
from dualform.ops.rerun import rerun

_WHERE = "add_norm"


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    center: bool = False,
    dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``r = x + residual`` and ``y = r / rms(r) * weight + bias``, where ``rms(r) = sqrt(mean(r^2) + eps)``.

    The mean is that of the last axis. With ``center`` the mean of r is subtracted before: LayerNorm instead of RMS
    norm. Both are computed in float32, or in the widest dtype that comes in, and rounded once; y is the norm of the sum
    before that was rounded.

    Args:
        x: ``(..., D)``, what is added to the stream.
        residual: ``(..., D)``, the stream.
        weight: ``(D,)``.
        bias: ``(D,)``.
        eps: added to the mean square.
        center: whether the mean is subtracted.
        dtype: of y; by default that of x.
        residual_dtype: of r; by default float32, or the widest dtype that comes in.

    Returns:
        y ``(..., D)``, and the stream r ``(..., D)`` behind the sum.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit, or an eps below 0.

    References:
        Zhang & Sennrich (2019), arXiv:1910.07467, equation 4; Ba et al. (2016), arXiv:1607.06450, equation 3.
    """
    _check_inputs(x, residual, weight, bias)
    dtype = x.dtype if dtype is None else dtype
    residual_dtype = wide(x, residual, weight, bias) if residual_dtype is None else residual_dtype
    check_norm(_WHERE, eps, dtype=dtype, residual_dtype=residual_dtype)
    a = AddNorm(x, residual, weight, bias, eps, center, dtype, residual_dtype)
    y, r = _run(a, normalize_fused) if seen_through() else add_norm_op(a)
    return y, r


class AddNorm(NamedTuple):
    """The arguments of the operator, as in :func:`add_norm`."""

    x: Tensor  # (..., D)
    residual: Tensor  # (..., D)
    weight: Tensor  # (D,)
    bias: Tensor | None  # (D,)
    eps: float
    center: bool
    dtype: torch.dtype
    residual_dtype: torch.dtype

    @property
    def inside(self) -> torch.dtype:
        """What is computed in."""
        return wide(self.x, self.residual, self.weight, self.bias)

    @property
    def exact(self) -> bool:
        """Whether r is as wide as what is computed in, so that a backward may start from it."""
        return self.residual_dtype == self.inside

    def summands(self, r: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a backward adds up to the r that was normalised: r itself where it is exact."""
        return (r, None) if self.exact else (self.x, self.residual)

    def unread(self) -> tuple[str, ...]:
        """The arguments that such a backward does not read."""
        return ("x", "residual") if self.exact else ()


@once_per_shape
def _check_inputs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensors(_WHERE, residual=(residual, "* ..."))
    check_rows(_WHERE, x, weight, bias, residual=residual)


def _check(a: AddNorm) -> None:
    _check_inputs(a.x, a.residual, a.weight, a.bias)
    check_norm(_WHERE, a.eps, dtype=a.dtype, residual_dtype=a.residual_dtype)


def _run(a: AddNorm, norm: Callable[[Tensor, int, float, bool], Tensor]) -> tuple[Tensor, Tensor]:
    r = a.x.to(a.inside) + a.residual.to(a.inside)
    return scale(norm(r, 1, a.eps, a.center), a.weight, a.bias).to(a.dtype), r.to(a.residual_dtype)


def _fake(a: AddNorm) -> list[Tensor]:
    return [a.x.new_empty(a.x.shape, dtype=dtype) for dtype in (a.dtype, a.residual_dtype)]


add_norm_op = Op(_WHERE, AddNorm, lambda a: _run(a, normalize), fake=_fake, check=_check, keeps=(1,))
add_norm_op.add(rerun(lambda a: [m.contiguous() for m in _run(a, normalize_fused)]))
