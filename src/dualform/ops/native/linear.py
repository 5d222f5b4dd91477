"""A linear map of a few rows on a CPU."""

from torch import Tensor

from dualform.core.shapes import wide
from dualform.ops.linear import Linear, linear_op
from dualform.ops.native import library
from dualform.ops.native.library import readable
from dualform.ops.native.structs import DTYPES, LINEAR
from dualform.ops.op import Backend


def _forward(a: Linear) -> list[Tensor]:
    dtype = wide(a.x)
    x, weight, bias = readable(a.x), readable(a.weight), a.bias
    y = x.new_empty(x.shape[0], weight.shape[0])
    if y.numel() > 0:
        library.call(
            "linear",
            LINEAR,
            dtype=dtype,
            rows=x.shape[0],
            inputs=x.shape[1],
            outputs=weight.shape[0],
            x=x,
            weight=weight,
            bias=None if bias is None else bias.to(dtype).contiguous(),
            y=y,
        )
    return [y]


def _refuses(a: Linear) -> str | None:
    return None if a.x.dtype in DTYPES else f"it cannot read {a.x.dtype}"


linear_op.add(Backend("native", _forward, devices=("cpu",), refuses=_refuses, missing=library.why_missing))
