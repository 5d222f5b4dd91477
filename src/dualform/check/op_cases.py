"""Arguments for every operator, in odd sizes: what its backends are compared on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dualform.check.block_steps import block_cases
from dualform.check.markov_passes import markov_cases
from dualform.core.dplr import DiscreteDPLR
from dualform.core.int8 import quantize
from dualform.core.packing import from_lengths
from dualform.ops.add_norm import add_norm
from dualform.ops.arma_likelihood import arma_likelihood
from dualform.ops.attention import Past, attention
from dualform.ops.cauchy import cauchy_kernel
from dualform.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from dualform.ops.diagonal_ssm import diagonal_ssm
from dualform.ops.dplr_ssm import dplr_ssm
from dualform.ops.fft_conv import fft_conv
from dualform.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_update
from dualform.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_update
from dualform.ops.gated_norm import gated_norm
from dualform.ops.grouped_linear import grouped_linear
from dualform.ops.irregular_scan import irregular_scan
from dualform.ops.irregular_ssm import irregular_ssm
from dualform.ops.kalman_filter import kalman_filter
from dualform.ops.kalman_smoother import kalman_smoother
from dualform.ops.linear import linear
from dualform.ops.linear_scan import linear_scan
from dualform.ops.long_conv import long_conv
from dualform.ops.lstm import lstm
from dualform.ops.mimo_ssm import mimo_ssm
from dualform.ops.quantized_linear import quantized_linear
from dualform.ops.selective_scan import selective_scan, selective_state_update
from dualform.ops.slstm import slstm
from dualform.ops.ssd import ssd
from dualform.ops.vandermonde import vandermonde_kernel
from dualform.ops.wkv4 import wkv4
from dualform.ops.wkv7 import wkv7, wkv7_update

# float32 at least, whatever the dtype of the activations
_STAY_WIDE = ("A", "initial_state", "state", "delta_bias", "dt_bias")


def _attention(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, length: Tensor, **options: Any
) -> Tensor:
    return attention(q, k, v, Past(past_k, past_v, length), **options)


@dataclass(frozen=True)
class OpCase:
    """One call of an operator.

    Args:
        name: what the table calls it.
        op: its name in ``OPS``.
        function: the public function.
        tensors: the differentiable arguments, float64 or complex128, on the CPU.
        options: the other arguments.
    """

    name: str
    op: str
    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def cast(self, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Fresh copies of the tensors on a device; decays, biases of steps and states stay float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)

        def one(name: str, tensor: Tensor) -> Tensor:
            real = wide if name in _STAY_WIDE or tensor.is_complex() else dtype
            return tensor.to(device, real.to_complex() if tensor.is_complex() else real, copy=True)

        return {name: one(name, tensor) for name, tensor in self.tensors.items()}

    def call(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs, on whatever device the tensors are."""
        device = next(iter(tensors.values())).device
        options = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.options.items()}
        out = self.function(**tensors, **options)
        return out if isinstance(out, tuple) else (out,)


def _dplr_ssm(u: Tensor, A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, **options: Any) -> Any:
    return dplr_ssm(u, DiscreteDPLR.of(A, P, B, dt), C, **options)


def op_cases(length: int, seed: int = 0) -> list[OpCase]:
    """Every operator: with an initial state, packed, and in its variants.

    Args:
        length: T.
        seed: of the arguments.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, complex: bool = False) -> Tensor:
        dtype = torch.complex128 if complex else torch.float64
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def decay(*shape: int) -> Tensor:
        return -torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.1

    lengths = torch.tensor([length // 3, 0, min(1, length - length // 3), max(0, length - length // 3 - 1)])
    packed = from_lengths(lengths).to(torch.int32)
    rows = len(lengths)
    ids = torch.arange(length, dtype=torch.int32).div(torch.tensor([[length + 1], [2], [5]]), rounding_mode="floor") % 3
    ids[1, ids[1] == 1], ids[2, : length // 4] = -1, -1  # padding between sequences, and before them

    def gaussian(batch: int, n: int, m: int) -> dict[str, Tensor]:
        steps = (batch, length)
        roots = {"Q": normal(*steps, n, n), "R": normal(*steps, m, m), "cov": normal(batch, n, n)}
        return {
            **{"A": 0.4 * normal(*steps, n, n), "c": normal(*steps, n), "C": normal(*steps, m, n)},
            **{"y": normal(*steps, m), "mean": normal(batch, n)},
            **{name: x @ x.mT + 0.5 * torch.eye(x.shape[-1], dtype=x.dtype) for name, x in roots.items()},
        }

    def missing(batch: int, m: int) -> dict[str, Tensor]:
        return {"seen": torch.rand(batch, length, m, generator=generator) < 0.7}

    def scan_(batch: int, states: int, complex: bool = False) -> dict[str, Tensor]:
        a = torch.rand(batch, length, 5, generator=generator, dtype=torch.float64)
        return {
            "a": torch.polar(a, 3 * a) if complex else 2 * a - 1,
            "b": normal(batch, length, 5, complex=complex),
            "initial_state": normal(states, 5, complex=complex),
        }

    def selective(
        batch: int, states: int, groups: int = 3, complex: bool = False, without: tuple[str, ...] = (), width: int = 24
    ) -> dict[str, Tensor]:
        A = decay(width, 5)
        found = {
            "u": normal(batch, length, width),
            "delta": normal(batch, length, width) - 1,
            "A": torch.complex(A, normal(width, 5)) if complex else A,
            "B": normal(batch, length, groups, 5),
            "C": normal(batch, length, groups, 5, complex=complex),
            "D": normal(width),
            "z": normal(batch, length, width),
            "delta_bias": normal(width),
            "initial_state": normal(states, width, 5, complex=complex),
        }
        return {name: tensor for name, tensor in found.items() if name not in without}

    def dual(
        batch: int, states: int, groups: int = 3, skip: tuple[int, ...] = (6,), p: int = 5, n: int = 7
    ) -> dict[str, Tensor]:
        return {
            "x": normal(batch, length, 6, p),
            "dt": normal(batch, length, 6) - 1,
            "A": decay(6),
            "B": normal(batch, length, groups, n),
            "C": normal(batch, length, groups, n),
            "D": normal(*skip),
            "z": normal(batch, length, 6, p),
            "dt_bias": normal(6),
            "initial_state": normal(states, 6, p, n),
        }

    def conv(batch: int, states: int, width: int = 4) -> dict[str, Tensor]:
        return {
            "x": normal(batch, length, 5),
            "weight": normal(5, width),
            "bias": normal(5),
            "initial_state": normal(states, 5, width - 1),
        }

    def long(taps: int) -> dict[str, Tensor]:
        return {"u": normal(3, length, 5), "k": normal(5, taps), "D": normal(5)}

    def rows_of(width: int, *beside: str) -> dict[str, Tensor]:
        """Of one sequence where nothing lies beside x that would tell that rows are missing."""
        streams = {name: normal(3 if beside else 1, length, width) for name in ("x", *beside)}
        return {**streams, "weight": normal(width), "bias": normal(width)}

    def tokens(batch: int, states: int, values: int = 5) -> dict[str, Tensor]:
        named = {"q": (batch, length, 6, 5), "k": (batch, length, 3, 5), "v": (batch, length, 3, values)}
        past = {"past_k": (states, 9, 3, 5), "past_v": (states, 9, 3, values)}
        return {name: normal(*shape) for name, shape in {**named, **past}.items()}

    def gates(batch: int, states: int) -> dict[str, Tensor]:
        found = {"x": normal(batch, length, 5), "h": normal(states, 3), "c": normal(states, 3)}
        maps = {"input_weight": normal(12, 5), "hidden_weight": normal(12, 3)}
        return {**found, **maps, "input_bias": normal(12), "hidden_bias": normal(12)}

    def scaled_gates(batch: int, states: int) -> dict[str, Tensor]:
        state = {name: normal(states, 2, 3) for name in ("h", "c", "m")} | {"n": decay(states, 2, 3).neg()}
        return {"gates": normal(batch, length, 4, 2, 3), "weight": normal(4, 2, 3, 3), **state}

    def behind(batch: int, states: int, taps: int) -> dict[str, Tensor]:
        return {"u": normal(batch, length, 5), "k": normal(5, taps), "past": normal(states, 6, 5)}

    poles = {"log_poles": torch.complex(0.1 * decay(5, 7), normal(5, 7)), "weights": normal(5, 7, complex=True)}

    def low_rank(rank: int) -> dict[str, Tensor]:
        return {
            "A": torch.complex(5 * decay(5, 3), 5 * normal(5, 3)),
            "P": normal(rank, 5, 3, complex=True),
            "B": normal(5, 3, complex=True),
            "C": normal(5, 3, complex=True),
            "dt": -decay(5),
        }

    def diagonal(batch: int, states: int) -> dict[str, Tensor]:
        return {
            "u": normal(batch, length, 5),
            "Abar": torch.exp(torch.complex(0.3 * decay(5, 6), normal(5, 6))),
            "CB": normal(5, 6, complex=True),
            "initial_state": normal(states, 5, 6, complex=True),
        }

    def times(batch: int) -> Tensor:
        return 3 * torch.rand(batch, length, generator=generator, dtype=torch.float64) + 0.1

    def many(batch: int, states: int, held: bool = False) -> dict[str, Tensor]:
        log_a = torch.complex(0.3 * decay(7), normal(7))
        found = {
            "u": normal(batch, length, 5),
            "decay": log_a if held else log_a.exp(),
            "B": normal(7, 5, complex=True),
            "C": normal(5, 7, complex=True),
            "initial_state": normal(states, 7, complex=True),
        }
        return {**found, "intervals": times(batch)} if held else found

    def irregular(batch: int, states: int) -> dict[str, Tensor]:
        return {
            "u": normal(batch, length, 5),
            "intervals": times(batch),
            "log_a": torch.complex(0.3 * decay(5, 6), normal(5, 6)),
            "B": normal(5, 6, complex=True),
            "C": normal(5, 6, complex=True),
            "initial_state": normal(states, 5, 6, complex=True),
        }

    def irregular_selective(batch: int, states: int) -> dict[str, Tensor]:
        return {
            "u": normal(batch, length, 5),
            "intervals": times(batch),
            "dt": 0.3 * normal(batch, length, 5).abs(),
            "A": decay(5, 6),
            "B": normal(batch, length, 6),
            "C": normal(batch, length, 6),
            "initial_state": normal(states, 5, 6),
        }

    def low_rank_ssm(batch: int, states: int, rank: int) -> dict[str, Tensor]:
        m = low_rank(rank)
        return {
            "u": normal(batch, length, 5),
            **{name: m[name] for name in ("A", "P", "B", "C", "dt")},
            "initial_state": normal(states, 5, 3, complex=True),
        }

    def update(inner: tuple[int, ...], head: tuple[int, ...], rates: int) -> dict[str, Tensor]:
        return {
            "state": normal(3, *inner, 5),
            "x": normal(3, *inner),
            "dt": normal(3, *head) - 1,
            "A": decay(*head, rates),
            "B": normal(3, 3, 5),
            "C": normal(3, 3, 5),
            "D": normal(*head),
            "z": normal(3, *inner),
            "dt_bias": normal(*head),
        }

    def gated(batch: int | None, states: int, bonus: bool = False) -> dict[str, Tensor]:
        """One step where there is no batch of sequences."""
        first = (states,) if batch is None else (batch, length)
        found = {"state" if batch is None else "initial_state": normal(states, 3, 5, 7)}
        found |= {"q": normal(*first, 3, 5), "k": normal(*first, 3, 5), "v": normal(*first, 3, 7)}
        return {**found, "log_decay": decay(*first, 3, 5), **({"bonus": normal(3, 5)} if bonus else {})}

    def averaged(batch: int, states: int) -> dict[str, Tensor]:
        found = {"k": normal(batch, length, 5), "v": normal(batch, length, 5), "initial_state": normal(states, 2, 5)}
        return {**found, "log_decay": decay(5), "bonus": normal(5)}

    def generalised(batch: int | None, states: int) -> dict[str, Tensor]:
        """A rank of one beside the decays, of keys of length 1."""
        found = gated(batch, states)
        key = torch.nn.functional.normalize(normal(*found["k"].shape), dim=-1)
        found["r"] = found.pop("q")
        return {**found, "a": -key, "b": key * torch.rand(*key.shape, generator=generator)}

    def replacing(batch: int | None, states: int, decays: int | None, n: int = 5, p: int = 7) -> dict[str, Tensor]:
        """Keys of length 1 and half as many heads of them; no decays, one of each head, or one of each channel."""
        first = (states,) if batch is None else (batch, length)
        found = {"state" if batch is None else "initial_state": normal(states, 4, n, p), "v": normal(*first, 4, p)}
        found |= {"q": normal(*first, 2, n), "k": torch.nn.functional.normalize(normal(*first, 2, n), dim=-1)}
        found["beta"] = 2 * torch.rand(*first, 4, generator=generator, dtype=torch.float64)
        return found if decays is None else {**found, "log_decay": decay(*first, 4, *(n,) * decays)}

    groups = {"x": normal(length, 5), "weight": normal(4, 7, 5)}
    window = {"x": normal(3, 5), "state": normal(3, 5, 3), "weight": normal(5, 4), "bias": normal(5)}
    by_state, by_head = update((24,), (24,), 5), update((6, 7), (6, 1), 1)
    soft, soft2 = {"delta_softplus": True}, {"dt_softplus": True, "dt_limit": (0.05, 1.5)}
    plain = {**selective(3, 3, 1, without=("D", "z", "delta_bias")), "delta": 0.3 * normal(3, length, 24).abs()}
    mixed = {**selective(3, 3, 1, without=("C",)), "C": normal(24, 5)}
    both = {"B": normal(24, 5), "C": normal(24, 5, complex=True)}
    fixed = {**selective(1, rows, 1, True, without=("B", "C", "z")), **both}
    shocks = {"ar": 0.2 * normal(5, 2), "ma": 0.5 * normal(5, 3), "variance": normal(5).square() + 0.1}
    narrow = selective(3, 3, 2, without=("z",), width=6)  # groups of fewer channels than a vector has lanes
    seen = {"length": torch.tensor([9, 0, 4, 7])}
    runs, silu, step = {"cu_seqlens": packed}, {"activation": "silu"}, {"dt_softplus": True}
    eight_bits = dict(zip(("weight", "scales"), quantize(normal(5, 70), 32), strict=True), group=32)
    return [
        OpCase("linear_scan", "linear_scan", linear_scan, scan_(3, 3)),
        OpCase("linear_scan complex", "linear_scan", linear_scan, scan_(3, 3, True)),
        OpCase("linear_scan reverse packed", "linear_scan", linear_scan, scan_(1, rows), {**runs, "reverse": True}),
        OpCase("selective_scan", "selective_scan", selective_scan, selective(3, 3), soft),
        OpCase("selective_scan complex", "selective_scan", selective_scan, selective(3, 3, 1, True), soft),
        OpCase("selective_scan packed", "selective_scan", selective_scan, selective(1, rows), {**soft, **runs}),
        OpCase("selective_scan plain", "selective_scan", selective_scan, plain),
        OpCase("selective_scan constant C", "selective_scan", selective_scan, mixed, soft),
        OpCase("selective_scan complex constant", "selective_scan", selective_scan, fixed, {**soft, **runs}),
        OpCase("selective_scan no gate", "selective_scan", selective_scan, narrow, soft),
        OpCase("ssd", "ssd", ssd, dual(3, 3), soft2),
        OpCase("ssd chunk 7", "ssd", ssd, dual(3, 3, 1, (6, 5)), {**soft2, "chunk": 7}),
        OpCase("ssd packed", "ssd", ssd, dual(1, rows), {**soft2, **runs, "chunk": 13}),
        OpCase("ssd seq_idx", "ssd", ssd, dual(3, 3), {**soft2, "seq_idx": ids}),
        OpCase("ssd 20 x 40", "ssd", ssd, dual(3, 3, p=20, n=40), soft2),
        OpCase("gla", "gated_linear_attention", gated_linear_attention, gated(3, 3), {"chunk": 16}),
        OpCase("gla packed", "gated_linear_attention", gated_linear_attention, gated(1, rows, True), runs),
        OpCase("gla step", "gated_linear_attention_update", gated_linear_attention_update, gated(None, 3)),
        OpCase("gla bonus step", "gated_linear_attention_update", gated_linear_attention_update, gated(None, 3, True)),
        OpCase("wkv4", "wkv4", wkv4, averaged(3, 3)),
        OpCase("wkv4 packed", "wkv4", wkv4, averaged(1, rows), runs),
        OpCase("wkv7", "wkv7", wkv7, generalised(3, 3), {"chunk": 16}),
        OpCase("wkv7 packed", "wkv7", wkv7, generalised(1, rows), runs),
        OpCase("wkv7 step", "wkv7_update", wkv7_update, generalised(None, 3)),
        OpCase("delta", "gated_delta_rule", gated_delta_rule, replacing(3, 3, None), {"chunk": 16}),
        OpCase("delta decay", "gated_delta_rule", gated_delta_rule, replacing(3, 3, 0), {"scale": 0.5}),
        OpCase("delta packed", "gated_delta_rule", gated_delta_rule, replacing(1, rows, 0), runs),
        OpCase("delta 40 x 20", "gated_delta_rule", gated_delta_rule, replacing(3, 3, 0, 40, 20)),
        OpCase("delta 16 x 20", "gated_delta_rule", gated_delta_rule, replacing(3, 3, None, 16, 20)),
        OpCase("delta channels", "gated_delta_rule", gated_delta_rule, replacing(3, 3, 1), {"chunk": 16}),
        OpCase("delta channels packed", "gated_delta_rule", gated_delta_rule, replacing(1, rows, 1), runs),
        OpCase("delta step", "gated_delta_rule_update", gated_delta_rule_update, replacing(None, 3, 0)),
        OpCase("delta channels step", "gated_delta_rule_update", gated_delta_rule_update, replacing(None, 3, 1)),
        OpCase("attention", "attention", _attention, tokens(4, 4), seen),
        OpCase("attention window", "attention", _attention, tokens(4, 4), {**seen, "window": 4}),
        OpCase("attention softcap", "attention", _attention, tokens(4, 4, 7), {**seen, "softcap": 1.5}),
        OpCase("attention packed", "attention", _attention, tokens(1, rows), {**seen, **runs}),
        OpCase("attention packed window", "attention", _attention, tokens(1, rows), {**seen, **runs, "window": 9}),
        OpCase("causal_conv1d", "causal_conv1d", causal_conv1d, conv(3, 3), silu),
        OpCase("causal_conv1d width 1", "causal_conv1d", causal_conv1d, conv(3, 3, 1)),
        OpCase("causal_conv1d wide", "causal_conv1d", causal_conv1d, conv(3, 3, 19), silu),
        OpCase("causal_conv1d wide packed", "causal_conv1d", causal_conv1d, conv(1, rows, 70), {**silu, **runs}),
        OpCase("causal_conv1d packed", "causal_conv1d", causal_conv1d, conv(1, rows), {**silu, **runs}),
        OpCase("causal_conv1d seq_idx", "causal_conv1d", causal_conv1d, conv(3, 3), {**silu, "seq_idx": ids}),
        OpCase("causal_conv1d_update", "causal_conv1d_update", causal_conv1d_update, window, silu),
        OpCase("selective_state_update", "selective_state_update", selective_state_update, by_state, step),
        OpCase("selective_state_update heads", "selective_state_update", selective_state_update, by_head, step),
        OpCase("cauchy_kernel complex", "cauchy_kernel", cauchy_kernel, low_rank(1), {"length": length}),
        OpCase("cauchy_kernel complex rank 2", "cauchy_kernel", cauchy_kernel, low_rank(2), {"length": length}),
        OpCase("diagonal_ssm complex", "diagonal_ssm", diagonal_ssm, diagonal(3, 3)),
        OpCase("diagonal_ssm complex packed", "diagonal_ssm", diagonal_ssm, diagonal(1, rows), runs),
        OpCase("mimo_ssm complex", "mimo_ssm", mimo_ssm, many(3, 3)),
        OpCase("mimo_ssm complex intervals packed", "mimo_ssm", mimo_ssm, many(1, rows, True), runs),
        OpCase("irregular_ssm complex", "irregular_ssm", irregular_ssm, irregular(3, 3)),
        OpCase("irregular_ssm complex packed", "irregular_ssm", irregular_ssm, irregular(1, rows), runs),
        OpCase("irregular_scan", "irregular_scan", irregular_scan, irregular_selective(3, 3)),
        OpCase("irregular_scan packed", "irregular_scan", irregular_scan, irregular_selective(1, rows), runs),
        OpCase("dplr_ssm complex", "dplr_ssm", _dplr_ssm, low_rank_ssm(3, 3, 1)),
        OpCase("dplr_ssm complex packed", "dplr_ssm", _dplr_ssm, low_rank_ssm(1, rows, 2), runs),
        OpCase("add_norm", "add_norm", add_norm, rows_of(5, "residual")),
        OpCase("add_norm centered", "add_norm", add_norm, rows_of(17, "residual"), {"center": True}),
        OpCase("gated_norm", "gated_norm", gated_norm, rows_of(6, "z"), {"groups": 2}),
        OpCase("gated_norm before gate", "gated_norm", gated_norm, rows_of(17, "z"), {"norm_before_gate": True}),
        OpCase("gated_norm centered", "gated_norm", gated_norm, rows_of(9, "z"), {"groups": 3, "center": True}),
        OpCase("gated_norm no gate", "gated_norm", gated_norm, rows_of(5), {"center": True}),
        OpCase("fft_conv", "fft_conv", fft_conv, long(length)),
        OpCase("fft_conv short filter", "fft_conv", fft_conv, long(3)),
        OpCase("fft_conv long filter", "fft_conv", fft_conv, long(2 * length + 1)),
        OpCase("long_conv", "long_conv", long_conv, behind(3, 3, 4)),
        OpCase("long_conv packed", "long_conv", long_conv, behind(1, rows, 20), runs),
        OpCase("lstm", "lstm", lstm, gates(3, 3)),
        OpCase("lstm packed", "lstm", lstm, gates(1, rows), runs),
        OpCase("slstm", "slstm", slstm, scaled_gates(3, 3)),
        OpCase("slstm packed", "slstm", slstm, scaled_gates(1, rows), runs),
        OpCase("grouped_linear", "grouped_linear", grouped_linear, groups, {"ends": packed[1:].long()}),
        OpCase("kalman_filter", "kalman_filter", kalman_filter, gaussian(3, 5, 2), missing(3, 2)),
        OpCase("kalman_filter level", "kalman_filter", kalman_filter, gaussian(9, 1, 1), missing(9, 1)),
        OpCase("kalman_smoother", "kalman_smoother", kalman_smoother, gaussian(3, 5, 2), missing(3, 2)),
        OpCase("kalman_smoother level", "kalman_smoother", kalman_smoother, gaussian(9, 1, 1), missing(9, 1)),
        OpCase("arma_likelihood", "arma_likelihood", arma_likelihood, {**shocks, "y": normal(5, length)}),
        OpCase("linear", "linear", linear, {"x": normal(3, 17), "weight": normal(5, 17), "bias": normal(5)}),
        OpCase("quantized_linear", "quantized_linear", quantized_linear, {"x": normal(3, 70)}, eight_bits),
        *(OpCase(*case) for case in block_cases(normal) + markov_cases(normal, length)),
        OpCase("vandermonde_kernel complex", "vandermonde_kernel", vandermonde_kernel, poles, {"length": length}),
    ]
