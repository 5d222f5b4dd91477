"""Kernels that start before the one before them has ended, on NVIDIA's devices from Hopper on."""

import triton
import triton.language as tl

try:
    from triton.language.extra import cuda
except ImportError:  # a Triton for other devices alone
    cuda = None


@triton.jit
def wait_for_the_kernel_before():
    """Wait until the kernel before this one has ended, and let the next one start.

    As none lets the next one start before it has waited itself, all kernels but the one before this have ended when
    this one starts: what they wrote may be read at once, and only what the one before reads or writes must wait.
    """
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()


@triton.jit
def fetch(pointers):
    """Ask for the lines of memory that these point into, so that they are near when they are read."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
