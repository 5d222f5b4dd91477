"""Small helpers around matrices: array-likes in, matrix times vector, symmetric parts, powers, exponentials."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import wide


def as_tensors(where: str, **values: Any) -> dict[str, Tensor]:
    """Array-likes as tensors of one floating dtype, float32 or wider, on one device.

    Tensors and NumPy arrays decide the dtype (the widest of theirs) and tensors the device; Python numbers and
    lists follow them, without rounding through float32. Where nothing decides, PyTorch's defaults do.

    Raises:
        ArgumentError: names a value that is not numeric, or two tensors on different devices.
    """
    typed = {name: _tensor(where, name, value) for name, value in values.items() if hasattr(value, "dtype")}
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    device = tensors[0].device if tensors else None
    for name, value in values.items():
        if isinstance(value, Tensor) and value.device != device:
            raise ArgumentError(
                f"{where}: {name} is on {value.device}, other tensors are on {device}",
                hint=f"move it: {name}.to({str(device)!r})",
            )
    dtype = wide(*typed.values()) if typed else torch.get_default_dtype()
    return {
        name: (typed[name] if name in typed else _tensor(where, name, value)).to(device=device, dtype=dtype)
        for name, value in values.items()
    }


def _tensor(where: str, name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{where}: {name} is not a numeric array ({error})") from error


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """``(..., M, N)`` times ``(..., N)`` -> ``(..., M)``."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def symmetric_part(matrix: Tensor) -> Tensor:
    """``(X + X^T) / 2`` of ``(..., N, N)``."""
    return (matrix + matrix.mT) / 2


def orbit(A: Tensor, X: Tensor, count: int) -> Tensor:
    """``A^k X`` for ``k < count``, ``(count, N, columns)``, by doubling."""
    out, power = X[None], A
    while len(out) < count:
        out = torch.cat([out, power @ out])
        power = power @ power if len(out) < count else power
    return out[:count]


def matrix_exp(X: Tensor) -> Tensor:
    """``exp(X)`` of ``(..., N, N)``, computed in double precision, to its last digits.

    Scaling and squaring with 15 terms of Taylor's series. ``torch.linalg.matrix_exp`` keeps only 4 digits in float32,
    and in float64 10 where the norm is just below 0.05.

    References:
        Moler and Van Loan (2003), "Nineteen dubious ways to compute the exponential of a matrix", method 3.
    """
    device = "cpu" if X.device.type == "mps" else X.device  # which has no double precision
    wide = X.to(device).to(torch.complex128 if X.is_complex() else torch.float64)
    size = float(torch.linalg.matrix_norm(wide.detach(), 1).max()) if wide.numel() else 0.0
    squarings = math.ceil(math.log2(2 * size)) if 0.5 < size < math.inf else 0
    wide = wide / 2**squarings
    eye = torch.eye(X.shape[-1], dtype=wide.dtype, device=device)
    result = eye + wide / 15
    for k in range(14, 0, -1):
        result = eye + wide @ result / k
    for _ in range(squarings):
        result = result @ result
    return result.to(X.dtype).to(X.device)
