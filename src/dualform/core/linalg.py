"""Numbers into tensors, and operations on matrices: products, symmetric parts, powers, balancing, exponentials."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.options import brief
from dualform.core.shapes import wide

_SWEEPS = 20  # of the balancing iteration


def as_tensors(where: str, **values: Any) -> dict[str, Tensor]:
    """Array-likes as tensors of one floating dtype, float32 or wider, on one device.

    The dtype is the widest among the floating tensors and NumPy arrays. Python numbers, lists and integers of any kind
    take that dtype; where there is no floating tensor or array, everything becomes float64 (or complex128). Tensors
    decide the device. A masked value of ``numpy.ma`` is missing, and so is a None among numbers: they become NaN.

    Raises:
        ArgumentError: names a value that is not numeric, lists of different lengths where equal ones are expected, or
            two tensors on different devices.
    """
    made = {name: _tensor(where, name, value) for name, value in values.items()}
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    device = tensors[0].device if tensors else None
    for name, value in values.items():
        if isinstance(value, Tensor) and value.device != device:
            raise ArgumentError(
                f"{where}: {name} is on {value.device}, other tensors are on {device}",
                hint=f"move it: {name}.to({str(device)!r})",
            )
    floating = {name: value for name, value in made.items() if value.is_floating_point() or value.is_complex()}
    deciding = [value for name, value in floating.items() if hasattr(values[name], "dtype")]
    dtype = wide(*deciding) if deciding else torch.float64
    if any(value.is_complex() for value in floating.values()):
        dtype = dtype.to_complex()
    return {name: value.to(device=device, dtype=dtype) for name, value in made.items()}


def check_finite(where: str, tensors: Mapping[str, Tensor], hint: str = "") -> None:
    """Every element must be finite. Values are not read on the meta device, nor while a graph is compiled.

    Raises:
        ArgumentError: names the tensor, its first element that is NaN or infinite, and where that is.
    """
    for name, tensor in tensors.items():
        refuse(where, name, tensor, ~tensor.detach().isfinite(), "has values that are not finite", hint)


def refuse(where: str, name: str, tensor: Tensor, wrong: Tensor, what: str, hint: str = "") -> None:
    """Raise where a mask of the tensor's shape marks an element as wrong.

    The mask is not read on the meta device, nor while a graph is compiled.

    Raises:
        ArgumentError: names the tensor, what is wrong with it, and the first such element with its place.
    """
    if tensor.device.type == "meta" or torch.compiler.is_compiling() or not wrong.any():
        return
    place = tuple(wrong.nonzero()[0].tolist())
    at = f" at {place[0] if len(place) == 1 else place}" if place else ""
    raise ArgumentError(f"{where}: {name} {what}: {tensor[place].item():g}{at}", hint=hint)


def _tensor(where: str, name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if value is None:
        raise ArgumentError(f"{where}: {name} is None, expected numbers")
    try:
        return torch.from_numpy(_array(value))
    except (TypeError, ValueError, RuntimeError) as error:
        if ragged := _ragged(name, value):
            raise ArgumentError(f"{where}: {ragged}", hint="NaN stands for a missing number; pad with it") from None
        raise ArgumentError(f"{where}: {name} is not a numeric array ({error})") from error


def _ragged(name: str, value: Any) -> str:
    """The first places of nested lists where lengths differ, in words; empty where there are none."""
    if not isinstance(value, list | tuple) or not value:
        return ""
    for i, part in enumerate(value):
        if inner := _ragged(f"{name}[{i}]", part):
            return inner
    for i, part in enumerate(value):
        if _extent(part) != _extent(value[0]):
            return f"{name} is ragged: {name}[0] {_said(value[0])}, but {name}[{i}] {_said(part)}"
    return ""


def _extent(value: Any) -> tuple[int, ...]:
    """The shape of a list that is not ragged, or of an array."""
    if isinstance(value, list | tuple):
        return (len(value), *(_extent(value[0]) if value else ()))
    return np.shape(value) if hasattr(value, "shape") else ()


def _said(value: Any) -> str:
    return f"has shape {shape}" if (shape := _extent(value)) else f"is {brief(value)}"


def _array(value: Any) -> np.ndarray:
    """A new array; NaN where the value, or an array inside of a list, is masked."""
    if isinstance(value, np.ma.MaskedArray):
        plain = np.array(value.data)
        if not value.mask.any():
            return plain
        plain = plain if plain.dtype.kind in "fc" else plain.astype(np.float64)
        plain[value.mask] = np.nan
        return plain
    if isinstance(value, list | tuple) and _holds_masked(value):
        return np.array([_array(part) for part in value])
    made = np.array(value)
    if made.dtype.kind not in "biufcO":
        raise TypeError(f"it holds {made.dtype.name}")
    return made.astype(np.float64) if made.dtype == object else made  # where None becomes NaN


def _holds_masked(values: Iterable[Any]) -> bool:
    return any(
        isinstance(value, np.ma.MaskedArray) or (isinstance(value, list | tuple) and _holds_masked(value))
        for value in values
    )


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """``(..., M, N)`` times ``(..., N)`` -> ``(..., M)``."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def symmetric_part(matrix: Tensor) -> Tensor:
    """``(X + X^T) / 2`` of ``(..., N, N)``, which is X itself where N is 1."""
    return matrix if matrix.shape[-1] == 1 else (matrix + matrix.mT) / 2


def covariance_root(S: Tensor) -> tuple[Tensor, Tensor]:
    """L with ``L L^T = S`` of ``(..., M, M)``, and where there is none (not 0), without a word: the root of a number.

    ``torch.linalg.cholesky_ex``, which on a GPU takes its time for many small matrices.
    """
    if S.shape[-1] != 1:
        return torch.linalg.cholesky_ex(S)
    failed = ~(S > 0)
    return torch.where(failed, 1, S).sqrt(), failed[..., 0, 0].int()


def half_solve(root: Tensor, X: Tensor) -> Tensor:
    """``L^-1 X`` of ``(..., M, M)`` and ``(..., M, K)``."""
    return X / root if root.shape[-1] == 1 else torch.linalg.solve_triangular(root, X, upper=False)


def root_solve(X: Tensor, root: Tensor) -> Tensor:
    """``(L L^T)^-1 X`` of ``(..., M, K)`` and ``(..., M, M)``.

    ``torch.cholesky_solve`` may go through a batch matrix after matrix on a GPU; triangular solves do not.
    """
    if root.shape[-1] == 1:
        return X / root.square()
    if root.device.type == "cpu":
        return torch.cholesky_solve(X, root)
    return torch.linalg.solve_triangular(root.mT, half_solve(root, X), upper=True)


def least_squares(X: Tensor, y: Tensor) -> Tensor:
    """The coefficients ``(..., K)`` of y ``(..., T)`` on columns ``(..., T, K)``, in batches, from their products.

    Directions whose size is below about 1e-6 of the others are left at 0, nearly: what they would add is rounding.
    """
    size = X.square().sum(-2).sqrt()
    size = torch.where(size > 0, size, 1)
    X = X / size.unsqueeze(-2)
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    right = X.mT @ y.unsqueeze(-1)
    solution, _ = torch.linalg.solve_ex(X.mT @ X + 16 * torch.finfo(X.dtype).eps ** 0.75 * eye, right)
    return solution.squeeze(-1) / size


def orbit(A: Tensor, X: Tensor, count: int) -> Tensor:
    """``A^k X`` for ``k < count``, ``(count, N, columns)``, by doubling."""
    out, power = X[None], A
    while len(out) < count:
        out = torch.cat([out, power @ out])
        power = power @ power if len(out) < count else power
    return out[:count]


def balancing(X: Tensor) -> Tensor:
    """Powers of two ``d`` ``(..., N)`` that make ``diag(d)^-1 X diag(d)`` smaller in the 1-norm, or ones.

    They undo a choice of units: row k and column k become alike in size. Osborne's iteration, applied to all k at
    once; the square root of its factor keeps two neighbours from overshooting. Not differentiated.

    References:
        Osborne (1960), "On pre-conditioning of matrices"; Parlett and Reinsch (1969), "Balancing a matrix for
        calculation of eigenvalues and eigenvectors".
    """
    size = X.detach().abs()
    diagonal = torch.diag_embed(size.diagonal(dim1=-2, dim2=-1))
    now, exponent = size - diagonal, torch.zeros_like(size[..., 0])
    for _ in range(_SWEEPS):
        rows, columns = now.sum(-1), now.sum(-2)
        both = (rows > 0) & (columns > 0)
        change = torch.where(both, (rows.log2() - columns.log2()) / 4, torch.zeros_like(rows))
        exponent = exponent + change
        now = now * torch.exp2(change.unsqueeze(-2) - change.unsqueeze(-1))
    exponent = exponent.round()
    balanced = size * torch.exp2(exponent.unsqueeze(-2) - exponent.unsqueeze(-1))
    better = _norm(balanced) < _norm(size)
    return torch.where(better.unsqueeze(-1), torch.exp2(exponent), torch.ones_like(exponent))


def matrix_exp(X: Tensor, *, driven: int = 0) -> Tensor:
    """``exp(X)`` of ``(..., N, N)``, computed in double precision, to its last digits.

    Scaling and squaring with 15 terms of Taylor's series. ``torch.linalg.matrix_exp`` keeps only 4 digits in float32,
    and in float64 10 where the norm is just below 0.05. Each squaring doubles the relative error of what is squared.
    So that is ``exp(X) - I``, in which slow modes keep their digits, ``(I + E)^2 - I = 2 E + E E``; and there are only
    as many squarings as the norm of a balanced X asks for.

    Args:
        X: the matrices.
        driven: for a block matrix ``[[A, B], [0, J]]`` with a nilpotent J, the size of J. The result depends on B
            linearly, so that A alone decides the number of squarings, however large B is.

    References:
        Moler and Van Loan (2003), "Nineteen dubious ways to compute the exponential of a matrix", method 3, and
        Al-Mohy and Higham (2009), "A new scaling and squaring algorithm for the matrix exponential", on squaring
        more often than needed.
    """
    device = "cpu" if X.device.type == "mps" else X.device  # which has no double precision
    wide = X.to(device).to(torch.complex128 if X.is_complex() else torch.float64)
    n = X.shape[-1] - driven
    A = wide.detach()[..., :n, :n]
    d = balancing(A)
    size = _norm(A * d.unsqueeze(-2) / d.unsqueeze(-1))
    squarings = torch.where((size > 0.5) & size.isfinite(), size.log2().ceil() + 1, torch.zeros_like(size))
    squarings = squarings[..., None, None]
    change = small_expm1(wide * torch.exp2(-squarings))
    eye = torch.eye(X.shape[-1], dtype=wide.dtype, device=device)
    for k in range(int(squarings.max()) if squarings.numel() else 0):
        change = torch.where(k < squarings, 2 * change + change @ change, change)
    return (eye + change).to(X.dtype).to(X.device)


def small_expm1(X: Tensor) -> Tensor:
    """``exp(X) - I`` of ``(..., N, N)`` with a norm of at most 1/2, or nilpotent, by 15 terms of Taylor's series."""
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    series = eye + X / 15
    for k in range(14, 1, -1):
        series = eye + X @ series / k
    return X @ series


def _norm(X: Tensor) -> Tensor:
    """The 1-norm ``(...)``: the greatest sum of a column."""
    return X.abs().sum(-2).amax(-1) if X.shape[-1] else X.new_zeros(X.shape[:-2]).abs()
