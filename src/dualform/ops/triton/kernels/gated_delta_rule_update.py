"""One step of the gated delta rule, in one pass over its state."""

import triton
import triton.language as tl

from dualform.ops.triton.kernels.step import table_row


@triton.jit
def gated_delta_rule_update(
    state_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    beta_ptr,
    log_ptr,
    y_ptr,
    after_ptr,
    rows_ptr,
    R,
    heads,
    per_group,
    stride_state,
    stride_q,
    stride_k,
    stride_v,
    stride_after,
    CHANNELS: tl.constexpr,
    TABLE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    NP: tl.constexpr,
    BP: tl.constexpr,
    scale: tl.constexpr,
    dtype: tl.constexpr,
):
    """``BP`` columns of a head of a row.

    Rows are found by ``rows_ptr``, if there is one, in the state and, with ``TABLE``, in what comes after. A logarithm
    belongs to a head or, with ``CHANNELS``, to a key channel.
    """
    blocks: tl.constexpr = (P + BP - 1) // BP
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    h, b = rest % heads, (rest // heads).to(tl.int64)
    n, p = tl.arange(0, NP), block * BP + tl.arange(0, BP)
    mask = (n[:, None] < N) & (p[None, :] < P)
    row, read, write = b, mask, mask
    if rows_ptr is not None:
        row, there, blank = table_row(rows_ptr, b, R)
        read = mask & there
    after_row = b
    if TABLE:
        after_row, write = row, read
    inner = (h * N + n[:, None]) * P + p[None, :]
    state = tl.load(state_ptr + row * stride_state + inner, mask=read, other=0.0).to(dtype)
    head = b * heads + h
    if log_ptr is not None:
        if CHANNELS:
            decay = tl.exp(tl.load(log_ptr + head * N + n, mask=n < N, other=0.0).to(dtype))
            state *= decay[:, None]
        else:
            state *= tl.exp(tl.load(log_ptr + head).to(dtype))
    group = h // per_group * N + n
    k = tl.load(k_ptr + b * stride_k + group, mask=n < N, other=0.0).to(dtype)
    v = tl.load(v_ptr + b * stride_v + h * P + p, mask=p < P, other=0.0).to(dtype)
    written = tl.load(beta_ptr + head).to(dtype) * (v - tl.sum(k[:, None] * state, 0))
    state += k[:, None] * written[None, :]
    q = tl.load(q_ptr + b * stride_q + group, mask=n < N, other=0.0).to(dtype)
    y = tl.sum(q[:, None] * state, 0) * scale
    if rows_ptr is not None:
        y, state = tl.where(there, y, blank.to(dtype)), tl.where(there, state, blank.to(dtype))
    tl.store(y_ptr + head * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)
    tl.store(after_ptr + after_row * stride_after + inner, state.to(after_ptr.dtype.element_ty), mask=write)
