"""Linear maps of a few rows, as steps have them, and whether a kernel may stand in for the modules of a layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from dualform.ops.linear import FEW, linear
from dualform.ops.native import library
from dualform.ops.normalize import seen_through
from dualform.ops.op import forced
from dualform.ops.triton import support
from dualform.ops.triton.linear import few

_KERNELS = {"cpu": ("native", library.why_missing), "cuda": ("triton", support.missing)}
# Numbers of a matrix from which a single row is faster by the kernel on a CPU: below, its call is what takes the time.
_LEAST = {torch.float32: 2**19, torch.bfloat16: 2**14, torch.float16: 2**14}
_PLAIN = (Tensor, nn.Parameter)
_OF_ALL = ("_global_forward_hooks", "_global_forward_pre_hooks")
_OWN = ("_forward_hooks", "_forward_pre_hooks")


def project(module: Any, x: Tensor) -> Tensor:
    """``module(x)``: of a few rows by a kernel that reads the weights at the memory's speed, where there is one.

    The module itself is called where gradients are recorded, where PyTorch looks into the call, and where it is more
    than a linear map: wrapped by an adapter or a quantiser, or with hooks.

    Args:
        module: a linear map.
        x: ``(..., D)``.
    """
    if _may_stand_in(x) and plain(module) and _fits(x, module.weight):
        return _by_kernel(x, module.weight, module.bias)
    return module(x)


def project_by(x: Tensor, weight: Tensor) -> Tensor:
    """``W x`` of ``x`` ``(..., D)``, in the same two ways."""
    return _by_kernel(x, weight, None) if _may_stand_in(x) and _fits(x, weight) else F.linear(x, weight)


def _by_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() == 2:
        return linear(x, weight, bias)
    return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _may_stand_in(x: Tensor) -> bool:
    """Whether nobody would miss the operation of PyTorch: autograd, a compiler, a transform, or a mode that counts."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or seen_through() or type(x) is not Tensor:
        return False
    where = x.is_cpu or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    return where and not torch._C._len_torch_dispatch_stack()


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is there, and the faster one for x."""
    if x.numel() == 0 or type(weight) not in _PLAIN or x.dtype != weight.dtype or x.dtype not in _LEAST:
        return False
    rows = x.numel() // x.shape[-1]
    on_cpu = rows <= FEW and (rows > 1 or weight.numel() >= _LEAST[x.dtype])
    return (on_cpu if x.is_cpu else few(rows, weight)) and kernels_run(x.device.type)


def kernels_run(device: str) -> bool:
    """Whether a device has kernels for steps, they can run, and no other backend was asked for."""
    if device not in _KERNELS:
        return False
    name, missing = _KERNELS[device]
    return forced() in ("", name) and not missing() and not torch.is_autocast_enabled(device)


def plain(*maps: Any, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether modules are exactly of a kind, and without hooks."""
    if any(getattr(modules, name) for name in _OF_ALL):
        return False
    return all(type(m) is kind and not any(getattr(m, name) for name in _OWN) for m in maps)


def plain_parameters(part: nn.Module) -> torch.dtype | None:
    """The dtype of all parameters of a part, where they are plain tensors of one dtype and device; else None."""
    found = list(part.parameters())
    kinds = {(type(p), p.dtype, p.device) for p in found}
    return found[0].dtype if len(kinds) == 1 and type(found[0]) is nn.Parameter else None
