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
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)


def project(module: Any, x: Tensor) -> Tensor:
    """``module(x)``: of a few rows by a kernel that reads the weights at the memory's speed, where there is one.

    The module itself is called where gradients are recorded, where PyTorch looks into the call, and where it is more
    than a linear map: wrapped by an adapter or a quantiser, or with hooks.

    Args:
        module: a linear map.
        x: ``(..., D)``.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _plain(module):
        return module(x)
    named = module._parameters  # what an attribute of a module finds, without a call
    weight, bias = named["weight"], named["bias"]
    return _by_kernel(x, weight, bias) if _fits(x, weight) and _may_stand_in(x) else F.linear(x, weight, bias)


def project_by(x: Tensor, weight: Tensor) -> Tensor:
    """``W x`` of ``x`` ``(..., D)``, in the same two ways."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return (
        _by_kernel(x, weight, None) if not recorded and _fits(x, weight) and _may_stand_in(x) else F.linear(x, weight)
    )


def _by_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() == 2:
        return linear(x, weight, bias)
    return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _may_stand_in(x: Tensor) -> bool:
    """Whether the kernel is there, and no transform or mode would miss the operation of PyTorch."""
    if seen_through() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack():
        return False
    return (x.is_cpu or torch.cuda.is_current_stream_capturing()) and kernels_run(x.device.type)


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether a kernel would be the faster one for x."""
    if x.dtype not in _DTYPES or not x.numel():
        return False
    rows = x.numel() // x.shape[-1]
    if x.is_cpu and (rows > FEW or weight.numel() < _least(rows, x.dtype)):
        return False
    if not x.is_cpu and not (x.is_cuda and few(rows, weight)):  # in a graph, where a launch costs nothing
        return False
    return type(weight) in _PLAIN and x.dtype == weight.dtype


def _least(rows: int, dtype: torch.dtype) -> int:
    """Numbers of a matrix from which the kernel of CPUs is the faster one: below, its call is what takes the time.

    Measured with 1 to 16 rows and 2^9 to 2^19 numbers. PyTorch's products of 16 bits take longer with each row. With
    several threads, those of several rows wait for all of them, however small: 16 ms for 4 us where cores are busy.
    """
    if rows > 1 and torch.get_num_threads() > 1:
        return 0
    if dtype == torch.float32:
        return 2**19 if rows == 1 else 2**17
    return 2**14 if rows == 1 else 2**15 // rows


def kernels_run(device: str) -> bool:
    """Whether a device has kernels for steps, they can run, and no other backend was asked for."""
    if device not in _KERNELS:
        return False
    name, missing = _KERNELS[device]
    return forced() in ("", name) and not missing() and not torch.is_autocast_enabled(device)


def plain(*maps: Any, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether modules are exactly of a kind, and without hooks."""
    return all([_plain(m, kind) for m in maps])


def _plain(m: Any, kind: type[nn.Module] = nn.Linear) -> bool:
    hooked = modules._global_forward_hooks or modules._global_forward_pre_hooks
    if hooked or type(m) is not kind or m._forward_hooks or m._forward_pre_hooks:
        return False
    return "forward" not in m.__dict__  # which some libraries put in the place of the class's own


def plain_parameters(part: nn.Module) -> torch.dtype | None:
    """The dtype of all parameters of a part, where they are plain tensors of one dtype and device; else None."""
    found = list(part.parameters())
    kinds = {(type(p), p.dtype, p.device) for p in found}
    return found[0].dtype if len(kinds) == 1 and type(found[0]) is nn.Parameter else None
