"""A device that is asked for by name, and whether tensors can be there."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

import torch

from dualform.core.errors import ArgumentError

F = TypeVar("F", bound=Callable[..., Any])
_ALWAYS = "dualform doctor lists the devices; cpu is always there"


def chosen_device(name: str, where: str) -> torch.device:
    """The device of a name; for ``auto`` a GPU if there is one, of CUDA (or ROCm) before XPU, else the CPU.

    Args:
        name: ``auto``, or such as ``cpu``, ``cuda`` or ``cuda:1``.
        where: begins the message of an error.

    Raises:
        ArgumentError: as :func:`usable_device`.
    """
    if name != "auto":
        return usable_device(name, where)
    kinds = {"cuda": torch.cuda.is_available, "xpu": torch.xpu.is_available}
    return torch.device(next((kind for kind, there in kinds.items() if there()), "cpu"))


def usable_device(device: str | torch.device, where: str, *, numbers: bool = True) -> torch.device:
    """The device, on which a tensor has been made and read.

    Args:
        device: such as ``cpu`` or ``cuda:1``.
        where: begins the message of an error.
        numbers: whether tensors there have to have numbers; on ``meta`` they have not.

    Raises:
        ArgumentError: for a name that is no device, one that is not there, or one without numbers; says of a GPU
            whether it is missing or PyTorch's support of it.
    """
    try:
        found = torch.device(device)
        made = torch.zeros(1, device=found)
        if numbers:
            made.item()
    except Exception as error:  # every kind of device has exceptions of its own for not being there
        reason = str(error).partition("\n")[0].partition(". ")[0][:300] or type(error).__name__
        reason, hint = _without_gpu(str(device)) or (reason, _ALWAYS)
        raise ArgumentError(f"{where} cannot be used: {reason}", hint=hint) from None
    return torch.device("cpu") if found.type == "cpu" else found


def explains_device(function: F) -> F:
    """A function or class with an argument ``device``, where one that cannot be used raises an ArgumentError.

    It is looked at where the function has failed already.
    """
    made: Any = function
    run = made.__init__ if isinstance(made, type) else made
    shape = signature(run)

    @wraps(run)
    def explained(*args: Any, **given: Any) -> Any:
        try:
            return run(*args, **given)
        except (AssertionError, RuntimeError):
            device = shape.bind(*args, **given).arguments.get("device")
            if device is not None:
                usable_device(device, f"{made.__name__}: device {str(device)!r}", numbers=False)
            raise

    if not isinstance(made, type):
        return explained  # pyright: ignore[reportReturnType]
    made.__init__ = explained
    return function


def _without_gpu(device: str) -> tuple[str, str] | None:
    """Why there is no such CUDA device, and the remedy."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None
    if not torch.backends.cuda.is_built():
        hint = "install a PyTorch with CUDA, see https://pytorch.org/get-started; cpu is always there"
        return f"this PyTorch, {torch.__version__}, is built without CUDA", hint
    count = torch.cuda.device_count()
    if not count:
        hint = "does nvidia-smi list one, and does CUDA_VISIBLE_DEVICES leave it visible? cpu is always there"
        return "no GPU is visible to PyTorch", hint
    if index.isdigit() and int(index) >= count:
        return f"PyTorch sees {count} of them, from cuda:0 to cuda:{count - 1}", _ALWAYS
    return None
