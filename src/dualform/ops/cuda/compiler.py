"""CUDA C++ to running kernels: NVRTC compiles for the GPU at hand, once per machine, and the driver launches.

Both come with PyTorch's own wheels for CUDA: nothing else is installed, and no toolkit is needed. Machine code is kept
in ``DUALFORM_CACHE``, or in the user's cache folder.
"""

import ctypes
import hashlib
import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

_FOLDER = Path(__file__).parent
_HEADERS = tuple(sorted(path.name for path in _FOLDER.glob("*.cuh")))
_OLDEST = (8, 0)  # compute capability: bfloat16, and more than 48 KiB of shared memory for a block


@cache
def missing() -> str:
    """Why kernels cannot be compiled and run here, and what to do about it; empty when they can."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        return f"NVIDIA's compiler is not installed ({error}): pip install cuda-bindings nvidia-cuda-nvrtc"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST:
        return f"this GPU has compute capability {capability[0]}.{capability[1]}, older than {_OLDEST[0]}.{_OLDEST[1]}"
    return ""


class Limits(NamedTuple):
    """What a GPU has.

    Args:
        multiprocessors: number of them.
        shared: bytes of shared memory that one block may take.
    """

    multiprocessors: int
    shared: int


def limits() -> Limits:
    """Those of the current device."""
    return _limits(torch.cuda.current_device())


def launch(
    file: str, kernel: str, defines: dict[str, Any], grid: int, threads: int, shared: int, structure: bytes
) -> None:
    """Start ``grid`` blocks of a kernel on the current stream.

    Args:
        file: its source, in this folder.
        kernel: its name; it takes one structure.
        defines: macros of the source: it is compiled anew for each combination.
        grid: number of blocks.
        threads: of a block.
        shared: bytes of shared memory of a block.
        structure: in memory; what it points to must live until this returns.
    """
    if grid == 0:
        return
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

    device = torch.cuda.current_device()
    if not int(_check(*driver.cuCtxGetCurrent())):  # a thread of autograd on which PyTorch has done nothing yet
        _check(*driver.cuCtxSetCurrent(_context(device)))
    function = _function(file, kernel, tuple(defines.items()), device, shared)
    values = ctypes.create_string_buffer(structure, len(structure))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(values))
    stream = torch.cuda.current_stream().cuda_stream
    _check(
        *driver.cuLaunchKernel(
            function, grid, 1, 1, threads, 1, 1, shared, driver.CUstream(stream), ctypes.addressof(pointers), 0
        )
    )


def compile_source(file: str, defines: dict[str, Any], arch: str) -> bytes:
    """Machine code of a source for an architecture such as ``sm_90``; needs no GPU.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    from cuda.bindings import nvrtc  # pyright: ignore[reportAttributeAccessIssue]

    headers = [(_FOLDER / name).read_bytes() for name in _HEADERS]
    source = (_FOLDER / file).read_bytes()
    names = [name.encode() for name in _HEADERS]
    program = _check(*nvrtc.nvrtcCreateProgram(source, file.encode(), len(headers), headers, names))
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{name}={_macro(v)}" for name, v in defines.items())]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _check(*nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{file} does not compile for {arch} with {defines}:\n{log.decode().rstrip(chr(0))}")
        code = b" " * _check(*nvrtc.nvrtcGetCUBINSize(program))
        _check(*nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code


@cache
def _limits(device: int) -> Limits:
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

    of = driver.CUdevice_attribute
    asked = (
        of.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        of.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
    )
    return Limits(*(_check(*driver.cuDeviceGetAttribute(one, driver.CUdevice(device))) for one in asked))


@cache
def _context(device: int) -> Any:
    """The one that PyTorch uses, too."""
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

    return _check(*driver.cuDevicePrimaryCtxRetain(driver.CUdevice(device)))


@cache
def _function(file: str, kernel: str, defines: tuple[tuple[str, Any], ...], device: int, shared: int) -> Any:
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

    found = _check(*driver.cuLibraryGetKernel(_library(file, defines, device), kernel.encode()))
    if shared > 48 * 1024:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(*driver.cuKernelSetAttribute(attribute, shared, found, driver.CUdevice(device)))
    return driver.CUfunction(int(found))


@cache
def _library(file: str, defines: tuple[tuple[str, Any], ...], device: int) -> Any:
    from cuda.bindings import driver, nvrtc  # pyright: ignore[reportAttributeAccessIssue]

    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}"
    key = hashlib.sha256(repr((defines, arch, nvrtc.nvrtcVersion())).encode())
    for name in (*_HEADERS, file):
        key.update((_FOLDER / name).read_bytes())
    kept = _cache_folder() / f"{Path(file).stem}-{key.hexdigest()[:32]}.cubin"
    try:
        code = kept.read_bytes()
    except OSError:
        code = compile_source(file, dict(defines), arch)
        _keep(kept, code)
    return _check(*driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))


def _cache_folder() -> Path:
    chosen = os.environ.get("DUALFORM_CACHE")
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualform"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "dualform"


def _keep(path: Path, code: bytes) -> None:
    """Written aside and renamed, as other processes may read it; a cache that cannot be written is done without."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)


def _macro(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check(status: Any, value: Any = None) -> Any:
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {status}")
    return value
