"""The structures of ``native/dualform.h``: their fields in order, checked against the header by a test."""

import torch
from torch import Tensor

from dualform.core.packing import Packing
from dualform.ops.layout import flat_stride
from dualform.ops.structs import DOUBLE, FLAG, INT64, POINTER, Kind, Structure

VERSION = 23  # DUALFORM_VERSION
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # their numbers in C
MATRICES = {**DTYPES, torch.int8: 4}  # of matrices
NO_MEMORY, REFUSED, FULL = 1, 2, 3  # what a function returns; 0 when it is done
SELECTIVE_SCAN_TILE = 32  # steps between the states that the backward of selective_scan starts from
SSD_SPAN = 256  # the same for ssd


def _view(x: Tensor) -> tuple[int, ...]:
    row, time = x.stride()[:2]
    return x.data_ptr(), row, time, (flat_stride(x) or 1) if time == 1 else 1, DTYPES[x.dtype]


def _view_of_step(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), x.stride(0), 0, 1, MATRICES[x.dtype]


def _view_of_steps(x: Tensor) -> tuple[int, ...]:
    return _view_of_step(x) if x.dim() == 2 else (x.data_ptr(), x.stride(0), x.stride(1), 1, DTYPES[x.dtype])


def _sequences(of: tuple[Tensor, Packing | None]) -> tuple[int, ...]:
    x, packing = of
    rows, length = x.shape[:2]
    return (rows, length, rows, 0) if packing is None else (rows, length, packing.rows, packing.cu_seqlens.data_ptr())


_VIEW = (POINTER, "data"), (INT64, "row time inner dtype")
DTYPE = Kind("int64", 1, MATRICES.__getitem__)
# A tensor (B, T, ...) whose axes after time lie like one axis; and one step of it, (B, ...), contiguous.
VIEW, STEP = Structure("View", *_VIEW, of=_view), Structure("View", *_VIEW, of=_view_of_step)
# One step (B, D) or some (B, T, D), D contiguous.
STEPS = Structure("View", *_VIEW, of=_view_of_steps)
# A tensor (R, D, S) with any strides.
INPUTS = Structure(
    "Inputs",
    (POINTER, "data"),
    (INT64, "row channel slot dtype"),
    of=lambda x: (x.data_ptr(), *x.stride(), DTYPES[x.dtype]),
)
# A tensor (B, T, ...) and its packing, or None.
SEQUENCES = Structure("Sequences", (INT64, "rows length count"), (POINTER, "borders"), of=_sequences)

SELECTIVE_SCAN = Structure(
    "SelectiveScan",
    (INT64, "threads"),
    (DTYPE, "dtype"),
    (SEQUENCES, "sequences"),
    (INT64, "width states groups_b groups_c"),
    (FLAG, "constant_b constant_c softplus"),
    (VIEW, "u delta b c z"),
    (POINTER, "a d bias h0"),
    (VIEW, "y"),
    (POINTER, "final saved"),
    (VIEW, "dy"),
    (POINTER, "dfinal"),
    (VIEW, "du ddelta db dc dz"),
    (POINTER, "da dd dbias dh0"),
)

SSD = Structure(
    "Ssd",
    (INT64, "threads"),
    (DTYPE, "dtype"),
    (SEQUENCES, "sequences"),
    (INT64, "heads width states groups"),
    (VIEW, "x dt b c"),
    (POINTER, "a h0 ids"),
    (VIEW, "y"),
    (POINTER, "final saved"),
    (VIEW, "dy"),
    (POINTER, "dfinal"),
    (VIEW, "dx ddt db dc"),
    (POINTER, "da dh0"),
)

DIAGONAL_SSM = Structure(
    "DiagonalSSM",
    (INT64, "threads"),
    (DTYPE, "dtype"),
    (SEQUENCES, "sequences"),
    (INT64, "width states"),
    (VIEW, "u"),
    (POINTER, "a c h0"),
    (VIEW, "y"),
    (POINTER, "final"),
    (VIEW, "dy"),
    (POINTER, "dfinal"),
    (VIEW, "du"),
    (POINTER, "da dc dh0"),
)

LINEAR_SCAN = Structure(
    "LinearScan",
    (INT64, "threads"),
    (DTYPE, "dtype"),
    (FLAG, "complex reverse"),
    (SEQUENCES, "sequences"),
    (INT64, "width"),
    (VIEW, "a b"),
    (POINTER, "h0"),
    (VIEW, "h"),
    (POINTER, "final"),
    (VIEW, "dh"),
    (POINTER, "dfinal"),
    (VIEW, "da db"),
    (POINTER, "dh0"),
)

CAUSAL_CONV1D = Structure(
    "CausalConv1d",
    (INT64, "threads"),
    (DTYPE, "dtype"),
    (SEQUENCES, "sequences"),
    (INT64, "width taps"),
    (FLAG, "silu"),
    (VIEW, "x"),
    (POINTER, "weight bias h0 ids"),
    (VIEW, "y"),
    (POINTER, "final"),
    (VIEW, "dy"),
    (POINTER, "dfinal"),
    (VIEW, "dx"),
    (POINTER, "dweight dbias dh0"),
)

SELECTIVE_UPDATE = Structure(
    "SelectiveUpdate",
    (INT64, "threads"),
    (DTYPE, "dtype"),
    (INT64, "rows width states groups_b groups_c per"),
    (FLAG, "matrix softplus gated"),
    (STEP, "h x dt"),
    (POINTER, "a"),
    (STEP, "b c"),
    (POINTER, "d"),
    (STEP, "z"),
    (POINTER, "dt_bias"),
    (STEP, "y next"),
    (INT64, "h_rows next_rows"),
    (POINTER, "reads writes"),
)

CONV_UPDATE = Structure(
    "ConvUpdate",
    (INT64, "threads"),
    (DTYPE, "dtype"),
    (INT64, "rows length width taps size renewed"),
    (FLAG, "silu"),
    (STEPS, "x"),
    (INPUTS, "h"),
    (POINTER, "weight bias"),
    (STEPS, "y"),
    (INPUTS, "next"),
    (INT64, "h_rows next_rows"),
    (POINTER, "reads writes seen"),
)

NORM = Structure(
    "Norm",
    (INT64, "threads"),
    (DTYPE, "dtype"),
    (INT64, "rows width groups"),
    (FLAG, "center norm_before_gate"),
    (DOUBLE, "eps"),
    (STEP, "x residual z"),
    (POINTER, "weight bias"),
    (STEP, "y r dy dr dx dresidual dz"),
    (POINTER, "dweight dbias"),
)

LINEAR = Structure(
    "Linear",
    (INT64, "threads"),
    (DTYPE, "dtype"),
    (INT64, "rows inputs outputs"),
    (STEP, "x weight"),
    (POINTER, "bias"),
    (STEP, "y"),
    (POINTER, "scales"),
    (INT64, "group"),
)

KALMAN_FILTER = Structure(
    "KalmanFilter",
    (INT64, "threads"),
    (DTYPE, "dtype"),
    (INT64, "rows length states observed"),
    (VIEW, "a shift q c r y"),
    (POINTER, "seen mean cov loglik means covs predicted_means predicted_covs last_mean last_cov"),
    (POINTER, "first_mean first_cov dloglik dmeans dcovs dpredicted_means dpredicted_covs dlast_mean dlast_cov"),
    (POINTER, "da dshift dq dc dr dy dmean dcov"),
)

MARKOV_CHAIN = Structure(
    "MarkovChain",
    (INT64, "threads"),
    (DTYPE, "dtype"),
    (INT64, "rows length states"),
    (VIEW, "a b"),
    (POINTER, "start p sum top after probs weight lengths path score"),
)
ARMA = Structure(
    "Arma",
    (INT64, "threads"),
    (DTYPE, "dtype"),
    (INT64, "rows length p q"),
    (POINTER, "ar ma variance y ar_way ma_way variance_way y_way loglik dar dma dvariance dy"),
)

MAMBA_STEP = Structure(
    "MambaStep",
    (INT64, "threads"),
    (DTYPE, "dtype matrices"),
    (INT64, "rows features width states rank taps group"),
    (DOUBLE, "eps"),
    (POINTER, "x conv h norm in_weight in_bias conv_weight conv_bias maps steps dt_bias a d out_weight out_bias"),
    (POINTER, "in_scales maps_scales steps_scales out_scales"),
    (POINTER, "y next_conv next_h"),
)

MAMBA2_STEP = Structure(
    "Mamba2Step",
    (INT64, "threads"),
    (DTYPE, "dtype matrices"),
    (INT64, "rows features heads width states groups taps group"),
    (FLAG, "norm_before_gate"),
    (DOUBLE, "eps gate_eps low high"),
    (POINTER, "x conv h norm in_weight in_bias conv_weight conv_bias dt_bias a d gate out_weight out_bias"),
    (POINTER, "in_scales out_scales"),
    (POINTER, "y next_conv next_h"),
)

LTI_STEP = Structure(
    "LtiStep",
    (INT64, "threads"),
    (DTYPE, "dtype matrices"),
    (INT64, "rows features states"),
    (FLAG, "shared gate"),
    (DOUBLE, "eps"),
    (POINTER, "x h norm a b c d out_weight out_bias"),
    (POINTER, "y next_h"),
)

ATTENTION_STEP = Structure(
    "AttentionStep",
    (INT64, "threads"),
    (DTYPE, "dtype matrices caches"),
    (INT64, "rows features heads groups width values slots turned group"),
    (FLAG, "ring interleaved"),
    (DOUBLE, "eps scale softcap magnitude"),
    (POINTER, "x length norm in_weight in_bias frequencies out_weight out_bias in_scales out_scales"),
    (POINTER, "y k v next_length"),
)

MLP_STEP = Structure(
    "MlpStep",
    (INT64, "threads"),
    (DTYPE, "dtype matrices"),
    (INT64, "rows features hidden group"),
    (FLAG, "gated"),
    (INT64, "activation"),
    (DOUBLE, "eps factor"),
    (POINTER, "x norm in_weight in_bias out_weight out_bias in_scales out_scales y"),
)

HEAD_STEP = Structure(
    "HeadStep",
    (INT64, "threads"),
    (DTYPE, "dtype matrices"),
    (INT64, "rows features outputs group"),
    (DOUBLE, "eps factor cap"),
    (POINTER, "x norm out_weight out_bias out_scales"),
    (STEP, "y"),
)

DRAW = Structure(
    "Draw",
    (INT64, "threads rows tokens remembered"),
    (STEP, "logits"),
    (POINTER, "options draws history token finite"),
)

STEPS_OF_BLOCKS = Structure("Steps", (INT64, "threads count"), (POINTER, "kinds steps"))
