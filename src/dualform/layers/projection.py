"""Linear maps of a few rows, as steps have them, and whether a kernel may stand in for the modules of a layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from dualform.ops.linear import FEW, linear
from dualform.ops.native.library import why_missing
from dualform.ops.op import forced

_KERNELS = ("", "native")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)
_OF_ALL = ("_global_forward_hooks", "_global_forward_pre_hooks")
_OWN = ("_forward_hooks", "_forward_pre_hooks")


def project(module: Any, x: Tensor) -> Tensor:
    """``module(x)``: of up to 16 rows on a CPU by a kernel that reads the weights at the memory's speed.

    The module itself is called where gradients are recorded, where PyTorch looks into the call, and where it is more
    than a linear map: wrapped by an adapter or a quantiser, or with hooks.

    Args:
        module: a linear map.
        x: ``(..., D)``.
    """
    if x.is_cpu and plain(module) and _stands_in(x, module.weight):
        return _by_kernel(x, module.weight, module.bias)
    return module(x)


def project_by(weight: Tensor, x: Tensor) -> Tensor:
    """``W x`` of ``x`` ``(..., D)``, in the same two ways."""
    return _by_kernel(x, weight, None) if x.is_cpu and _stands_in(x, weight) else F.linear(x, weight)


def _by_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() == 2:
        return linear(x, weight, bias)
    return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _stands_in(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is the faster one for x, and nothing is lost with it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.numel() > FEW * x.shape[-1] or not x.numel():
        return False
    return type(x) is Tensor and type(weight) in _PLAIN and x.dtype == weight.dtype in _DTYPES and kernels_run()


def kernels_run() -> bool:
    """Whether the CPU kernels are there and no other backend was asked for."""
    return forced() in _KERNELS and not why_missing() and not torch.is_autocast_enabled("cpu")


def plain(*maps: Any, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether modules are exactly of a kind, and without hooks."""
    if any(getattr(modules, name) for name in _OF_ALL):
        return False
    return all(type(m) is kind and not any(getattr(m, name) for name in _OWN) for m in maps)


def plain_parameters(part: nn.Module) -> torch.dtype | None:
    """The dtype of all parameters of a part, where they are plain tensors on the CPU and of one; else None."""
    found = list(part.parameters())
    same = all(type(p) is nn.Parameter and p.is_cpu and p.dtype == found[0].dtype for p in found)
    return found[0].dtype if found and same else None
