"""Differentiable operators: each has one reference, which is its definition, and backends that must equal it."""

from importlib import import_module

import torch

from dualform.ops.add_norm import add_norm
from dualform.ops.arma_likelihood import arma_likelihood
from dualform.ops.attention import attention
from dualform.ops.attention_step import attention_step
from dualform.ops.cauchy import cauchy_kernel
from dualform.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from dualform.ops.diagonal_ssm import diagonal_ssm
from dualform.ops.dplr_ssm import dplr_ssm
from dualform.ops.fft_conv import fft_conv
from dualform.ops.gated_delta_product import gated_delta_product, gated_delta_product_update
from dualform.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_update
from dualform.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_update
from dualform.ops.gated_norm import gated_norm
from dualform.ops.grouped_linear import grouped_linear
from dualform.ops.head_step import head_step
from dualform.ops.irregular_scan import irregular_scan
from dualform.ops.irregular_ssm import irregular_ssm
from dualform.ops.kalman_filter import kalman_filter
from dualform.ops.kalman_smoother import kalman_smoother
from dualform.ops.linear import linear
from dualform.ops.linear_scan import linear_scan
from dualform.ops.long_conv import long_conv
from dualform.ops.lstm import lstm
from dualform.ops.lti_step import lti_step
from dualform.ops.mamba2_step import mamba2_step
from dualform.ops.mamba_step import mamba_step
from dualform.ops.markov_filter import markov_filter
from dualform.ops.markov_path import markov_path
from dualform.ops.markov_smoother import markov_smoother
from dualform.ops.mimo_ssm import mimo_ssm
from dualform.ops.mlp_step import mlp_step
from dualform.ops.op import OPS, Backend, Op, SlowBackendWarning, backend, check_name, forced
from dualform.ops.quantized_linear import quantized_linear
from dualform.ops.selective_scan import selective_scan, selective_state_update
from dualform.ops.slstm import slstm
from dualform.ops.ssd import ssd
from dualform.ops.vandermonde import vandermonde_kernel
from dualform.ops.wkv4 import wkv4
from dualform.ops.wkv7 import wkv7, wkv7_update

for _name in (
    "gated_delta_rule_chunked",
    "gated_linear_attention_chunked",
    "selective_scan_chunked",
    "ssd_chunked",
    "wkv7_chunked",
):
    import_module(f"dualform.ops.{_name}")
for _name in (
    "block",
    "causal_conv1d",
    "diagonal_ssm",
    "gated_delta_rule",
    "gated_delta_rule_update",
    "kalman_filter",
    "kalman_smoother",
    "linear",
    "linear_scan",
    "norm",
    "selective_scan",
    "ssd",
    "step",
    "wkv7",
):
    import_module(f"dualform.ops.triton.{_name}")
for _name in (
    "arma_likelihood",
    "block",
    "causal_conv1d",
    "diagonal_ssm",
    "kalman_filter",
    "kalman_smoother",
    "linear",
    "linear_scan",
    "markov",
    "norm",
    "quantized_linear",
    "selective_scan",
    "ssd",
    "step",
):
    import_module(f"dualform.ops.native.{_name}")
if torch.version.cuda:
    for _name in ("causal_conv1d", "diagonal_ssm", "selective_scan"):
        import_module(f"dualform.ops.cuda.{_name}")

check_name(forced(), "DUALFORM_BACKEND")

__all__ = [
    "OPS",
    "Backend",
    "Op",
    "SlowBackendWarning",
    "add_norm",
    "arma_likelihood",
    "attention",
    "attention_step",
    "backend",
    "cauchy_kernel",
    "causal_conv1d",
    "causal_conv1d_update",
    "diagonal_ssm",
    "dplr_ssm",
    "fft_conv",
    "gated_delta_product",
    "gated_delta_product_update",
    "gated_delta_rule",
    "gated_delta_rule_update",
    "gated_linear_attention",
    "gated_linear_attention_update",
    "gated_norm",
    "grouped_linear",
    "head_step",
    "irregular_scan",
    "irregular_ssm",
    "kalman_filter",
    "kalman_smoother",
    "linear",
    "linear_scan",
    "long_conv",
    "lstm",
    "lti_step",
    "mamba2_step",
    "mamba_step",
    "markov_filter",
    "markov_path",
    "markov_smoother",
    "mimo_ssm",
    "mlp_step",
    "quantized_linear",
    "selective_scan",
    "selective_state_update",
    "slstm",
    "ssd",
    "vandermonde_kernel",
    "wkv4",
    "wkv7",
    "wkv7_update",
]
