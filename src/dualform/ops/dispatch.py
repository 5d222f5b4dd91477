"""The surroundings of a call: its device, its dtypes, and what PyTorch switches off that kernels in PyTorch need."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")
_KEYS = torch._C.DispatchKey
_LAZY = (_KEYS.Conjugate, _KEYS.Negative)
_RECORDED = (_KEYS.ADInplaceOrView, _KEYS.AutogradFunctionality)


@contextmanager
def ordinary_dispatch() -> Iterator[None]:
    """Inside, conjugates are conjugates, and autograd records where it is asked to.

    Under a ``TorchDispatchMode``, such as the one in which ``torch.compile`` runs an operator for the first time,
    PyTorch leaves out both: ``x.conj()`` then multiplies as ``x``, without a word.
    """
    keys = _LAZY if torch.is_inference_mode_enabled() else _LAZY + _RECORDED
    hidden = [key for key in keys if torch._C._dispatch_tls_is_dispatch_key_excluded(key)]
    for key in hidden:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        for key in hidden:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


def distinct(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, no tensor twice: compilers do not differentiate by one that a function is given two times."""
    found: list[Any] = []
    for m in args:
        again = isinstance(m, Tensor) and any(m is other for other in found)
        found.append(m.view_as(m) if again else m)
    return tuple(found)


def exactly(device: str) -> AbstractContextManager[object]:
    """Matrix products in the dtype of their factors, autocast or not."""
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched where the arguments are, whichever device is the current one; autocast changes no dtype."""
    exact = exactly(device.type)
    return exact if _is_current(device) else _launched(device, exact)


def run_there(run: Callable[[Any], Found], a: Any, device: torch.device) -> Found:
    """``run(a)`` under :func:`on_device`, which is entered only where it has something to do."""
    if _is_current(device) and not torch.is_autocast_enabled(device.type):
        return run(a)
    with on_device(device):
        return run(a)


def _is_current(device: torch.device) -> bool:
    """Whether a kernel is launched there as it is: to make a device the current one takes as long as a launch."""
    kind = device.type
    if kind == "cuda":
        return device.index == torch._C._cuda_getDevice()  # pyright: ignore[reportAttributeAccessIssue]
    return kind != "xpu"


@contextmanager
def _launched(device: torch.device, exact: AbstractContextManager[Any]) -> Iterator[None]:
    with exact, getattr(torch, device.type).device(device):
        yield
