"""What kernels do to single numbers."""

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """``log(1 + exp(x))``, to full precision where it is small; x itself above 20, as in PyTorch. NaN stays NaN."""
    large = x > 20
    e = tl.exp(tl.where(large, 20.0, x))
    one = 1 + e
    return tl.where(large, x, tl.where(one == 1, e, tl.log(one) * (e / (one - 1))))


@triton.jit
def silu(x):
    """``x sigmoid(x)``."""
    return x / (1 + tl.exp(-x))
