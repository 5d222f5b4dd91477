"""``mamba_chunk_scan_combined`` and ``mamba_split_conv1d_scan_combined`` of mamba-ssm, the scan of Mamba-2."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.compat.conv import causal_conv1d_fn
from dualform.compat.gated_norms import rmsnorm_fn
from dualform.compat.layout import to_the_end
from dualform.core.errors import ArgumentError
from dualform.core.packing import sequence_ids
from dualform.core.shapes import check_tensors
from dualform.ops.runs import check_ids
from dualform.ops.ssd import ssd

_WHERE, _SPLIT = "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"
_NO_LIMIT = (0.0, math.inf)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t + D x_t`` per head, gated by ``silu(z_t)``.

    Args:
        x: ``(B, T, H, P)``.
        dt: ``(B, T, H)``, before bias, softplus and limits.
        A: ``(H,)``.
        B: ``(B, T, G, N)``; head h uses group ``h // (H / G)``.
        C: ``(B, T, G, N)``.
        chunk_size: steps per matrix product; here it changes nothing, dualform's operator has its own.
        D: ``(H,)`` or ``(H, P)``.
        z: ``(B, T, H, P)``.
        dt_bias: ``(H,)``.
        initial_states: ``(B, H, P, N)``, zero by default; with several sequences in a row, that of the first.
        seq_idx: ``(B, T)``, the sequence of each step: runs of equal ids do not see each other.
        cu_seqlens: ``(n + 1,)``, borders of the sequences of a single row, instead of ``seq_idx`` or beside it; what
            lies behind the last one is padding.
        dt_softplus: whether dt passes through softplus.
        dt_limit: smallest and largest step.
        return_final_states: whether the states after the last step of each row are returned, too.
        return_varlen_states: whether those after each sequence of ``cu_seqlens`` are.

    Returns:
        y ``(B, T, H, P)`` in the dtype of x; then, as they are asked for, the final states ``(B, H, P, N)`` and those
        of the sequences ``(n, H, P, N)``, float32 or wider. Gradients pass through all of them.

    Raises:
        ArgumentError: for shapes, dtypes or limits that do not fit together, and for ``return_varlen_states`` without
            ``cu_seqlens``.
    """
    if chunk_size < 1:
        raise ArgumentError(f"{_WHERE}: chunk_size is {chunk_size}, expected at least 1")
    if return_varlen_states and cu_seqlens is None:
        raise ArgumentError(f"{_WHERE}: return_varlen_states without cu_seqlens", hint="give the borders of sequences")
    check_tensors(_WHERE, A=(A, "H"), x=(x, "B T H P"), dt=(dt, "B T H"), B=(B, "B T G N"), C=(C, "B T G N"))
    if initial_states is not None:
        shape = (x.shape[0], *x.shape[2:], B.shape[3])
        check_tensors(_WHERE, initial_states=(initial_states, " ".join(map(str, shape))))
    options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
    if cu_seqlens is None:
        if seq_idx is not None:
            check_ids(_WHERE, seq_idx, x, None)
        y, final = ssd(x, dt, A, B, C, D, z, initial_state=initial_states, seq_idx=seq_idx, **options)
        return (y, final) if return_final_states else y
    check_tensors(_WHERE, cu_seqlens=(cu_seqlens, "*"))
    borders = to_the_end(cu_seqlens, x.shape[1])
    h0 = _of_sequences(x, borders, initial_states)
    y, ends = ssd(x, dt, A, B, C, D, z, initial_state=h0, cu_seqlens=borders, **options)
    ends = ends[:-1]
    found = [y, *([ends[-1:]] if return_final_states else []), *([ends] if return_varlen_states else [])]
    return tuple(found) if len(found) > 1 else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """All of a Mamba-2 layer behind its first projection: convolution, scan, gate, norm and last projection.

    Args:
        zxbcdt: ``(B, T, 2 M + 2 H P + 2 G N + H)``: M features that gate M others, a feed-forward beside the
            scan (M may be 0); then z, x, B, C and dt.
        conv1d_weight: ``(H P + 2 G N, W)``, over x, B and C.
        conv1d_bias: ``(H P + 2 G N,)``.
        dt_bias: ``(H,)``.
        A: ``(H,)``.
        D: ``(H,)`` or ``(H, P)``.
        chunk_size: changes nothing here.
        initial_states: ``(B, H, P, N)``.
        seq_idx: ``(B, T)``, for convolution and scan.
        dt_limit: smallest and largest step, after softplus.
        return_final_states: whether the states after the last step are returned, too.
        activation: of the convolution: None, "silu" or "swish".
        rmsnorm_weight: ``(H P,)``; where it is None there is no norm, and z gates inside of the scan.
        rmsnorm_eps: added to the mean square.
        outproj_weight: ``(F, M + H P)``; None for no projection.
        outproj_bias: ``(F,)``.
        headdim: P, needed where D is ``(H,)``.
        ngroups: G; each has its own norm.
        norm_before_gate: whether z gates what is normed, or is part of it.

    Returns:
        ``(B, T, F)``, or ``(B, T, M + H P)`` without a projection; with ``return_final_states`` also the states.

    Raises:
        ArgumentError: for shapes, dtypes or an activation that does not fit.
    """
    y, final = split_scan(
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        initial_states=initial_states,
        seq_idx=seq_idx,
        cu_seqlens=None,
        dt_limit=dt_limit,
        activation=activation,
        norm=(rmsnorm_weight, rmsnorm_eps, norm_before_gate),
        sizes=(headdim, ngroups),
    )
    if outproj_weight is not None:
        bias = None if outproj_bias is None else outproj_bias.to(outproj_weight.dtype)
        y = F.linear(y.to(outproj_weight.dtype), outproj_weight, bias)
    return (y, final) if return_final_states else y


def split_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_limit: tuple[float, float],
    activation: str | None,
    norm: tuple[Tensor | None, float, bool],
    sizes: tuple[int | None, int],
) -> tuple[Tensor, Tensor]:
    """:func:`mamba_split_conv1d_scan_combined` up to its last projection, and the states it ends with.

    Args:
        zxbcdt: as there, and so are all that are not mentioned here.
        conv1d_weight: so.
        conv1d_bias: so.
        dt_bias: so.
        A: so.
        D: so.
        initial_states: so.
        seq_idx: so.
        cu_seqlens: borders of the sequences of a single row; the states are then one for each.
        dt_limit: so.
        activation: so.
        norm: weight, eps, and whether it comes before the gate.
        sizes: P, which D may tell, and G.
    """
    (weight, eps, norm_first), (headdim, groups) = norm, sizes
    if D.dim() == 1 and headdim is None:
        raise ArgumentError(f"{_SPLIT}: headdim is missing", hint="D is (H,) and does not tell the width of a head")
    heads, width = D.shape[0], headdim if D.dim() == 1 and headdim is not None else D.shape[-1]
    inner, convolved = heads * width, conv1d_weight.shape[0]
    maps = (convolved - inner) // 2
    beside = zxbcdt.shape[-1] - inner - convolved - heads
    if beside < 0 or beside % 2 or convolved != inner + 2 * maps or maps % groups:
        raise ArgumentError(
            f"{_SPLIT}: zxbcdt has {zxbcdt.shape[-1]} features and conv1d_weight {convolved} rows, which are no "
            f"{heads} heads of width {width} with {groups} groups"
        )
    gate, value, z, xBC, dt = zxbcdt.split([beside // 2, beside // 2, inner, convolved, heads], -1)
    if cu_seqlens is not None:
        seq_idx = sequence_ids(cu_seqlens.to(zxbcdt.device), zxbcdt.shape[1])[None]
    xBC = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    assert isinstance(xBC, Tensor)
    x, B, C = xBC.transpose(1, 2).split([inner, maps, maps], -1)
    y, *_, states = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, width)),
        dt,
        A,
        B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)),
        1,
        D,
        z.unflatten(-1, (heads, width)) if weight is None else None,
        dt_bias,
        initial_states,
        seq_idx,
        cu_seqlens,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
        return_varlen_states=cu_seqlens is not None,
    )
    y = y.flatten(2)
    if weight is not None:
        y = rmsnorm_fn(y, weight, None, z, eps, inner // groups, norm_first)
    return (torch.cat([F.silu(gate) * value, y], -1) if beside else y), states


def _of_sequences(x: Tensor, cu_seqlens: Tensor, state: Tensor | None) -> Tensor | None:
    """The state ``(1, H, P, N)`` of a row of sequences as that of its first, the others beginning with zeros."""
    if x.shape[0] != 1:
        raise ArgumentError(
            f"{_WHERE}: with cu_seqlens the batch axis must be 1, got {x.shape[0]}",
            hint="lay the sequences end to end on the time axis, or give seq_idx alone",
        )
    others = max(0, cu_seqlens.shape[0] - 2)
    return None if state is None else torch.cat([state, state.new_zeros(others, *state.shape[1:])])
