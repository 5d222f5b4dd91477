"""The letters of shapes, and the one check that public functions make of their tensors.

    ==  ==========================  ==  =============================
    B   batch                       E   experts
    T   time                        G   groups
    D   features (channels)         K   chunk length, or filter length
    H   heads                       M   observation width
    N   state size                  V   vocabulary
    P   head width                  W   width of a short convolution
    ==  ==========================  ==  =============================

``B`` and ``D`` are sizes in shapes and system matrices in formulas.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_PASSED = 4096  # combinations that a check remembers
_FEW = 16  # values that Python compares faster than an operation does


def once_per_shape(check: Callable[..., None]) -> Callable[..., None]:
    """A check of shapes, dtypes and devices that eager calls run once for each combination of them.

    It may look at nothing else of its tensors. Compilers see the check itself.
    """
    passed: set[Any] = set()

    @wraps(check)
    def remembered(*args: Any) -> None:
        if torch.compiler.is_compiling():
            check(*args)
            return
        key: Any = tuple([(m.shape, m.dtype, m.device) if isinstance(m, Tensor) else m for m in args])
        try:
            known = key in passed
        except TypeError:  # no key: sizes that are symbols, or an argument of a type that the check will refuse
            key, known = None, False
        if known:
            return
        check(*args)
        if len(passed) >= _MOST_PASSED:
            passed.clear()
        if key is not None:
            passed.add(key)

    return remembered


def check_tensors(where: str, **tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """Sizes by letter, after checking that every tensor is a tensor, on one device, and fits its letters.

    Args:
        where: name of the function, first word of every error.
        tensors: ``name=(tensor, "B T D")``; a number instead of a letter is a fixed size, ``*`` any size,
            ``...`` at the end any further axes. With ``?`` first, ``None`` is skipped.

    Raises:
        ArgumentError: names the argument, what came and what was expected.
    """
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    device: tuple[torch.device, str] | None = None
    for name, (tensor, spec) in tensors.items():
        letters = spec.split()
        if letters[:1] == ["?"]:
            if tensor is None:
                continue
            letters = letters[1:]
        rest = bool(letters) and letters[-1] == "..."
        letters = letters[:-1] if rest else letters
        shown = f"({', '.join(letters)}{', ...' if rest else ','[: len(letters) == 1]})"
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{where}: {name} is {type(tensor).__name__}, expected a tensor {shown}")
        if len(letters) > tensor.dim() or (tensor.dim() > len(letters) and not rest):
            raise ArgumentError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, expected {len(letters)} axes {shown}"
            )
        for axis, (letter, size) in enumerate(zip(letters, tensor.shape, strict=False)):
            want = int(letter) if letter.isdigit() else sizes.get(letter)
            if letter == "*" or want == size:
                continue
            if want is None:
                sizes[letter], origin[letter] = size, name
                continue
            source = f" ({letter} of {origin[letter]})" if letter in origin else ""
            raise ArgumentError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, expected {shown}: "
                f"axis {axis} is {size}, not {want}{source}"
            )
        if device is None:
            device = tensor.device, name
        elif tensor.device != device[0]:
            raise ArgumentError(
                f"{where}: {name} is on {tensor.device}, but {device[1]} is on {device[0]}",
                hint=f"move it: {name}.to({str(device[0])!r})",
            )
    return sizes


def check_features(where: str, x: Any, width: int, axes: str = "B T") -> None:
    """That x is a tensor ``(B, T, width)``, or of other axes before the last one.

    Raises:
        ArgumentError: as :func:`check_tensors`.
    """
    if not isinstance(x, Tensor) or x.dim() != axes.count(" ") + 2 or x.shape[-1] != width:
        check_tensors(where, x=(x, f"{axes} {width}"))


def check_floating(where: str, **tensors: Tensor | None) -> None:
    """Every tensor present must be of a floating or complex dtype.

    Raises:
        ArgumentError: names the argument and its dtype.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not (tensor.is_floating_point() or tensor.is_complex()):
            raise ArgumentError(f"{where}: {name} is {tensor.dtype}, expected a floating dtype")


def check_real(where: str, **tensors: Tensor | None) -> None:
    """Every tensor present must be of a real floating dtype: a complex one would lose its imaginary part.

    Raises:
        ArgumentError: names the argument and its dtype.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            kind = "a real" if tensor.is_complex() else "a floating"
            raise ArgumentError(f"{where}: {name} is {tensor.dtype}, expected {kind} dtype")


def check_indices(where: str, name: str, indices: Tensor, below: int, ignored: int = 0, hint: str = "") -> None:
    """Indices must be whole numbers from 0; their values are read where that costs nothing, on the CPU.

    Args:
        where: name of the function, first word of every error.
        name: of the argument.
        indices: of any shape.
        below: the first number that is none.
        ignored: a number that is allowed as well; 0 for no other.
        hint: for the error.

    Raises:
        ArgumentError: names the argument, its dtype or the first number outside.
    """
    if indices.dtype not in (torch.int32, torch.int64):
        hint = hint if indices.is_floating_point() else f"{name}.long()"
        raise ArgumentError(f"{where}: {name} is {indices.dtype}, expected int32 or int64", hint=hint)
    if torch.compiler.is_compiling() or indices.device.type != "cpu" or not indices.numel():
        return
    if indices.numel() <= _FEW and known(indices):
        values = indices.flatten().tolist()  # in a fifth of the time of a reduction
        low, high = min(values), max(values)
    else:
        low, high = map(int, indices.aminmax())
    if low >= 0 and high < below:
        return
    outside = (indices < 0) | (indices >= below)
    if ignored:
        outside &= indices != ignored
    if outside.any():
        raise ArgumentError(f"{where}: {name} holds {int(indices[outside][0])}, expected 0 to {below - 1}", hint=hint)


def known(tensor: Tensor) -> bool:
    """Whether reading values costs nothing: on the CPU, outside of compiled programs and transforms."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]


def check_finite(where: str, **tensors: Tensor) -> None:
    """Every number must be finite; they are read where that costs nothing.

    Raises:
        ArgumentError: names the argument, its row and the first number that is not.
    """
    for name, tensor in tensors.items():
        if known(tensor) and not tensor.isfinite().all():
            at = tensor.isfinite().logical_not().nonzero()[0].tolist()
            raise ArgumentError(
                f"{where}: {name} holds {tensor[tuple(at)].item()} in row {at[0]}, expected finite numbers"
            )


def dtype_of(where: str, dtype: str | torch.dtype, among: Sequence[torch.dtype] = FLOATING) -> torch.dtype:
    """A dtype, or the one of a name such as ``float32``.

    Raises:
        ArgumentError: for one that is not ``among`` those that are expected, and lists them.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in among:
        known = ", ".join(str(d).removeprefix("torch.") for d in among)
        raise ArgumentError(f"{where}: dtype is {dtype}, expected one of {known}")
    return found


def wide(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of states and accumulations: float32, or float64 where an input is; complex where one is."""
    dtype = torch.float32
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dtype is not dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def widest(tensor: Tensor) -> torch.dtype:
    """The widest real dtype where a tensor is: float64, or float32 on a device without it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def larger(a: int, b: int) -> int:
    """The larger of two sizes; of sizes that are symbols, an expression, and no program for either case."""
    return cast("int", torch.sym_max(a, b))


def smaller(a: int, b: int) -> int:
    """The smaller of two sizes, as :func:`larger`."""
    return cast("int", torch.sym_min(a, b))


def broadcast(*shapes: Sequence[int]) -> torch.Size:
    """The shape that all of them broadcast to; ``torch.broadcast_shapes`` loads sympy first, which takes half a second.

    Raises:
        RuntimeError: for shapes that do not fit together.
    """
    return torch.broadcast_tensors(*(torch.empty(()).expand(tuple(shape)) for shape in shapes))[0].shape
