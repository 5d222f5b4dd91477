"""Steps of whole blocks on a CPU: one call for each, or for several, which reads the weights at the memory's speed."""

from collections.abc import Callable, Sequence
from struct import unpack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.ops.attention_step import AttentionStep, attention_step_op
from dualform.ops.head_step import HeadStep, head_step_op
from dualform.ops.lti_step import LtiStep, lti_step_op
from dualform.ops.mamba2_step import Mamba2Step, mamba2_step_op
from dualform.ops.mamba_step import MambaStep, mamba_step_op
from dualform.ops.mlp_step import MLPStep, mlp_step_op
from dualform.ops.native import library, structs
from dualform.ops.op import Backend
from dualform.ops.structs import Structure

Record = MambaStep | Mamba2Step | LtiStep | AttentionStep | MLPStep | HeadStep


class _Kernel(NamedTuple):
    """How a record becomes a call."""

    name: str
    structure: Structure
    states: tuple[str, ...]  # the fields of the record that come out anew
    fields: Callable[[Any], dict[str, Any]]  # of the structure, beside those that all have


def _run(a: Record) -> list[Tensor]:
    kernel, states = _KERNELS[type(a)], _states(a)
    in_place = getattr(a, "in_place", False) and all(m.is_contiguous() and not m.is_conj() for m in states)
    after = [m if in_place else m.new_empty(m.shape) for m in states]
    if isinstance(a, AttentionStep) and not in_place:
        after = [m.clone(memory_format=torch.contiguous_format) for m in states]
    y = _output(a)
    if y.numel() > 0:
        library.call(kernel.name, kernel.structure, **_fields(a, y, after))
    return [y, *after]


def _output(a: Record) -> Tensor:
    if isinstance(a, HeadStep):
        return a.x.new_empty(a.x.shape[0], a.out_weight.shape[0], dtype=a.dtype)
    return a.x.new_empty(a.x.shape)


def _states(a: Record) -> list[Tensor]:
    return [getattr(a, name) for name in _KERNELS[type(a)].states]


class Program:
    """Steps of blocks, one after the other in one call, which write the stream and the states in place.

    Args:
        records: of the steps, checked; they share one stream x, and their tensors are contiguous. The last one may be
            that of a head.
    """

    def __init__(self, records: Sequence[Record]):
        self._x, self._threads = records[0].x, torch.get_num_threads()
        self._y = _output(records[-1]) if isinstance(records[-1], HeadStep) else self._x
        self._kept = [_fields(a, self._y if isinstance(a, HeadStep) else a.x, _states(a)) for a in records]
        packed = [
            _KERNELS[type(a)].structure.pack(threads=self._threads, **fields)
            for a, fields in zip(records, self._kept, strict=True)
        ]
        self._words = [torch.tensor(unpack(f"{len(one) // 8}q", one)) for one in packed]
        self._steps = torch.tensor([words.data_ptr() for words in self._words])
        self._kinds = torch.tensor([list(_KERNELS).index(type(a)) for a in records])
        fields = {"threads": self._threads, "count": len(records), "kinds": self._kinds, "steps": self._steps}
        self._call = structs.STEPS_OF_BLOCKS.pack(**fields)

    def fits(self, rows: int) -> bool:
        """Whether it is of so many rows, and of as many threads as are wanted now."""
        return self._x.shape[0] == rows and self._threads == torch.get_num_threads()

    def run(self, x: Tensor) -> Tensor | None:
        """The stream behind the last block, given that before the first, or the logits of the head.

        None where a cache has no slot for one more element: then nothing was done.
        """
        self._x.copy_(x)
        if x.numel() > 0 and not library.call("steps", self._call):
            return None
        return self._y.clone()


def _of_mamba(a: MambaStep) -> dict[str, Any]:
    return {
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
        "conv": a.conv.contiguous(),
        "h": a.h.contiguous(),
        "d": _dense(a.D),
        **_projected(a),
        "conv_weight": _dense(a.conv_weight),
        "conv_bias": _dense(a.conv_bias),
        "dt_bias": _dense(a.dt_bias),
        "a": _dense(a.A),
    }


def _projected(a: MambaStep | Mamba2Step | AttentionStep | MLPStep) -> dict[str, Any]:
    return {
        "group": a.group,
        "in_weight": _dense(a.in_weight),
        "in_bias": _dense(a.in_bias),
        "in_scales": _dense(a.in_scales),
        "out_scales": _dense(a.out_scales),
    }


def _of_lti(a: LtiStep) -> dict[str, Any]:
    b = torch.view_as_real(a.b.resolve_conj())
    return {
        "states": a.a.shape[-1],
        "h": a.h.resolve_conj().contiguous(),
        "d": _dense(a.D),
        "shared": a.shared,
        "gate": a.gate,
        "a": torch.view_as_real(a.a.resolve_conj()).contiguous(),
        "b": (b.transpose(1, 2) if a.shared else b).contiguous(),
        "c": torch.view_as_real(a.C.conj().resolve_conj()).contiguous(),
    }


def _of_attention(a: AttentionStep) -> dict[str, Any]:
    return {
        "caches": a.k.dtype,
        "heads": a.heads,
        "groups": a.k.shape[2],
        "width": a.k.shape[3],
        "values": a.v.shape[3],
        "slots": a.k.shape[1],
        "turned": len(a.frequencies),
        "ring": a.ring,
        "interleaved": a.interleaved,
        "scale": a.factor,
        "softcap": a.softcap,
        "magnitude": a.magnitude,
        "length": a.length.contiguous(),
        "frequencies": _dense(a.frequencies),
        **_projected(a),
    }


def _of_mlp(a: MLPStep) -> dict[str, Any]:
    options = {"gated": a.gated, "activation": a.activation, "factor": a.factor}
    return {"hidden": a.out_weight.shape[1], **options, **_projected(a)}


def _of_head(a: HeadStep) -> dict[str, Any]:
    options = {"factor": a.factor, "cap": a.cap, "group": a.group}
    return {"outputs": a.out_weight.shape[0], **options, "out_scales": _dense(a.out_scales)}


# In the order of the enumeration of the header.
_KERNELS: dict[Any, _Kernel] = {
    MambaStep: _Kernel("mamba_step", structs.MAMBA_STEP, ("conv", "h"), _of_mamba),
    Mamba2Step: _Kernel("mamba2_step", structs.MAMBA2_STEP, ("conv", "h"), _of_mamba2),
    LtiStep: _Kernel("lti_step", structs.LTI_STEP, ("h",), _of_lti),
    AttentionStep: _Kernel("attention_step", structs.ATTENTION_STEP, ("k", "v", "length"), _of_attention),
    MLPStep: _Kernel("mlp_step", structs.MLP_STEP, (), _of_mlp),
    HeadStep: _Kernel("head_step", structs.HEAD_STEP, (), _of_head),
}


def _fields(a: Record, y: Tensor, after: Sequence[Tensor]) -> dict[str, Any]:
    """The fields of a structure, given where the outputs go."""
    kernel = _KERNELS[type(a)]
    made = {name if name in ("k", "v") else f"next_{name}": m for name, m in zip(kernel.states, after, strict=True)}
    return {
        "dtype": a.x.dtype,
        "matrices": getattr(a, "in_weight", a.out_weight).dtype,  # beside 8 bits the others may be floats
        "rows": a.x.shape[0],
        "features": a.x.shape[1],
        "eps": a.eps,
        "x": a.x.contiguous(),
        "norm": _dense(a.norm),
        "out_weight": _dense(a.out_weight),
        "out_bias": _dense(a.out_bias),
        "y": y,
        **kernel.fields(a),
        **made,
    }


def _dense(m: Tensor | None) -> Tensor | None:
    return None if m is None else m.contiguous()


def _refuses(a: Record) -> str | None:
    if isinstance(a, MambaStep | Mamba2Step | LtiStep) and a.h.dtype.to_real() != a.x.dtype:
        return f"the states are {a.h.dtype}, beside {a.x.dtype}"
    dtypes = [a.out_weight.dtype, *([a.k.dtype] if isinstance(a, AttentionStep) else [])]
    unread = next((dtype for dtype in dtypes if dtype not in structs.MATRICES), None)
    return None if unread is None else f"it cannot read {unread}"


for _op in (mamba_step_op, mamba2_step_op, lti_step_op, attention_step_op, mlp_step_op, head_step_op):
    _op.add(Backend("native", _run, devices=("cpu",), refuses=_refuses, missing=library.why_missing))
