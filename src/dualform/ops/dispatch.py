"""What PyTorch switches off around a call, and kernels written in PyTorch need."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

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


def exactly(device: str) -> AbstractContextManager[object]:
    """Matrix products in the dtype of their factors, autocast or not."""
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
