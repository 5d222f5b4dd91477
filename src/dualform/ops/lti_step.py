"""One step of a block with a diagonal, time-invariant system in it: from the residual stream to the residual stream."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors, once_per_shape
from dualform.ops.mamba_step import check_step_dtypes
from dualform.ops.normalize import check_norm, normalize, scale
from dualform.ops.op import Op

_WHERE = "lti_step"


def lti_step(
    x: Tensor, h: Tensor, weights: "LtiWeights", *, eps: float = 1e-5, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """``x + out(gelu(s))`` of one element, where ``h = a h + b u`` and ``s = Re(C h) + D u`` of ``u = norm(x)``.

    Each of M features has N states of its own, as in S4D and DSS, or all of them share N, as in S5 and LRU: a is then
    ``(N,)``, and b, a matrix, reads all of u. ``norm(x) = x / sqrt(mean(x^2) + eps)`` times a weight; gelu is that of
    the error function. ``out(g) = p sigmoid(q)``, where p and q are the halves of ``W g + bias``; a square W makes q
    alone, and p is g.

    W may have 16 bits beside a float32 stream; everything else has the dtype of x, or the complex one of its precision,
    in which all of it is computed, and nothing is rounded in between.

    Args:
        x: ``(B, M)``, the residual stream, float32 or float64.
        h: ``(B, M, N)``, or shared ``(B, N)``, complex.
        weights: of the norm and the layer.
        eps: added to the mean square.
        in_place: whether the next h may be written where this one lies.

    Returns:
        The stream ``(B, M)``, and the next h.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Gu et al. (2022), arXiv:2206.11893, equation 2; Smith et al. (2023), arXiv:2208.04933, section 3 and appendix
        G.1; Orvieto et al. (2023), arXiv:2303.06349, for the same systems.
    """
    a = LtiStep(x, h, *weights, eps, in_place)
    _check(a)
    x, h = lti_step_op(a)
    return x, h


class LtiWeights(NamedTuple):
    """What a block with such a system is made of; Re(C h) counts each of a pair of conjugate states once."""

    norm: Tensor  # (M,)
    a: Tensor  # (M, N), or shared (N,), complex
    b: Tensor  # (M, N), or shared (N, M), complex
    C: Tensor  # (M, N), complex
    D: Tensor  # (M,)
    out_weight: Tensor  # W, (2 M, M) or (M, M), a matrix
    out_bias: Tensor | None  # as many as W has rows


class LtiStep(NamedTuple):
    """The arguments of the operator, as in :func:`lti_step`."""

    x: Tensor
    h: Tensor
    norm: Tensor
    a: Tensor
    b: Tensor
    C: Tensor
    D: Tensor
    out_weight: Tensor
    out_bias: Tensor | None
    eps: float
    in_place: bool = False

    @property
    def shared(self) -> bool:
        """Whether all features share their states."""
        return self.a.dim() == 1

    @property
    def gate(self) -> bool:
        """Whether W makes the gate alone."""
        return self.out_weight.shape[0] == self.out_weight.shape[1]


_COMPLEX = ("h", "a", "b", "C")


def _check(a: LtiStep) -> None:
    check_norm(_WHERE, a.eps)
    _check_tensors(*a[:-2])


@once_per_shape
def _check_tensors(*tensors: Tensor | None) -> None:
    a = LtiStep._make((*tensors, 0.0, False))
    shared = isinstance(a.a, Tensor) and a.a.dim() == 1
    sizes = check_tensors(
        _WHERE,
        x=(a.x, "B M"),
        h=(a.h, "B N" if shared else "B M N"),
        norm=(a.norm, "M"),
        a=(a.a, "N" if shared else "M N"),
        b=(a.b, "N M" if shared else "M N"),
        C=(a.C, "M N"),
        D=(a.D, "M"),
        out_weight=(a.out_weight, "O M"),
        out_bias=(a.out_bias, "? O"),
    )
    M, N, outputs = (sizes[letter] for letter in "MNO")
    if outputs not in (M, 2 * M):
        raise ArgumentError(
            f"{_WHERE}: out_weight has shape {tuple(a.out_weight.shape)}, expected {2 * M} on axis 0, or {M} for a gate"
        )
    if 0 in (M, N):
        raise ArgumentError(f"{_WHERE}: a size of the weights is 0: M, N = {M}, {N}")
    check_step_dtypes(_WHERE, a, {"out_weight": ""}, _COMPLEX)


def _reference(a: LtiStep) -> tuple[Tensor, Tensor]:
    u = scale(normalize(a.x, 1, a.eps, False), a.norm, None)
    if a.shared:
        h = a.a * a.h + u.to(a.h.dtype) @ a.b.T
        s = (h @ a.C.T).real
    else:
        h = a.a * a.h + a.b * u[..., None]
        s = (a.C * h).sum(-1).real
    g = F.gelu(s + a.D * u)
    q = F.linear(g, a.out_weight.to(a.x.dtype), a.out_bias)
    p, q = (g, q) if a.gate else q.chunk(2, -1)
    return a.x + p * torch.sigmoid(q), h


def _fake(a: LtiStep) -> list[Tensor]:
    return [m.new_empty(m.shape) for m in (a.x, a.h)]


lti_step_op: Op[Any] = Op(_WHERE, LtiStep, _reference, fake=_fake, check=_check, outputs=2, stepwise=True)
