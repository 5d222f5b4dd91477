"""A linear map of a few rows on a CPU."""

from typing import Any

from torch import Tensor

from dualform.core.shapes import wide
from dualform.ops.linear import Linear, linear_op
from dualform.ops.native import library
from dualform.ops.native.library import readable
from dualform.ops.native.structs import DTYPES, LINEAR
from dualform.ops.op import Backend


def _forward(a: Linear) -> list[Tensor]:
    return [product(readable(a.x), readable(a.weight), a.bias)]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, **quantized: Tensor | int) -> Tensor:
    """``W x + b`` for each row of x, in the dtype of x.

    Args:
        x: ``(B, D)``, readable.
        weight: ``(F, D)``, readable or of 8 bits.
        bias: ``(F,)``, or None.
        quantized: of a weight of 8 bits the ``scales``, contiguous, and their ``group``.
    """
    dtype, y = wide(x), x.new_empty(x.shape[0], weight.shape[0])
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
            **quantized,
        )
    return y


def cannot_read(a: Any) -> str | None:
    """Why kernels cannot read the rows x of a record, or None."""
    return None if a.x.dtype in DTYPES else f"it cannot read {a.x.dtype}"


linear_op.add(Backend("native", _forward, devices=("cpu",), refuses=cannot_read, missing=library.why_missing))
