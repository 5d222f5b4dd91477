"""The plain forms that mamba-ssm has beside its kernels, which projects compare with and fall back to."""

import torch.nn.functional as F
from torch import Tensor

from dualform.compat.plain import plain
from dualform.compat.ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from dualform.core.shapes import wide
from dualform.ops.op import backend

_NO_LIMIT = (0.0, float("inf"))


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """``rmsnorm_fn`` in plain PyTorch: ``rms(x) * weight + bias``, gated by ``silu(z)`` after or before the norm.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)``.
        z: ``(..., D)``, gate; None for none.
        eps: added to the mean square.
        group_size: features that are normalised together; None is all of them.
        norm_before_gate: whether the gate multiplies what was normalised.
        upcast: whether it is computed in float32 or wider; otherwise in the dtypes given.

    Returns:
        ``(..., D)`` in the dtype of x.
    """
    y, gate = (x, z) if not upcast else (x.to(wide(x)), None if z is None else z.to(wide(z)))
    scale, shift = (weight, bias) if not upcast else (weight.to(y.dtype), None if bias is None else bias.to(y.dtype))
    y = y * F.silu(gate) if gate is not None and not norm_before_gate else y
    groups = y.unflatten(-1, (-1, group_size or y.shape[-1]))
    y = (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * scale
    y = y if shift is None else y + shift
    return (y * F.silu(gate) if gate is not None and norm_before_gate else y).to(x.dtype)


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """:func:`~dualform.compat.ssd.mamba_chunk_scan_combined` without states, sequences and limits."""
    y = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus=dt_softplus)
    assert isinstance(y, Tensor)
    return y


ssd_chunk_scan_combined_ref = plain(mamba_chunk_scan, "ssd_chunk_scan_combined_ref")


def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """:func:`~dualform.compat.ssd.mamba_split_conv1d_scan_combined` as a plain loop, without states."""
    with backend("reference"):
        y = mamba_split_conv1d_scan_combined(
            zxbcdt,
            conv1d_weight,
            conv1d_bias,
            dt_bias,
            A,
            D,
            chunk_size,
            dt_limit=dt_limit,
            activation=activation,
            rmsnorm_weight=rmsnorm_weight,
            rmsnorm_eps=rmsnorm_eps,
            outproj_weight=outproj_weight,
            outproj_bias=outproj_bias,
            headdim=headdim,
            ngroups=ngroups,
            norm_before_gate=norm_before_gate,
        )
    assert isinstance(y, Tensor)
    return y
