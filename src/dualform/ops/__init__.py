"""Differentiable operators: each has one reference, which is its definition, and backends that must equal it."""

from dualform.ops.cauchy import cauchy_kernel
from dualform.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from dualform.ops.fft_conv import fft_conv
from dualform.ops.linear_scan import linear_scan
from dualform.ops.op import OPS, Backend, Op, SlowBackendWarning, backend
from dualform.ops.selective_scan import selective_scan, selective_state_update
from dualform.ops.ssd import ssd
from dualform.ops.vandermonde import vandermonde_kernel

__all__ = [
    "OPS",
    "Backend",
    "Op",
    "SlowBackendWarning",
    "backend",
    "cauchy_kernel",
    "causal_conv1d",
    "causal_conv1d_update",
    "fft_conv",
    "linear_scan",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "vandermonde_kernel",
]
