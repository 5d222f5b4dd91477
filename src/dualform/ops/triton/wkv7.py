"""RWKV-7's recurrence in Triton: what a chunk does to a state, states from chunk to chunk, then all chunks at once."""

from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from dualform.ops.layout import inner_contiguous
from dualform.ops.triton.support import (
    INTERPRETED,
    add_backend,
    blocks,
    exact_products,
    kernels,
    power_of_two,
    table_of_chunks,
)
from dualform.ops.wkv7 import WKV7, wkv7_op

_CHUNK = 16  # steps of a triangular system
_VALUES, _KEYS = 32, 32  # channels of one program that passes states on, and that finds gradients
_LEAST, _MOST = 16, 64  # rows and columns of a matrix product, channels of a head
_WARPS = {"prepare": 2, "states": 4, "outputs": 4, "read_gradients": 2, "gradients": 2}


def _side(size: int) -> int:
    """Of a matrix in a product."""
    return max(_LEAST, power_of_two(size))


def _dtype(given: WKV7) -> torch.dtype:
    """That of matrix products."""
    return reduce(torch.promote_types, (m.dtype for m in (given.r, given.k, given.v, given.a, given.b)))


def _slots(given: WKV7) -> int:
    """How many chunks there may be; no chunk crosses a border."""
    length = given.r.shape[1]
    return blocks(length, _CHUNK) if given.packing is None else length // _CHUNK + given.packing.rows


class _Plan:
    """How a call is cut, and what all of its kernels are told."""

    def __init__(self, given: WKV7):
        self.dtype = _dtype(given)
        self.inputs = [self.given(m, m.dtype if m is given.log_decay else self.dtype) for m in given[:6]]
        (self.batch, self.length, self.heads, states), width = given.r.shape, given.v.shape[3]
        self.slots = _slots(given)
        self.table = None if given.packing is None else table_of_chunks(given.packing, self.slots, _CHUNK)
        self.chunks = self.batch * self.slots * self.heads
        self.sizes = {"length": self.length, "heads": self.heads, "slots": self.slots}
        self.flags = {"N": states, "P": width, "NP": _side(states), "Q": _CHUNK}
        number = getattr(kernels("wkv7").tl, str(given.h0.dtype)[6:])
        self.number = {"dtype": number}
        self.solving = {"LEVELS": _CHUNK.bit_length() - 1, "EXACT": exact_products(), **self.number}

    def given(self, m: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
        """A tensor for a kernel, and its strides along the batch and along time."""
        m = inner_contiguous(m.to(dtype), 2)
        return m, m.stride(0), m.stride(1)

    def launch(self, name: str, *tensors: Any, **flags: Any) -> None:
        """Run a kernel: of states from chunk to chunk, all others on every chunk of every head by itself."""
        programs, flags = self.chunks, {"BP": _side(self.flags["P"]), **flags}
        if name == "states":
            programs, flags["BP"] = self.batch * self.heads * blocks(self.flags["P"], _VALUES), _VALUES
        elif name == "gradients":
            flags["BN"] = min(_KEYS, self.flags["NP"])
            programs *= self.flags["NP"] // flags["BN"]
        kernel = getattr(kernels("wkv7"), name)
        kernel[(programs,)](*tensors, **self.sizes, **self.flags, **flags, num_warps=_WARPS[name])


def _run(keep: bool, given: WKV7) -> list[Tensor]:
    y, final = given.v.new_empty(given.v.shape), given.h0.clone(memory_format=torch.contiguous_format)
    kept = _saved(given)
    if given.r.numel() == 0 or y.numel() == 0:
        y.zero_()
        return [y, final, *(kept if keep else [])]
    plan, (decay, matrix, seen, entering) = _Plan(given), kept
    added, own = torch.empty_like(entering), given.v.new_empty(given.v.shape, dtype=given.h0.dtype)
    plan.launch("prepare", *plan.inputs, plan.table, decay, matrix, added, seen, own, **plan.solving)
    start = given.h0.contiguous()
    plan.launch(
        "states", decay, matrix, added, seen, plan.inputs[3], plan.table, start, entering, final, BACKWARD=False
    )
    plan.launch("outputs", seen, own, plan.table, entering, y)
    return [y, final, *(kept if keep else [])]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(given: WKV7) -> list[Tensor]:
    """Of every chunk its decays and its matrix, of every step what sees a state, and the states that enter chunks."""
    (batch, _, heads, states), new = given.r.shape, given.h0.new_empty
    each, dtype = (batch, _slots(given), heads, states), _dtype(given)
    return [
        new(each),
        new(*each, states, dtype=dtype),
        new(given.r.shape, dtype=dtype),
        new(*each, given.v.shape[3], dtype=dtype),
    ]


def _backward(grads: list[Tensor], kept: list[Tensor], given: WKV7) -> dict[str, Tensor]:
    dstart = grads[1].clone(memory_format=torch.contiguous_format)  # an empty sequence passes it on
    names = given._fields[:6]
    if given.r.numel() == 0 or grads[0].numel() == 0:
        return {**{name: torch.zeros_like(getattr(given, name)) for name in names}, "h0": dstart}
    plan, (decay, matrix, seen, entering) = _Plan(given), kept
    dy, leaving = plan.given(grads[0], plan.dtype), torch.empty_like(entering)
    found = {name: m.new_empty(m.shape) for name, m in zip(names, given[:6], strict=True)}
    ending, dv = grads[1].contiguous(), found.pop("v")
    plan.launch("states", decay, matrix, None, seen, dy, plan.table, ending, leaving, dstart, BACKWARD=True)
    of_all = (*plan.inputs, dy, plan.table, entering, leaving)
    of_read, dread = (given.v.new_empty(given.v.shape, dtype=plan.dtype) for _ in range(2))
    plan.launch("read_gradients", *of_all, of_read, dread, dv, **plan.solving)
    plan.launch("gradients", *of_all, of_read, dread, *found.values(), **plan.number)
    return {**found, "v": dv, "h0": dstart}


def _refuses(given: WKV7) -> str | None:
    states, width = given.h0.shape[2:]
    if not INTERPRETED and (_dtype(given).itemsize > 2 or given.h0.dtype == torch.float64):
        return (
            f"r, k, v, a and b are {_dtype(given)} and the state is {given.h0.dtype}; its matrix products are those of "
            "bfloat16 or float16, with a state in float32"
        )
    if width > _MOST or states > _MOST:
        return f"N x P is {states} x {width}, expected at most {_MOST} x {_MOST}"
    return None


add_backend(wkv7_op, products=True, forward=_forward, backward=_backward, infer=_infer, saved=_saved, refuses=_refuses)
