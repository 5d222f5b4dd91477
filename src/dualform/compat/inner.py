"""``mamba_inner_fn`` of mamba-ssm, a Mamba layer behind its first projection, and what vision forks made of it."""

import torch.nn.functional as F
from torch import Tensor

from dualform.compat.conv import causal_conv1d_fn
from dualform.compat.layout import check_layout
from dualform.compat.scan import outputs
from dualform.core.errors import ArgumentError
from dualform.ops.op import backend

_WHERE = "mamba_inner_fn"


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """``x = silu(conv(x))``; ``delta, B, C = x_proj(x)``; the selective scan, gated by z; ``out_proj``.

    Args:
        xz: ``(B, 2 D, T)``, x above z.
        conv1d_weight: ``(D, 1, W)``.
        conv1d_bias: ``(D,)``.
        x_proj_weight: ``(R + 2 N, D)``, less the rows of a B or C that is given; with a complex A, 2 N for each.
        delta_proj_weight: ``(D, R)``.
        out_proj_weight: ``(M, D)``.
        out_proj_bias: ``(M,)``.
        A: ``(D, N)``.
        B: as in :func:`~dualform.compat.scan.selective_scan_fn`; None for one that is made of x.
        C: as B.
        D: ``(D,)``.
        delta_bias: ``(D,)``.
        B_proj_bias: added to B where it is made of x.
        C_proj_bias: likewise.
        delta_softplus: whether the step passes through softplus.
        checkpoint_lvl: what upstream's backward computes anew; here the operators decide, and the result is the same.
        b_rms_weight: ``(N,)``; B where it is made of x is divided by its RMS and multiplied by this.
        c_rms_weight: ``(N,)``, likewise.
        dt_rms_weight: ``(D,)``, likewise for the step, after its projection and before its bias.
        b_c_dt_rms_eps: added to the mean squares.

    Returns:
        ``(B, T, M)``.

    Raises:
        ArgumentError: for shapes or dtypes that do not fit together.
    """
    x, z = _convolved(xz, conv1d_weight, conv1d_bias, checkpoint_lvl)
    delta, B, C = _maps(
        x,
        x_proj_weight,
        delta_proj_weight,
        A,
        (B, B_proj_bias, b_rms_weight),
        (C, C_proj_bias, c_rms_weight),
        (dt_rms_weight, b_c_dt_rms_eps),
    )
    y = outputs(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return _projected(y, out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """:func:`mamba_inner_fn` with plain loops."""
    with backend("reference"):
        return mamba_inner_fn(
            xz,
            conv1d_weight,
            conv1d_bias,
            x_proj_weight,
            delta_proj_weight,
            out_proj_weight,
            out_proj_bias,
            A,
            B,
            C,
            D,
            delta_bias,
            B_proj_bias,
            C_proj_bias,
            delta_softplus,
        )


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """:func:`mamba_inner_fn` without its last projection, ``(B, D, T)``, as Vision Mamba has it."""
    x, z = _convolved(xz, conv1d_weight, conv1d_bias, checkpoint_lvl)
    delta, B, C = _maps(x, x_proj_weight, delta_proj_weight, A, (B, B_proj_bias, None), (C, C_proj_bias, None))
    return outputs(x, delta, A, B, C, D, z, delta_bias, delta_softplus)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """:func:`mamba_inner_fn` with a second scan from the last step to the first, as Vision Mamba's "v1" has it.

    Both scans read the same convolved x, steps, B and C; the second one has the rates ``A_b``, and they are added.
    """
    x, z = _convolved(xz, conv1d_weight, conv1d_bias, checkpoint_lvl)
    delta, B, C = _maps(x, x_proj_weight, delta_proj_weight, A, (B, B_proj_bias, None), (C, C_proj_bias, None))
    y = outputs(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    B, C = (m if m.dim() == 2 else _reversed(m, A) for m in (B, C))
    back = outputs(x.flip(-1), delta.flip(-1), A_b, B, C, D, z.flip(-1), delta_bias, delta_softplus)
    return _projected(y + back.flip(-1), out_proj_weight, out_proj_bias)


def _convolved(xz: Tensor, weight: Tensor, bias: Tensor | None, checkpoint_lvl: int) -> tuple[Tensor, Tensor]:
    """``silu(conv(x))`` and z."""
    if checkpoint_lvl not in (0, 1):
        raise ArgumentError(f"{_WHERE}: checkpoint_lvl is {checkpoint_lvl!r}, expected 0 or 1")
    check_layout(_WHERE, conv1d_weight=(weight, "D 1 W"))
    check_layout(_WHERE, xz=(xz, f"B {2 * weight.shape[0]} T"))
    x, z = xz.chunk(2, 1)
    y = causal_conv1d_fn(x, weight.squeeze(1), bias, activation="silu")
    assert isinstance(y, Tensor)
    return y, z


def _maps(
    x: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: tuple[Tensor | None, Tensor | None, Tensor | None],
    C: tuple[Tensor | None, Tensor | None, Tensor | None],
    norm: tuple[Tensor | None, float] = (None, 1e-6),
) -> tuple[Tensor, Tensor, Tensor]:
    """The step ``(B, D, T)``, B and C; these come as themselves or None, a bias, and a weight of a norm."""
    parts, rank = A.shape[1] * (2 if A.is_complex() else 1), delta_proj_weight.shape[1]
    (dt_weight, eps), widths = norm, [rank, *(parts for m in (B, C) if m[0] is None)]
    if x_proj_weight.shape[0] != sum(widths):
        raise ArgumentError(
            f"{_WHERE}: x_proj_weight has {x_proj_weight.shape[0]} rows, expected {sum(widths)}: "
            f"{rank} for the step and {sum(widths) - rank} for B and C"
        )
    low, *made = F.linear(x.transpose(1, 2), x_proj_weight).split(widths, -1)
    delta = _rms(F.linear(low, delta_proj_weight), dt_weight, eps).transpose(1, 2)
    found = []
    for given, bias, weight in (B, C):
        if given is not None:
            found.append(given)
            continue
        m = made.pop(0)
        m = _rms(m if bias is None else m + bias.to(m.dtype), weight, eps)
        if A.is_complex():  # real and imaginary parts alternate along time
            found.append(m.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(2))
        else:
            found.append(m.transpose(1, 2))
    return delta, found[0], found[1]


def _rms(m: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return m
    return F.rms_norm(m.to(weight.dtype), m.shape[-1:], weight, eps).to(m.dtype)


def _reversed(m: Tensor, A: Tensor) -> Tensor:
    """A map ``(..., T)`` or, complex, ``(..., 2 T)`` from its last step to its first."""
    return m.unflatten(-1, (-1, 2)).flip(-2).flatten(-2) if A.is_complex() else m.flip(-1)


def _projected(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(y.transpose(1, 2).to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
