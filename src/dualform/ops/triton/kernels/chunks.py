"""Chunks of time: where each lies, and how its steps and the states of a head are read and written."""

import triton
import triton.language as tl


@triton.jit
def chunk(table_ptr, c, b, length, Q: tl.constexpr):
    """Where chunk c lies, its sequence, and whether it is the first and the last one of that."""
    begin = c * Q
    end, row = tl.minimum(begin + Q, length), b
    first, last = c == 0, end == length
    if table_ptr is not None:
        begin, end = tl.load(table_ptr + 4 * c), tl.load(table_ptr + 4 * c + 1)
        row, flags = tl.load(table_ptr + 4 * c + 2), tl.load(table_ptr + 4 * c + 3)
        first, last = flags % 2 == 1, flags // 2 == 1
    return begin, end, row, first, last


@triton.jit
def read(tensor, b, begin, first, size: tl.constexpr, inside, width):
    """Steps from ``begin`` of a tensor, ``width`` columns from ``first``; in 32 bits within a chunk."""
    base = tensor[0] + tl.cast(b, tl.int64) * tensor[1] + tl.cast(begin, tl.int64) * tensor[2] + first
    column = tl.arange(0, size)
    at = tl.arange(0, inside.shape[0])[:, None] * tl.cast(tensor[2], tl.int32) + column[None, :]
    return tl.load(base + at, mask=inside[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def write(ptr, first, stride, x, inside, width):
    """Steps of a chunk to rows ``stride`` apart, the first number of which is ``first``."""
    column = tl.arange(0, x.shape[1])
    at = tl.arange(0, x.shape[0])[:, None] * stride + column[None, :]
    tl.store(ptr + first + at, x.to(ptr.dtype.element_ty), mask=inside[:, None] & (column < width)[None, :])


@triton.jit
def states_at(ptr, row, heads, h, p, n, P: tl.constexpr, N: tl.constexpr):
    """The states of a head ``(P, N)``: pointers and mask."""
    base = ptr + (tl.cast(row, tl.int64) * heads + h) * P * N
    return base + (p[:, None] * N + n[None, :]), (p[:, None] < P) & (n[None, :] < N)


@triton.jit
def load_state(ptr, row, heads, h, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, NP: tl.constexpr):
    """All states of a head."""
    at, there = states_at(ptr, row, heads, h, tl.arange(0, BP), tl.arange(0, NP), P, N)
    return tl.load(at, mask=there, other=0.0)
