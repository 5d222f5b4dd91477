"""The gated delta rule in Triton: a decay of each head, or none, in matrix products of 16-bit numbers."""

from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.ops.gated_delta_rule import GatedDeltaRule, gated_delta_rule_op
from dualform.ops.layout import inner_contiguous
from dualform.ops.triton.support import (
    INTERPRETED,
    add_backend,
    blocks,
    kernels,
    power_of_two,
    table_of_chunks,
)

# Steps of a chunk. With 64, products are Hopper's own instructions, and kernels came out wrong: with Triton 3.6 and 3.7
# copies overwrite what products still read, and NVIDIA's assembler 12.8 reads registers that nothing wrote.
_CHUNK = 32
_LEAST = 16  # rows and columns of a matrix product; half of a chunk
_MOST_KEYS, _MOST_WIDTH = 128, 512
_COLUMNS = {"states": 64, "outputs": 32, "adjoint": 64, "gradients": 32}  # of values, at a time
_WARPS = {"inverses": 2, "states": 4, "outputs": 4, "adjoint": 4, "gradients": 8}
_STAGES = {"states": 2, "adjoint": 2}


def _side(size: int) -> int:
    """Of a matrix in a product."""
    return max(_LEAST, power_of_two(size))


def _slots(a: GatedDeltaRule) -> int:
    """How many chunks there may be; no chunk crosses a border."""
    length = a.q.shape[1]
    return blocks(length, _CHUNK) if a.packing is None else length // _CHUNK + a.packing.rows


def _dtype(a: GatedDeltaRule) -> torch.dtype:
    """That of matrix products."""
    return reduce(torch.promote_types, (a.q.dtype, a.k.dtype, a.v.dtype))


class _Plan:
    """How a call is cut, and what its kernels are told."""

    def __init__(self, a: GatedDeltaRule):
        self.dtype, self.number = _dtype(a), getattr(kernels("gated_delta_rule").tl, str(a.h0.dtype)[6:])
        self.q, self.k, self.v = (self.given(m, 2) for m in (a.q, a.k, a.v))
        log = a.beta.new_zeros(a.beta.shape) if a.log_decay is None else a.log_decay
        self.beta, self.log = self.given(a.beta, 1, a.beta.dtype), self.given(log, 1, log.dtype)
        (self.batch, self.length, self.heads, self.width), self.keys = a.v.shape, a.q.shape[3]
        self.slots, self.table, self.chunks = _slots(a), None, None
        if a.packing is not None:
            self.table = table_of_chunks(a.packing, self.slots, _CHUNK)
            self.chunks = F.pad((-(-a.packing.cu_seqlens.diff() // _CHUNK)).cumsum(0), (1, 0))
        self.rows, self.scale, self.per_group = len(a.h0), a.scale, a.per_group

    def given(self, m: Tensor, inner: int, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        """A tensor for a kernel, and its strides along the batch and along time."""
        m = inner_contiguous(m.to(dtype or self.dtype), inner)
        return m, m.stride(0), m.stride(1)

    def launch(self, name: str, *args: Any, **more: Any) -> None:
        """Run a kernel: one program for each head of a chunk, or for each head of a sequence and some columns."""
        columns = min(_COLUMNS.get(name, _side(self.width)), _side(self.width))
        sizes: dict[str, Any] = {"N": self.keys, "NP": _side(self.keys), "Q": _CHUNK}
        programs = self.batch * self.slots * self.heads
        if name in _COLUMNS:
            sizes |= {"P": self.width, "BP": columns}
        if name in _STAGES:
            programs = self.rows * self.heads * blocks(self.width, columns)
            sizes["STAGES"] = _STAGES[name]
        else:
            sizes["dtype"] = self.number
        getattr(kernels("gated_delta_rule"), name)[(programs,)](
            *args, self.length, self.heads, self.per_group, self.slots, **sizes, **more, num_warps=_WARPS[name]
        )


def _run(keep: bool, a: GatedDeltaRule) -> list[Tensor]:
    y, final = a.v.new_empty(a.v.shape), a.h0.clone(memory_format=torch.contiguous_format)
    kept = _saved(a)
    if y.numel() == 0 or a.h0.numel() == 0:
        return [y.zero_(), final, *(kept if keep else [])]
    plan, (inverse, logs, saved, written, weights) = _Plan(a), kept
    plan.launch("inverses", plan.k, plan.beta, plan.log, plan.table, inverse, logs)
    plan.launch(
        "states", plan.k, plan.v, plan.beta, plan.table, plan.chunks, inverse, logs, a.h0.contiguous(), saved, written,
        final,
    )  # fmt: skip
    plan.launch(
        "outputs",
        plan.q,
        plan.k,
        plan.given(written, 2),
        plan.table,
        logs,
        saved,
        y,
        weights if keep else None,
        scale=plan.scale,
    )
    return [y, final, *(kept if keep else [])]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(a: GatedDeltaRule) -> list[Tensor]:
    """Inverses, sums of logarithms, the states that enter chunks, what every step writes, and the weights of writes."""
    places, dtype = (a.q.shape[0], _slots(a), a.v.shape[2]), _dtype(a)
    return [
        a.v.new_empty(*places, _CHUNK, _CHUNK, dtype=dtype),
        a.h0.new_empty(*places, 2, _CHUNK),
        a.v.new_empty(*places, *a.h0.shape[2:], dtype=dtype),
        a.v.new_empty(a.v.shape, dtype=dtype),
        a.v.new_empty(*places, _CHUNK, _CHUNK, dtype=dtype),
    ]


def _backward(grads: list[Tensor], kept: list[Tensor], a: GatedDeltaRule) -> dict[str, Tensor]:
    dstart = grads[1].clone(memory_format=torch.contiguous_format)  # an empty sequence passes it on
    if a.v.numel() == 0 or a.h0.numel() == 0:
        return {**{f: torch.zeros_like(m) for f, m in a._asdict().items() if isinstance(m, Tensor)}, "h0": dstart}
    plan, (inverse, logs, saved, written, weights) = _Plan(a), kept
    dy, leaving, solved = plan.given(grads[0], 2), torch.empty_like(saved), torch.empty_like(written)
    plan.launch(
        "adjoint", plan.q, plan.k, dy, plan.beta, plan.table, plan.chunks, inverse, weights, logs,
        grads[1].contiguous(),
        leaving, solved, dstart, scale=plan.scale,
    )  # fmt: skip
    shape, dtype = (*a.v.shape[:3], plan.keys), plan.dtype if plan.per_group == 1 else a.h0.dtype
    dq, dk = (a.q.new_empty(shape, dtype=dtype) for _ in range(2))
    dv, dbeta, dlog = a.v.new_empty(a.v.shape), a.beta.new_empty(a.beta.shape), a.h0.new_empty(a.beta.shape)
    plan.launch(
        "gradients", plan.q, plan.k, plan.v, plan.beta, plan.given(written, 2), dy, plan.given(solved, 2), plan.table,
        logs, saved, leaving, dq, dk, dv, dbeta, dlog, scale=plan.scale,
    )  # fmt: skip
    if plan.per_group > 1:
        dq, dk = (m.unflatten(2, (-1, plan.per_group)).sum(3) for m in (dq, dk))
    return {"q": dq, "k": dk, "v": dv, "beta": dbeta, "log_decay": dlog, "h0": dstart}


def _refuses(a: GatedDeltaRule) -> str | None:
    keys, width = a.h0.shape[2:]
    if a.log_decay is not None and a.log_decay.dim() == 4:
        return "log_decay has one decay for each key channel; its kernels have one for each head"
    if _dtype(a).itemsize > 2 and not INTERPRETED:
        return f"q, k and v are {_dtype(a)}; its matrix products are those of bfloat16 or float16"
    if keys > _MOST_KEYS or width > _MOST_WIDTH:
        return f"N x P is {keys} x {width}, expected at most {_MOST_KEYS} x {_MOST_WIDTH}"
    return None


add_backend(
    gated_delta_rule_op,
    products=True,
    forward=_forward,
    backward=_backward,
    infer=_infer,
    saved=_saved,
    refuses=_refuses,
)
