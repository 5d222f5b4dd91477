"""One step of a recurrence, in one pass over its state."""

import triton
import triton.language as tl

from dualform.ops.triton.kernels.pointwise import silu, softplus


@triton.jit
def causal_conv1d_update(
    x_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    after_ptr,
    D,
    stride_x,
    stride_state,
    stride_after,
    SILU: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
):
    """``BD`` channels of a row: the output, and the last W-1 inputs, which may lie where those before did."""
    dtype: tl.constexpr = tl.float64 if state_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(D, BD)
    d, b = tl.program_id(0) % blocks * BD + tl.arange(0, BD), (tl.program_id(0) // blocks).to(tl.int64)
    mask, column = d < D, d.to(tl.int64)
    state_ptr += b * stride_state + column * (W - 1)
    after_ptr += b * stride_after + column * (W - 1)
    window = ()
    for j in tl.static_range(W - 1):
        window = window + (tl.load(state_ptr + j, mask=mask, other=0.0).to(dtype),)
    window = window + (tl.load(x_ptr + b * stride_x + d, mask=mask, other=0.0).to(dtype),)
    y = tl.zeros((BD,), dtype)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + d, mask=mask, other=0.0).to(dtype)
    for j in tl.static_range(W):
        y += tl.load(weight_ptr + column * W + j, mask=mask, other=0.0).to(dtype) * window[j]
    for j in tl.static_range(W - 1):
        tl.store(after_ptr + j, window[j + 1].to(after_ptr.dtype.element_ty), mask=mask)
    if SILU:
        y = silu(y)
    tl.store(y_ptr + b * D + d, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def selective_state_update(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    y_ptr,
    after_ptr,
    width,
    per_head,
    per_skip,
    per_b,
    per_c,
    stride_state,
    stride_x,
    stride_dt,
    stride_z,
    stride_b,
    stride_b_group,
    stride_c,
    stride_c_group,
    stride_after,
    SOFTPLUS: tl.constexpr,
    BY_HEAD: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    BD: tl.constexpr,
):
    """``BD`` channels of a row; the next states may lie where those before did.

    ``per_head`` neighbouring channels share a step size and, ``BY_HEAD``, a rate; ``per_skip`` an entry of D; ``per_b``
    and ``per_c`` a group of B and of C.
    """
    dtype: tl.constexpr = tl.float64 if state_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(width, BD)
    d, b = tl.program_id(0) % blocks * BD + tl.arange(0, BD), (tl.program_id(0) // blocks).to(tl.int64)
    n, mask = tl.arange(0, NP)[None, :], d < width
    there, at = mask[:, None] & (n < N), d[:, None].to(tl.int64) * N + n
    x = tl.load(x_ptr + b * stride_x + d, mask=mask, other=0.0).to(dtype)
    dt = tl.load(dt_ptr + b * stride_dt + d // per_head, mask=mask, other=0.0).to(dtype)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + d // per_head, mask=mask, other=0.0).to(dtype)
    if SOFTPLUS:
        dt = softplus(dt)
    if BY_HEAD:
        rates = tl.load(A_ptr + d // per_head, mask=mask, other=0.0)[:, None]
    else:
        rates = tl.load(A_ptr + at, mask=there, other=0.0)
    into = tl.load(B_ptr + b * stride_b + (d // per_b)[:, None] * stride_b_group + n, mask=there, other=0.0).to(dtype)
    out = tl.load(C_ptr + b * stride_c + (d // per_c)[:, None] * stride_c_group + n, mask=there, other=0.0).to(dtype)
    before = tl.load(state_ptr + b * stride_state + at, mask=there, other=0.0).to(dtype)
    h = tl.exp(dt[:, None] * rates.to(dtype)) * before + (dt * x)[:, None] * into
    tl.store(after_ptr + b * stride_after + at, h.to(after_ptr.dtype.element_ty), mask=there)
    y = tl.sum(h * out, 1)
    if D_ptr is not None:
        y += tl.load(D_ptr + d // per_skip, mask=mask, other=0.0).to(dtype) * x
    if z_ptr is not None:
        y *= silu(tl.load(z_ptr + b * stride_z + d, mask=mask, other=0.0).to(dtype))
    tl.store(y_ptr + b * width + d, y.to(y_ptr.dtype.element_ty), mask=mask)
