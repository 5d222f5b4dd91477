"""Kernels that start before the one before them has ended, on NVIDIA's devices from Hopper on."""

import triton

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
