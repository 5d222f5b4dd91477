"""A linear map with weights of 8 bits on a CPU: of a few rows by a kernel, of more by PyTorch's product."""

import torch
from torch import Tensor

from dualform.core.int8 import dequantize
from dualform.core.shapes import wide
from dualform.ops.linear import FEW
from dualform.ops.native import library
from dualform.ops.native.library import readable
from dualform.ops.native.linear import cannot_read, product
from dualform.ops.op import Backend
from dualform.ops.quantized_linear import QuantizedLinear, quantized_linear_op

_SPAN = 2**22  # weights that are made float32 at a time


def _forward(a: QuantizedLinear) -> list[Tensor]:
    x, weight, scales = readable(a.x), a.weight.contiguous(), a.scales.contiguous()
    if len(x) > FEW or x.dtype == torch.float64:
        return [_by_library(x, weight, scales, a.group, a.bias)]
    return [product(x, weight, a.bias, scales=scales, group=a.group)]


def _by_library(x: Tensor, weight: Tensor, scales: Tensor, group: int, bias: Tensor | None) -> Tensor:
    """Of many rows, whose arithmetic takes the time, and of doubles: some outputs after others."""
    dtype, outputs = wide(x), max(1, _SPAN // max(1, weight.shape[1]))
    y, x = x.new_empty(x.shape[0], weight.shape[0]), x.to(dtype)
    for at in range(0, len(weight), outputs):
        some = slice(at, at + outputs)
        made = x @ dequantize(weight[some], scales[some], group, dtype).T
        y[:, some] = made if bias is None else made + bias[some].to(dtype)
    return y


quantized_linear_op.add(Backend("native", _forward, devices=("cpu",), refuses=cannot_read, missing=library.why_missing))
