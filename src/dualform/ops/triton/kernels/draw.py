"""The largest number of each row, in two kernels: of parts of the row, then of the parts."""

import triton
import triton.language as tl

from dualform.ops.triton.kernels.early import wait_for_the_kernel_before


@triton.jit
def _first_of_the_largest(values, places, LAST: tl.constexpr):
    """The largest value, where it is first, and whether it is finite; NaN is larger than all."""
    blank = values != values
    largest = tl.max(tl.where(blank, float("inf"), values), 0)
    broken = tl.max(blank.to(tl.int32), 0)
    wanted = tl.where(broken > 0, blank, values == largest)
    return tl.where(broken > 0, float("nan"), largest), tl.min(tl.where(wanted, places, LAST), 0)


@triton.jit
def parts(x_ptr, values_ptr, places_ptr, width, stride, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """Of ``BLOCK`` numbers of a row."""
    if EARLY:
        wait_for_the_kernel_before()
    part, row, number = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    at = part * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x_ptr + row * stride + at, mask=at < width, other=float("-inf")).to(tl.float32)
    value, place = _first_of_the_largest(values, at, width - 1)
    tl.store(values_ptr + row * number + part, value)
    tl.store(places_ptr + row * number + part, place)


@triton.jit
def whole(values_ptr, places_ptr, found_ptr, stride, number, last, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row: the place, and whether the value is finite."""
    if EARLY:
        wait_for_the_kernel_before()
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = part < number
    values = tl.load(values_ptr + row * number + part, mask=mask, other=float("-inf"))
    places = tl.load(places_ptr + row * number + part, mask=mask, other=0)
    value, place = _first_of_the_largest(values, tl.where(mask, places, last), last)
    tl.store(found_ptr + row, place.to(tl.int64))
    tl.store(found_ptr + stride + row, (tl.abs(value) < float("inf")).to(tl.int64))
