"""One step of a recurrence, in one pass over its state."""

import triton
import triton.language as tl


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
    SILU: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
):
    """``BD`` channels of a row: the output, and the last W-1 inputs."""
    dtype: tl.constexpr = state_ptr.dtype.element_ty
    blocks = tl.cdiv(D, BD)
    d, b = tl.program_id(0) % blocks * BD + tl.arange(0, BD), (tl.program_id(0) // blocks).to(tl.int64)
    mask, column = d < D, d.to(tl.int64)
    x = tl.load(x_ptr + b * stride_x + d, mask=mask, other=0.0).to(dtype)
    y = tl.load(weight_ptr + column * W + W - 1, mask=mask, other=0.0).to(dtype) * x
    if bias_ptr is not None:
        y += tl.load(bias_ptr + d, mask=mask, other=0.0).to(dtype)
    at = (b * D + column) * (W - 1)
    for j in tl.static_range(W - 1):
        seen = tl.load(state_ptr + at + j, mask=mask, other=0.0)
        y += tl.load(weight_ptr + column * W + j, mask=mask, other=0.0).to(dtype) * seen
        if j > 0:
            tl.store(after_ptr + at + j - 1, seen, mask=mask)
    if W > 1:
        tl.store(after_ptr + at + W - 2, x, mask=mask)
    if SILU:
        y = y / (1 + tl.exp(-y))
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
    per,
    per_b,
    per_c,
    stride_x,
    stride_dt,
    stride_z,
    stride_b,
    stride_b_group,
    stride_c,
    stride_c_group,
    SOFTPLUS: tl.constexpr,
    BY_HEAD: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    BD: tl.constexpr,
):
    """``BD`` channels of a row; ``per`` channels share a step size and, ``BY_HEAD``, a rate."""
    dtype: tl.constexpr = state_ptr.dtype.element_ty
    blocks = tl.cdiv(width, BD)
    d, b = tl.program_id(0) % blocks * BD + tl.arange(0, BD), (tl.program_id(0) // blocks).to(tl.int64)
    n, mask = tl.arange(0, NP)[None, :], d < width
    there = mask[:, None] & (n < N)
    at = (b * width + d[:, None]) * N + n
    x = tl.load(x_ptr + b * stride_x + d, mask=mask, other=0.0).to(dtype)
    dt = tl.load(dt_ptr + b * stride_dt + d // per, mask=mask, other=0.0).to(dtype)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + d // per, mask=mask, other=0.0).to(dtype)
    if SOFTPLUS:
        e = tl.exp(tl.minimum(dt, 20.0))
        one = 1 + e  # log1p, to full precision where e is small
        dt = tl.where(dt > 20, dt, tl.where(one == 1, e, tl.log(one) * (e / (one - 1))))
    if BY_HEAD:
        rates = tl.load(A_ptr + d // per, mask=mask, other=0.0)[:, None]
    else:
        rates = tl.load(A_ptr + d[:, None].to(tl.int64) * N + n, mask=there, other=0.0)
    into = tl.load(B_ptr + b * stride_b + (d // per_b)[:, None] * stride_b_group + n, mask=there, other=0.0).to(dtype)
    out = tl.load(C_ptr + b * stride_c + (d // per_c)[:, None] * stride_c_group + n, mask=there, other=0.0).to(dtype)
    h = tl.exp(dt[:, None] * rates) * tl.load(state_ptr + at, mask=there, other=0.0) + (dt * x)[:, None] * into
    tl.store(after_ptr + at, h, mask=there)
    y = tl.sum(h * out, 1)
    if D_ptr is not None:
        y += tl.load(D_ptr + d, mask=mask, other=0.0).to(dtype) * x
    if z_ptr is not None:
        gate = tl.load(z_ptr + b * stride_z + d, mask=mask, other=0.0).to(dtype)
        y *= gate / (1 + tl.exp(-gate))
    tl.store(y_ptr + b * width + d, y.to(y_ptr.dtype.element_ty), mask=mask)
