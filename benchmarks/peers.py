"""Other implementations of the selective scan that are installed here, under one signature.

Every function takes u, delta (B, T, D), A (D, N), B, C (B, T, N), D (D,) and options z, bias, softplus, and returns y
(B, T, D). Layouts that a peer asks for are made before the clock starts, in ``prepare``.
"""

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Scan = Callable[..., Tensor]


def peers(device: str) -> dict[str, tuple[Callable[..., dict[str, Any]], Scan]]:
    """Name and version -> (prepare, scan), for what can be imported and runs on the device."""
    found = {}
    for package, make in (("transformers", _transformers), ("mambapy", _mambapy), ("mamba-ssm", _mamba_ssm)):
        try:
            title = f"{package} {version(package)}"
            found[title] = make(device)
        except (PackageNotFoundError, LookupError):  # not installed, or nothing for this device
            continue
        except ImportError as error:
            print(f"{title} is left out, as it cannot be imported: {error}", file=sys.stderr)
    return found


def _channels_first(u, delta, A, B, C, D, z=None, bias=None, softplus=False) -> dict[str, Any]:
    def first(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad)

    return {
        **{"u": first(u), "delta": first(delta), "A": A, "B": first(B), "C": first(C), "D": D},
        **{"z": first(z), "delta_bias": bias, "delta_softplus": softplus},
    }


def _transformers(device: str) -> tuple[Any, Scan]:
    """The loop over time that it runs without extensions."""
    from transformers.models.mamba import modeling_mamba

    fallback = getattr(modeling_mamba, "mamba_selective_scan", None)
    if fallback is None:
        raise LookupError

    def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
        return fallback(u, delta, A, B, C, D, z, delta_bias, delta_softplus).transpose(1, 2)

    return _channels_first, scan


def _mambapy(device: str) -> tuple[Any, Scan]:
    """Its parallel scan, which holds every state."""
    from mambapy.mamba import MambaBlock

    def prepare(u, delta, A, B, C, D, z=None, bias=None, softplus=False) -> dict[str, Any]:
        return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "bias": bias, "softplus": softplus}

    def scan(u, delta, A, B, C, D, z, bias, softplus) -> Tensor:
        delta = delta if bias is None else delta + bias
        y = MambaBlock.selective_scan(None, u, F.softplus(delta) if softplus else delta, A, B, C, D)
        return y if z is None else y * F.silu(z)

    return prepare, scan


def _mamba_ssm(device: str) -> tuple[Any, Scan]:
    """Its CUDA extension."""
    if device != "cuda":
        raise LookupError
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return _channels_first, lambda **kwargs: selective_scan_fn(**kwargs).transpose(1, 2)


def leaves(inputs: dict[str, Any]) -> list[Tensor]:
    """What a gradient is asked for."""
    return [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
