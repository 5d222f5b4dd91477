"""Steps of whole blocks on a CPU: one call for each, or for several, which reads the weights at the memory's speed."""

from collections.abc import Sequence
from struct import unpack
from typing import Any

import torch
from torch import Tensor

from dualform.ops.lti_step import LtiStep, lti_step_op
from dualform.ops.mamba2_step import Mamba2Step, mamba2_step_op
from dualform.ops.mamba_step import MambaStep, mamba_step_op
from dualform.ops.native import library
from dualform.ops.native.structs import LTI_STEP, MAMBA2_STEP, MAMBA_STEP, MATRICES, STEPS_OF_BLOCKS
from dualform.ops.op import Backend

Record = MambaStep | Mamba2Step | LtiStep


def _states(a: Record) -> list[Tensor]:
    return [a.h] if isinstance(a, LtiStep) else [a.conv, a.h]


def _run(a: Record) -> list[Tensor]:
    states = _states(a)
    there = a.in_place and all(m.is_contiguous() and not m.is_conj() for m in states)
    out = [a.x.new_empty(a.x.shape), *(m if there else m.new_empty(m.shape) for m in states)]
    if out[0].numel() > 0:
        name, structure, of = _KERNELS[type(a)]
        library.call(name, structure, **of(a), **_shared(a, *out))
    return out


class Program:
    """Steps of blocks, one after the other in one call, which write the stream and the states in place.

    Args:
        records: of the steps, checked; they share one stream x, and their tensors are contiguous.
    """

    def __init__(self, records: Sequence[Record]):
        self._x, self._threads = records[0].x, torch.get_num_threads()
        self._kept = [{**_KERNELS[type(a)][2](a), **_shared(a, a.x, *_states(a))} for a in records]
        packed = [
            _KERNELS[type(a)][1].pack(threads=self._threads, **fields)
            for a, fields in zip(records, self._kept, strict=True)
        ]
        self._words = [torch.tensor(unpack(f"{len(one) // 8}q", one)) for one in packed]
        self._steps = torch.tensor([words.data_ptr() for words in self._words])
        self._kinds = torch.tensor([list(_KERNELS).index(type(a)) for a in records])

    def fits(self, rows: int) -> bool:
        """Whether it is of so many rows, and of as many threads as are wanted now."""
        return self._x.shape[0] == rows and self._threads == torch.get_num_threads()

    def run(self, x: Tensor) -> Tensor:
        """The stream behind the last block, given that before the first."""
        self._x.copy_(x)
        if x.numel() > 0:
            library.call("steps", STEPS_OF_BLOCKS, count=len(self._steps), kinds=self._kinds, steps=self._steps)
        return self._x.clone()


def _of_mamba(a: MambaStep) -> dict[str, Any]:
    return {
        "matrices": a.in_weight.dtype,
        "width": a.h.shape[1],
        "states": a.h.shape[2],
        "rank": a.steps.shape[1],
        "maps": _dense(a.maps),
        "steps": _dense(a.steps),
        **_convolved(a),
        "maps_scales": _dense(a.maps_scales),
        "steps_scales": _dense(a.steps_scales),
    }


def _of_mamba2(a: Mamba2Step) -> dict[str, Any]:
    return {
        "matrices": a.in_weight.dtype,
        "heads": a.h.shape[1],
        "width": a.h.shape[2],
        "states": a.h.shape[3],
        "groups": a.groups,
        "norm_before_gate": a.norm_before_gate,
        "gate_eps": a.gate_eps,
        "low": a.low,
        "high": a.high,
        "gate": _dense(a.gate),
        **_convolved(a),
    }


def _convolved(a: MambaStep | Mamba2Step) -> dict[str, Any]:
    return {
        "taps": a.conv_weight.shape[1],
        "group": a.group,
        "in_scales": _dense(a.in_scales),
        "out_scales": _dense(a.out_scales),
        "conv": a.conv.contiguous(),
        "in_weight": _dense(a.in_weight),
        "in_bias": _dense(a.in_bias),
        "conv_weight": _dense(a.conv_weight),
        "conv_bias": _dense(a.conv_bias),
        "dt_bias": _dense(a.dt_bias),
        "a": _dense(a.A),
    }


def _of_lti(a: LtiStep) -> dict[str, Any]:
    b = torch.view_as_real(a.b.resolve_conj())
    return {
        "matrices": a.out_weight.dtype,
        "states": a.a.shape[-1],
        "shared": a.shared,
        "gate": a.gate,
        "a": torch.view_as_real(a.a.resolve_conj()).contiguous(),
        "b": (b.transpose(1, 2) if a.shared else b).contiguous(),
        "c": torch.view_as_real(a.C.conj().resolve_conj()).contiguous(),
    }


# The function, the structure and its own fields, in the order of the enumeration of the header.
_KERNELS: dict[Any, Any] = {
    MambaStep: ("mamba_step", MAMBA_STEP, _of_mamba),
    Mamba2Step: ("mamba2_step", MAMBA2_STEP, _of_mamba2),
    LtiStep: ("lti_step", LTI_STEP, _of_lti),
}


def _shared(a: Record, y: Tensor, *states: Tensor) -> dict[str, Any]:
    """The fields of all structures, and the outputs."""
    *conv, h = states
    return {
        "dtype": a.x.dtype,
        "rows": a.x.shape[0],
        "features": a.x.shape[1],
        "eps": a.eps,
        "x": a.x.contiguous(),
        "h": a.h.resolve_conj().contiguous(),
        "norm": _dense(a.norm),
        "d": _dense(a.D),
        "out_weight": _dense(a.out_weight),
        "out_bias": _dense(a.out_bias),
        "y": y,
        "next_h": h,
        **({"next_conv": conv[0]} if conv else {}),
    }


def _dense(m: Tensor | None) -> Tensor | None:
    return None if m is None else m.contiguous()


def _refuses(a: Record) -> str | None:
    if a.h.dtype.to_real() != a.x.dtype:
        return f"the states are {a.h.dtype}, beside {a.x.dtype}"
    dtype = a.out_weight.dtype
    return None if dtype in MATRICES else f"it cannot read {dtype}"


for _op in (mamba_step_op, mamba2_step_op, lti_step_op):
    _op.add(Backend("native", _run, devices=("cpu",), refuses=_refuses, missing=library.why_missing))
