"""Random arguments of every operator: valid ones, the same in other memory, and ones that do not fit."""

import functools
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from dualform.check.block_steps import (
    attention_block,
    head_block,
    lti_block,
    mamba2_block,
    mamba_block,
    mlp_block,
)
from dualform.core.dplr import DiscreteDPLR
from dualform.core.int8 import quantize
from dualform.ops.attention import Past
from dualform.ops.attention_step import AttentionWeights
from dualform.ops.head_step import HeadWeights
from dualform.ops.lti_step import LtiWeights
from dualform.ops.mamba2_step import Mamba2Weights
from dualform.ops.mamba_step import MATRICES, MambaWeights
from dualform.ops.mlp_step import ACTIVATIONS, MLPWeights

Arguments = dict[str, Any]
FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Draw:
    """The random choices of one call."""

    def __init__(self, seed: int, device: str):
        self.random, self.device = Random(seed), torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice(FLOATS)

    @property
    def real(self) -> torch.dtype:
        """That of a state."""
        return torch.promote_types(self.dtype, torch.float32)

    def one(self, *values: Any) -> Any:
        return self.random.choice(values)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(*shape, generator=self.generator, dtype=wide).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)

    def maybe(self, make: Callable[[], Any], probability: float = 0.5) -> Any:
        return make() if self.chance(probability) else None

    def batch(self) -> tuple[int, int, Tensor | None]:
        """Rows, steps, and cumulative lengths or None."""
        length = self.one(0, 1, 2, 5, 9, 33, 65, 70)
        if self.chance(0.5):
            return self.one(0, 1, 2, 3), length, None
        borders = sorted(self.random.randint(0, length) for _ in range(self.random.randint(0, 4)))
        return 1, length, torch.tensor([0, *borders, length], dtype=self.one(torch.int32, torch.int64))

    def state(self, batch: int, cu_seqlens: Tensor | None, *shape: int, dtype: torch.dtype | None = None) -> Any:
        rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
        return self.maybe(lambda: self.normal(rows, *shape, dtype=dtype or self.real))

    def ids(self, batch: int, length: int) -> Any:
        kind = self.one(torch.int32, torch.int64)
        return self.maybe(lambda: torch.randint(-1, 2, (batch, length), generator=self.generator, dtype=kind))

    def rows(self, batch: int) -> Tensor | None:
        """For each row of a batch a row of a table of two more, no row twice, or -1; or None."""
        found = [self.one(i, i, -1) for i in self.random.sample(range(batch + 2), batch)]
        return self.maybe(lambda: torch.tensor(found, dtype=self.one(torch.int32, torch.int64)))

    def table(self, batch: int, rows: Tensor | None) -> int:
        """How many rows a state has."""
        return batch if rows is None else batch + 2

    def dividing(self, size: int) -> int:
        return self.random.choice([n for n in (1, 2, 3, size) if n and size % n == 0] or [1])


def selective_scan(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    width, states = draw.one(1, 3, 8, 17, 33), draw.one(0, 1, 3, 4, 16)
    softplus = draw.chance(0.5)

    def map_() -> Tensor:
        constant = draw.chance(0.2)
        return draw.normal(width, states) if constant else draw.normal(batch, length, draw.dividing(width), states)

    return {
        "u": draw.normal(batch, length, width),
        "delta": draw.normal(batch, length, width) if softplus else draw.uniform(batch, length, width),
        "A": -draw.uniform(width, states, dtype=draw.real),
        "B": map_(),
        "C": map_(),
        "D": draw.maybe(lambda: draw.normal(width)),
        "z": draw.maybe(lambda: draw.normal(batch, length, width)),
        "delta_bias": draw.maybe(lambda: draw.uniform(width, dtype=draw.real)),
        "delta_softplus": softplus,
        "initial_state": draw.state(batch, cu_seqlens, width, states),
        "cu_seqlens": cu_seqlens,
    }


def selective_state_update(draw: Draw) -> Arguments:
    batch, states, by_head = draw.one(0, 1, 3), draw.one(0, 1, 3, 16, 20), draw.chance(0.5)
    inner = (draw.one(1, 2, 6), draw.one(1, 5, 16)) if by_head else (draw.one(1, 3, 8, 17, 64),)
    one = (inner[0], 1) if by_head and draw.chance(0.7) else inner
    rates = (*one, 1) if by_head and one != inner else (*inner, states)
    rows = draw.rows(batch)
    state = draw.normal(draw.table(batch, rows), *inner, states, dtype=draw.one(draw.real, draw.dtype))
    return {
        "state": state,
        "x": draw.normal(batch, *inner),
        "dt": draw.uniform(batch, *one),
        "A": -draw.uniform(*rates, dtype=draw.real),
        "B": draw.normal(batch, draw.dividing(inner[0]), states),
        "C": draw.normal(batch, draw.dividing(inner[0]), states),
        "D": draw.maybe(lambda: draw.normal(*one)),
        "z": draw.maybe(lambda: draw.normal(batch, *inner)),
        "dt_bias": draw.maybe(lambda: draw.normal(*one)),
        "dt_softplus": draw.chance(0.5),
        "out_state": draw.maybe(lambda: draw.one(state, torch.zeros_like(state)), 0.2),
        "rows": rows,
    }


def ssd(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    heads, width, states = draw.one(1, 2, 6), draw.one(1, 3, 8, 20), draw.one(0, 1, 5, 16)
    groups = draw.dividing(heads)
    return {
        "x": draw.normal(batch, length, heads, width),
        "dt": draw.uniform(batch, length, heads),
        "A": -draw.uniform(heads, dtype=draw.real),
        "B": draw.normal(batch, length, groups, states),
        "C": draw.normal(batch, length, groups, states),
        "D": draw.maybe(lambda: draw.normal(*draw.one((heads,), (heads, width)))),
        "z": draw.maybe(lambda: draw.normal(batch, length, heads, width)),
        "dt_bias": draw.maybe(lambda: draw.normal(heads, dtype=draw.real)),
        "dt_softplus": draw.chance(0.5),
        "initial_state": draw.state(batch, cu_seqlens, heads, width, states),
        "cu_seqlens": cu_seqlens,
        "seq_idx": draw.ids(batch, length) if cu_seqlens is None else None,
        "chunk": draw.one(None, 1, 16, 64),
    }


def _gated(draw: Draw, *keys: str) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    heads, states, width = draw.one(1, 2, 6), draw.one(0, 1, 5, 16), draw.one(0, 1, 3, 20)
    return {
        **{key: 0.3 * draw.normal(batch, length, heads, states) for key in keys},
        "v": draw.normal(batch, length, heads, width),
        "log_decay": -draw.one(0.01, 1.0, 100.0) * draw.uniform(batch, length, heads, states),
        "initial_state": draw.state(batch, cu_seqlens, heads, states, width),
        "cu_seqlens": cu_seqlens,
        "chunk": draw.one(None, 1, 16, 64),
    }


def _gated_update(draw: Draw, *keys: str) -> Arguments:
    heads, states, width = draw.one(1, 2, 6), draw.one(0, 1, 5, 16), draw.one(0, 1, 3, 20)
    batch = draw.one(0, 1, 3)
    rows = draw.rows(batch)
    state = draw.normal(draw.table(batch, rows), heads, states, width, dtype=draw.one(draw.dtype, draw.real))
    return {
        "state": state,
        **{key: draw.normal(batch, heads, states) for key in keys},
        "v": draw.normal(batch, heads, width),
        "log_decay": -draw.uniform(batch, heads, states),
        "out_state": draw.maybe(lambda: draw.one(state, torch.zeros_like(state)), 0.2),
        "rows": rows,
    }


def gated_linear_attention(draw: Draw) -> Arguments:
    found = _gated(draw, "q", "k")
    return {**found, "bonus": draw.maybe(lambda: draw.normal(*found["q"].shape[2:]))}


def gated_linear_attention_update(draw: Draw) -> Arguments:
    found = _gated_update(draw, "q", "k")
    return {**found, "bonus": draw.maybe(lambda: draw.normal(*found["q"].shape[1:]))}


def wkv4(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    width = draw.one(0, 1, 5, 33)
    return {
        "k": draw.normal(batch, length, width),
        "v": draw.normal(batch, length, width),
        "log_decay": -draw.uniform(width),
        "bonus": draw.normal(width),
        "initial_state": draw.state(batch, cu_seqlens, 2, width),
        "cu_seqlens": cu_seqlens,
    }


def wkv7(draw: Draw) -> Arguments:
    return _gated(draw, "r", "k", "a", "b")


def wkv7_update(draw: Draw) -> Arguments:
    return _gated_update(draw, "r", "k", "a", "b")


def _decays(draw: Draw, found: Arguments) -> Arguments:
    """Shared keys, and decays of each key channel, of each head, or none, in place of those drawn before."""
    decay, groups = found["log_decay"], draw.dividing(found["v"].shape[-2])
    shared = {key: found[key][..., :groups, :] for key in ("q", "k")}
    found |= {**shared, "log_decay": draw.one(decay, decay.mean(-1) if decay.shape[-1] else None, None)}
    return {**found, "beta": draw.uniform(*found["v"].shape[:-1]), "scale": draw.one(1.0, 0.3)}


def gated_delta_rule(draw: Draw) -> Arguments:
    return _decays(draw, _gated(draw, "q", "k"))


def gated_delta_rule_update(draw: Draw) -> Arguments:
    return _decays(draw, _gated_update(draw, "q", "k"))


def linear_scan(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    shape = draw.one((), (1,), (7,), (3, 5), (33,))
    number = torch.promote_types(draw.real, torch.complex64) if draw.chance(0.4) else draw.dtype
    a = 0.9 * draw.uniform(*draw.one((batch, length), (1, 1)), *shape)
    return {
        "a": (torch.polar(a.to(draw.real), 3 * a.to(draw.real)) if number.is_complex and draw.chance(0.8) else a),
        "b": draw.normal(batch, length, *shape, dtype=number),
        "initial_state": draw.state(batch, cu_seqlens, *shape, dtype=torch.promote_types(number, torch.float32)),
        "cu_seqlens": cu_seqlens,
        "reverse": draw.chance(0.5),
    }


def diagonal_ssm(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    width, states = draw.one(1, 3, 8, 17, 33), draw.one(0, 1, 3, 4, 16)
    number = torch.promote_types(draw.real, torch.complex64)
    size, angle = 0.9 * draw.uniform(width, states, dtype=draw.real), draw.uniform(width, states, dtype=draw.real)
    return {
        "u": draw.normal(batch, length, width),
        "Abar": torch.polar(size, 6 * angle),
        "CB": draw.normal(width, states, dtype=number),
        "initial_state": draw.state(batch, cu_seqlens, width, states, dtype=number),
        "cu_seqlens": cu_seqlens,
    }


def causal_conv1d(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    width, taps = draw.one(1, 3, 8, 17, 33), draw.one(1, 2, 4, 6)
    return {
        "x": draw.normal(batch, length, width),
        "weight": draw.normal(width, taps),
        "bias": draw.maybe(lambda: draw.normal(width)),
        "activation": draw.one(None, "silu"),
        "initial_state": draw.state(batch, cu_seqlens, width, taps - 1),
        "cu_seqlens": cu_seqlens,
        "seq_idx": draw.ids(batch, length) if cu_seqlens is None else None,
    }


def causal_conv1d_update(draw: Draw) -> Arguments:
    batch, width, taps = draw.one(0, 1, 3), draw.one(1, 3, 8, 17, 64), draw.one(1, 2, 4, 6)
    rows, steps, size = draw.rows(batch), draw.one((), (), (0,), (1,), (2,), (9,)), taps - 1 + draw.one(0, 0, 1, 5)
    state = draw.normal(draw.table(batch, rows), width, size, dtype=draw.one(draw.real, draw.dtype))
    seen = torch.tensor([draw.random.randint(0, 20) for _ in range(batch)], dtype=draw.one(torch.int32, torch.int64))
    return {
        "x": draw.normal(batch, *steps, width),
        "state": state,
        "weight": draw.normal(width, taps),
        "bias": draw.maybe(lambda: draw.normal(width)),
        "activation": draw.one(None, "silu"),
        "out_state": draw.maybe(lambda: draw.one(state, torch.zeros_like(state)), 0.2),
        "rows": rows,
        "cache_seqlens": draw.maybe(lambda: seen) if size > 0 else None,
    }


def fft_conv(draw: Draw) -> Arguments:
    batch, length, width = draw.one(0, 1, 3), draw.one(0, 1, 9, 33), draw.one(1, 3, 17)
    return {
        "u": draw.normal(batch, length, width),
        "k": draw.normal(width, draw.one(1, 4, 40)),
        "D": draw.maybe(lambda: draw.normal(width)),
    }


def cauchy_kernel(draw: Draw) -> Arguments:
    width, states, rank = draw.one(1, 3), draw.one(1, 4), draw.one(1, 2)
    number = torch.promote_types(draw.real, torch.complex64)
    poles = torch.complex(-0.5 - draw.uniform(width, states, dtype=draw.real), draw.normal(width, states).to(draw.real))
    B, C = (draw.normal(width, states, dtype=number) for _ in range(2))
    P = 0.1 * draw.normal(rank, width, states, dtype=number)
    dt = 0.1 + draw.uniform(width, dtype=draw.real)
    return {"A": poles, "P": P, "B": B, "C": C, "dt": dt, "length": draw.one(0, 1, 16)}


def vandermonde_kernel(draw: Draw) -> Arguments:
    width, states = draw.one(1, 3, 17), draw.one(0, 1, 4)
    number = torch.promote_types(draw.real, torch.complex64)
    poles = torch.complex(-draw.uniform(width, states, dtype=draw.real), draw.normal(width, states).to(draw.real))
    return {
        "log_poles": poles,
        "weights": draw.normal(width, states, dtype=number),
        "length": draw.one(0, 1, 9, 40),
    }


def dplr_ssm(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    width, states = draw.one(1, 3), draw.one(1, 4)
    number = torch.promote_types(draw.real, torch.complex64)
    poles = torch.complex(-0.5 - draw.uniform(width, states, dtype=draw.real), draw.normal(width, states).to(draw.real))
    P, B, C = (0.3 * draw.normal(*shape, width, states, dtype=number) for shape in ((1,), (), ()))
    system = DiscreteDPLR.of(poles, P, B, 0.1 + draw.uniform(width, dtype=draw.real))
    return {
        "u": draw.normal(batch, length, width),
        "system": DiscreteDPLR(*(m.to(draw.device) for m in system)),
        "C": C,
        "initial_state": draw.state(batch, cu_seqlens, width, states, dtype=number),
        "cu_seqlens": cu_seqlens,
    }


def irregular_scan(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    width, states = draw.one(1, 3, 17), draw.one(1, 4, 5)
    return {
        "u": draw.normal(batch, length, width),
        "intervals": 0.5 + draw.uniform(batch, length),
        "dt": 0.1 + draw.uniform(batch, length, width),
        "A": -0.1 - draw.uniform(width, states, dtype=draw.real),
        "B": draw.normal(batch, length, states),
        "C": draw.normal(batch, length, states),
        "initial_state": draw.state(batch, cu_seqlens, width, states),
        "cu_seqlens": cu_seqlens,
    }


def irregular_ssm(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    width, states = draw.one(1, 3, 17), draw.one(1, 4, 5)
    number = torch.promote_types(draw.real, torch.complex64)
    rate, angle = (0.1 + draw.uniform(width, states, dtype=draw.real) for _ in range(2))
    return {
        "u": draw.normal(batch, length, width),
        "intervals": 0.5 + draw.uniform(batch, length),
        "log_a": torch.complex(-rate, angle),
        "B": draw.normal(width, states, dtype=number),
        "C": draw.normal(width, states, dtype=number),
        "initial_state": draw.state(batch, cu_seqlens, width, states, dtype=number),
        "cu_seqlens": cu_seqlens,
    }


def mimo_ssm(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    width, states, irregular = draw.one(1, 3, 17), draw.one(1, 4, 5), draw.chance(0.5)
    number = torch.promote_types(draw.real, torch.complex64)
    rate, angle = (0.1 + draw.uniform(states, dtype=draw.real) for _ in range(2))
    log_a = torch.complex(-rate, angle)
    return {
        "u": draw.normal(batch, length, width),
        "decay": log_a if irregular else log_a.exp(),
        "B": draw.normal(states, width, dtype=number),
        "C": draw.normal(width, states, dtype=number),
        "initial_state": draw.state(batch, cu_seqlens, states, dtype=number),
        "intervals": 0.5 + draw.uniform(batch, length) if irregular else None,
        "cu_seqlens": cu_seqlens,
    }


def attention(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    rows, heads, width = batch if cu_seqlens is None else len(cu_seqlens) - 1, draw.one(1, 2, 6), draw.one(1, 4, 5)
    shared, window, slots = draw.dividing(heads), draw.one(None, 1, 3, 9), draw.one(0, 4, 9)
    slots, most = (slots, slots) if window is None else (window, 20)
    values = draw.one(width, 3)

    def past() -> Past:
        k, v = (draw.normal(rows, slots, shared, size).to(draw.device) for size in (width, values))
        lengths = torch.tensor([draw.random.randint(0, most) for _ in range(rows)], dtype=torch.int64)
        return Past(k, v, lengths.to(draw.device))

    return {
        "q": draw.normal(batch, length, heads, width),
        "k": draw.normal(batch, length, shared, width),
        "v": draw.normal(batch, length, shared, values),
        "past": draw.maybe(past),
        "window": window,
        "softcap": draw.one(None, 0.7),
        "cu_seqlens": cu_seqlens,
    }


def long_conv(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    width = draw.one(1, 3, 17)
    return {
        "u": draw.normal(batch, length, width),
        "k": draw.normal(width, draw.one(1, 4, 40)),
        "past": draw.state(batch, cu_seqlens, draw.one(0, 3, 50), width, dtype=draw.dtype),
        "cu_seqlens": cu_seqlens,
    }


def lstm(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    rows, width, hidden = batch if cu_seqlens is None else len(cu_seqlens) - 1, draw.one(1, 3), draw.one(1, 5)
    return {
        "x": draw.normal(batch, length, width),
        "h": draw.normal(rows, hidden),
        "c": draw.normal(rows, hidden),
        "input_weight": draw.normal(4 * hidden, width),
        "hidden_weight": draw.normal(4 * hidden, hidden),
        "input_bias": draw.normal(4 * hidden),
        "hidden_bias": draw.normal(4 * hidden),
        "cu_seqlens": cu_seqlens,
    }


def slstm(draw: Draw) -> Arguments:
    batch, length, cu_seqlens = draw.batch()
    rows, heads, width = batch if cu_seqlens is None else len(cu_seqlens) - 1, draw.one(1, 3), draw.one(1, 5)
    return {
        "gates": draw.normal(batch, length, 4, heads, width),
        "weight": draw.normal(4, heads, width, width),
        **{name: draw.normal(rows, heads, width) for name in "hcm"},
        "n": draw.normal(rows, heads, width).exp(),
        "cu_seqlens": cu_seqlens,
    }


def grouped_linear(draw: Draw) -> Arguments:
    counts = torch.tensor([draw.one(0, 1, 3, 17) for _ in range(draw.one(1, 2, 5))], dtype=torch.int64)
    width, ends = draw.one(1, 3, 8), counts.cumsum(0)
    x = draw.normal(int(ends[-1]), width)
    return {
        "x": x,
        "weight": draw.normal(len(ends), draw.one(1, 5, 16), width, dtype=x.dtype),
        "ends": ends.to(x.device),
    }


def rows(draw: Draw, width: int) -> tuple[int, ...]:
    return (*draw.one((), (0,), (3,), (2, 5), (1, 40), (2, 1, 3)), width)


def add_norm(draw: Draw) -> Arguments:
    shape = rows(draw, draw.one(1, 3, 17, 33, 100))
    return {
        "x": draw.normal(*shape),
        "residual": draw.normal(*shape, dtype=draw.one(draw.dtype, draw.real)),
        "weight": draw.normal(shape[-1], dtype=draw.one(draw.dtype, draw.real)),
        "bias": draw.maybe(lambda: draw.normal(shape[-1])),
        "eps": draw.one(1e-5, 0.1),
        "center": draw.chance(0.5) and shape[-1] > 1,
        "dtype": draw.one(None, draw.dtype, draw.real),
        "residual_dtype": draw.one(None, draw.dtype, draw.real),
    }


def gated_norm(draw: Draw) -> Arguments:
    groups, size = draw.one(1, 2, 3), draw.one(1, 3, 17, 40)
    shape = rows(draw, groups * size)
    return {
        "x": draw.normal(*shape),
        "weight": draw.normal(shape[-1], dtype=draw.one(draw.dtype, draw.real)),
        "bias": draw.maybe(lambda: draw.normal(shape[-1])),
        "z": draw.maybe(lambda: draw.normal(*shape)),
        "groups": groups,
        "eps": draw.one(1e-3, 0.1),
        "center": draw.chance(0.5) and size > 1,
        "norm_before_gate": draw.chance(0.5),
        "dtype": draw.one(None, draw.dtype, draw.real),
    }


def kalman_filter(draw: Draw) -> Arguments:
    """Noise at every observation, so that what is computed in another order is the same but for rounding."""
    rows, length = draw.one(0, 1, 2, 3, 9, 17), draw.one(0, 1, 2, 5, 33)
    n, m = draw.one(1, 1, 2, 3, 4, 5, 17), draw.one(0, 1, 1, 2, 5)
    steps = (rows if draw.chance(0.5) else 1, length if draw.chance(0.5) else 1)

    def spread(x: Tensor) -> Tensor:
        return x.to(draw.dtype).expand(rows, length, *x.shape[2:])

    def covariance(*shape: int) -> Tensor:
        root = draw.normal(*shape, shape[-1], dtype=torch.float64)
        return root @ root.mT / max(1, shape[-1]) + torch.eye(shape[-1], dtype=torch.float64)

    return {
        "A": spread(draw.normal(*steps, n, n) * (0.7 / n**0.5)),
        "c": spread(draw.normal(*steps, n)),
        "Q": spread(covariance(*steps, n)),
        "C": spread(draw.normal(*steps, m, n)),
        "R": spread(covariance(*steps, m)),
        "y": draw.normal(rows, length, m),
        "seen": draw.uniform(rows, length, m, dtype=torch.float64) < draw.one(0.7, 2.0),
        "mean": draw.normal(rows, n),
        "cov": covariance(rows, n).to(draw.dtype),
        "moments": draw.chance(0.5),
    }


def kalman_smoother(draw: Draw) -> Arguments:
    return {name: value for name, value in kalman_filter(draw).items() if name != "moments"}


def markov_filter(draw: Draw) -> Arguments:
    rows, length, states = draw.one(0, 1, 2, 3, 9), draw.one(0, 1, 2, 5, 33), draw.one(1, 1, 2, 3, 8, 17, 33, 70)
    steps = (rows if draw.chance(0.5) else 1, max(length - 1, 0) if draw.chance(0.5) else 1)
    moves = draw.normal(*steps, states, states).softmax(-1)
    return {
        "start": draw.normal(rows, states).softmax(-1),
        "A": moves.expand(rows, max(length - 1, 0), states, states),
        "log_b": draw.normal(rows, length, states) * draw.one(1.0, 5.0),
    }


def markov_smoother(draw: Draw) -> Arguments:
    given = markov_filter(draw)
    p = draw.normal(*given["log_b"].shape).softmax(-1)
    return {"p": p, "A": given["A"], "log_b": given["log_b"], "messages": draw.chance(0.5)}


def markov_path(draw: Draw) -> Arguments:
    given = markov_filter(draw)
    rows, length, _ = given["log_b"].shape
    lengths = draw.maybe(lambda: torch.randint(length + 1, (rows,), generator=draw.generator))
    return {**given, "start": given["start"].log(), "A": given["A"].log(), "lengths": lengths}


def arma_likelihood(draw: Draw) -> Arguments:
    rows, length = draw.one(0, 1, 2, 3, 9, 17), draw.one(0, 1, 2, 5, 33, 70)
    p, q = draw.one(0, 1, 2, 13), draw.one(0, 1, 3, 13)
    return {
        "ar": 0.5 / max(1, p) * draw.uniform(rows, p),
        "ma": 0.3 * draw.normal(rows, q),
        "variance": draw.uniform(rows) + 0.5,
        "y": draw.normal(rows, length),
    }


def linear(draw: Draw) -> Arguments:
    batch, width, outputs = draw.one(0, 1, 3, 16, 17), draw.one(0, 1, 3, 17, 64, 100), draw.one(1, 3, 4, 33)
    return {
        "x": draw.normal(batch, width),
        "weight": draw.normal(outputs, width),
        "bias": draw.maybe(lambda: draw.normal(outputs)),
    }


def group_of(draw: Draw) -> int:
    """Of neighbours that share a scale."""
    return draw.one(32, 64, 2**20)


def quantized_linear(draw: Draw) -> Arguments:
    batch, width, outputs = draw.one(0, 1, 3, 16, 17), draw.one(0, 1, 3, 17, 64, 100), draw.one(1, 3, 4, 33)
    group = group_of(draw)
    weight, scales = quantize(draw.normal(outputs, width), group)
    return {
        "x": draw.normal(batch, width),
        "weight": weight,
        "scales": scales,
        "bias": draw.maybe(lambda: draw.normal(outputs)),
        "group": group,
    }


def block(
    draw: Draw,
    tensors: dict[str, Tensor],
    weights: Any,
    optional: tuple[str, ...],
    states: tuple[str, ...] = ("conv", "h"),
) -> Arguments:
    """A step of a block: matrices of 16 bits beside float32 at times, optional tensors left out, some out of place."""
    narrow = draw.real if draw.real == torch.float64 else draw.dtype
    kept = {k: m for k, m in tensors.items() if k not in optional or draw.chance(0.5)}
    group = group_of(draw) if narrow == torch.float32 and draw.chance(0.5) else 0
    if group:
        for name in sorted(kept.keys() & MATRICES.keys()):
            if name == next(iter(MATRICES)) or draw.chance(0.8):  # others may be floats
                kept[name], kept[MATRICES[name]] = quantize(kept[name], group)
    whole = {k for k in kept if kept[k].dtype == torch.int8}
    cast = {k: m if k in whole else m.to(narrow if k in MATRICES else draw.real) for k, m in kept.items()}
    cast = {k: laid_out(m, draw) for k, m in cast.items()}
    given = {k: cast.pop(k) for k in ("x", *states)}
    return {**given, "weights": weights(**{name: cast.get(name) for name in weights._fields}), "group": group}


def mamba_step(draw: Draw) -> Arguments:
    sizes = (
        draw.one(0, 1, 3, 16, 35),
        *(draw.one(1, 3, 17, 33) for _ in range(2)),
        *(draw.one(1, 2, 5) for _ in range(3)),
    )
    optional = ("in_bias", "conv_bias", "out_bias")
    normal = functools.partial(draw.normal, dtype=torch.float64)
    return {
        **block(draw, mamba_block(normal, bias=True, sizes=sizes), MambaWeights, optional),
        "eps": draw.one(1e-5, 0.1),
    }


def mamba2_step(draw: Draw) -> Arguments:
    groups, rows = draw.one(1, 2, 3), draw.one(0, 1, 3, 16, 35)
    sizes = (
        rows,
        draw.one(1, 3, 17, 33),
        groups * draw.one(1, 2),
        *(draw.one(1, 4, 5, 19) for _ in range(2)),
        draw.one(1, 4),
    )
    optional = ("in_bias", "conv_bias", "out_bias", "gate")
    normal = functools.partial(draw.normal, dtype=torch.float64)
    return {
        **block(draw, mamba2_block(normal, groups, bias=True, sizes=sizes), Mamba2Weights, optional),
        "groups": groups,
        "eps": draw.one(1e-5, 0.1),
        "gate_eps": 0.1,
        "norm_before_gate": draw.chance(0.5),
        "dt_limit": draw.one((0.0, float("inf")), (0.1, 0.5)),
    }


def lti_step(draw: Draw) -> Arguments:
    sizes = (draw.one(0, 1, 3, 16, 35), draw.one(1, 3, 17, 33), draw.one(1, 2, 5, 19))
    normal = functools.partial(draw.normal, dtype=torch.float64)
    made = lti_block(normal, shared=draw.chance(0.5), gate=draw.chance(0.5), bias=draw.chance(0.5), sizes=sizes)
    narrow = draw.real if draw.real == torch.float64 else draw.dtype

    def cast(name: str, m: Tensor) -> Tensor:
        if name in ("h", "a", "b", "C"):
            return laid_out(torch.view_as_complex(m.to(draw.real)), draw)
        return laid_out(m.to(narrow if name == "out_weight" else draw.real), draw)

    given = {name: cast(name, m) for name, m in made.items()}
    x, h = given.pop("x"), given.pop("h")
    return {"x": x, "h": h, "weights": LtiWeights(**{"out_bias": None, **given}), "eps": draw.one(1e-5, 0.1)}


def attention_step(draw: Draw) -> Arguments:
    groups, ring = draw.one(1, 2, 3), draw.chance(0.5)
    rows, slots = draw.one(0, 1, 3, 16), draw.one(1, 2, 7, 70, 130)
    width, values = draw.one(1, 3, 8, 19, 33), draw.one(1, 5, 16, 41)
    sizes = (rows, draw.one(1, 3, 17, 33), groups * draw.one(1, 2), groups, width, values, slots)
    made = attention_block(functools.partial(draw.normal, dtype=torch.float64), bias=True, sizes=sizes)
    k, v = made.pop("k"), made.pop("v")
    given = block(draw, made, AttentionWeights, ("in_bias", "out_bias"), states=())
    held = draw.one(draw.real, draw.dtype)
    frequencies = draw.uniform(draw.random.randint(0, width // 2), dtype=torch.float64)
    given["weights"] = given["weights"]._replace(frequencies=laid_out(frequencies, draw))
    length = torch.tensor([draw.random.randrange(3 * slots if ring else slots) for _ in range(rows)], dtype=torch.int64)
    return {
        **given,
        "k": laid_out(k.to(held), draw),
        "v": laid_out(v.to(held), draw),
        "length": laid_out(length, draw),
        "heads": sizes[2],
        "ring": ring,
        "interleaved": draw.chance(0.5),
        "factor": draw.one(None, 0.3),
        "softcap": draw.one(None, 2.0),
        "magnitude": draw.one(1.0, 1.2),
        "eps": draw.one(1e-5, 0.1),
    }


def mlp_step(draw: Draw) -> Arguments:
    sizes, gated = (draw.one(0, 1, 3, 16), draw.one(1, 3, 17, 33), draw.one(1, 5, 19)), draw.chance(0.5)
    made = mlp_block(functools.partial(draw.normal, dtype=torch.float64), gated=gated, bias=True, sizes=sizes)
    return {
        **block(draw, made, MLPWeights, ("in_bias", "out_bias"), states=()),
        "gated": gated,
        "activation": draw.one(*ACTIVATIONS),
        "factor": draw.one(1.0, 0.3),
        "eps": draw.one(1e-5, 0.1),
    }


def head_step(draw: Draw) -> Arguments:
    sizes = draw.one(0, 1, 3, 16), draw.one(1, 3, 17, 33), draw.one(1, 5, 19)
    made = head_block(functools.partial(draw.normal, dtype=torch.float64), bias=True, sizes=sizes)
    return {
        **block(draw, made, HeadWeights, ("out_bias",), states=()),
        "factor": draw.one(1.0, 0.3),
        "cap": draw.one(None, 2.0),
        "eps": draw.one(1e-5, 0.1),
        "dtype": draw.one(None, draw.dtype),
    }


CALLS: dict[str, Callable[[Draw], Arguments]] = {
    make.__name__: make
    for make in (
        selective_scan,
        selective_state_update,
        ssd,
        gated_delta_rule,
        gated_delta_rule_update,
        gated_linear_attention,
        gated_linear_attention_update,
        wkv4,
        wkv7,
        wkv7_update,
        linear_scan,
        diagonal_ssm,
        causal_conv1d,
        causal_conv1d_update,
        add_norm,
        gated_norm,
        fft_conv,
        cauchy_kernel,
        vandermonde_kernel,
        dplr_ssm,
        irregular_scan,
        irregular_ssm,
        mimo_ssm,
        attention,
        long_conv,
        lstm,
        slstm,
        grouped_linear,
        kalman_filter,
        kalman_smoother,
        markov_filter,
        markov_smoother,
        markov_path,
        arma_likelihood,
        linear,
        quantized_linear,
        mamba_step,
        mamba2_step,
        lti_step,
        attention_step,
        mlp_step,
        head_step,
    )
}
# Those without kernels.
PORTABLE = {
    "gated_delta_rule_update",
    "gated_linear_attention",
    "gated_linear_attention_update",
    "wkv4",
    "wkv7_update",
    "fft_conv",
    "cauchy_kernel",
    "vandermonde_kernel",
    "dplr_ssm",
    "irregular_scan",
    "irregular_ssm",
    "mimo_ssm",
    "attention",
    "long_conv",
    "lstm",
    "slstm",
    "grouped_linear",
}


# The same numbers in other memory, and arguments that do not fit.


def laid_out(x: Tensor, draw: Draw) -> Tensor:
    """The same numbers on the device, at times with other strides, beside NaN, or as a view that conjugates."""
    x = x.to(draw.device)
    how = draw.one("plain", "plain", "transposed", "slice", "offset", "conjugate")
    if how == "transposed" and x.dim() > 1:
        i, j = draw.random.sample(range(x.dim()), 2)
        return x.transpose(i, j).contiguous().transpose(i, j)
    if how == "slice" and x.dim() > 0 and x.is_floating_point():
        axis = draw.random.randrange(x.dim())
        beside = torch.full_like(x.narrow(axis, 0, min(1, x.shape[axis])), torch.nan)
        return torch.cat([beside, x, beside], axis).narrow(axis, beside.shape[axis], x.shape[axis])
    if how == "offset":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if how == "conjugate" and x.is_complex():
        return x.conj().resolve_conj().conj()
    return x


def spoiled_tensor(x: Tensor, draw: Draw) -> Any:
    """Something else in the place of a tensor."""
    how = draw.one("longer", "shorter", "empty", "axis", "no axis", "dtype", "device", "nan", "inf", "other", "turned")
    axis = draw.random.randrange(x.dim()) if x.dim() else 0
    if how in ("longer", "shorter", "empty") and x.dim():
        size = {"longer": x.shape[axis] + draw.one(1, 7, 64), "shorter": max(0, x.shape[axis] - 1), "empty": 0}[how]
        return x.new_ones([size if i == axis else n for i, n in enumerate(x.shape)])
    if how == "axis":
        return x[None] if draw.chance(0.5) else x[..., None]
    if how == "no axis" and x.dim() and x.shape[axis]:
        return x.select(axis, 0)
    if how == "dtype":
        return x.to(draw.one(torch.int64, torch.bool, torch.float64, torch.float16, torch.complex64, torch.float32))
    if how == "device":
        return x.to("meta" if draw.device.type == "cpu" else draw.one("meta", "cpu"))
    if how in ("nan", "inf") and x.numel() and x.is_floating_point():
        x = x.clone(memory_format=torch.contiguous_format)
        x.view(-1)[draw.random.randrange(x.numel())] = float(how)
        return x
    if how == "turned" and x.dim() > 1:
        return x.mT
    return draw.one(1.0, "x", [1, 2], x.expand(2, *x.shape))


def spoiled_borders(borders: Tensor, draw: Draw) -> Any:
    """Cumulative lengths that are wrong in one way."""
    values, last = borders.tolist(), int(borders[-1])
    wrong = [
        [*values[:-1], last + draw.one(1, 1000, 2**31 - 1 - last)],
        [draw.one(-1, 1, -(2**31)), *values[1:]],
        values[::-1],
        [*values, 0],
        [0, last + 9, last],
        [0, -9, last],
        values[:1],
        [],
    ]
    how = draw.random.randrange(len(wrong) + 3)
    if how < len(wrong):
        return torch.tensor(wrong[how], dtype=borders.dtype, device=draw.device)
    return (borders.float(), borders[None], values)[how - len(wrong)]


def spoiled(arguments: Arguments, draw: Draw) -> Arguments:
    """One or two arguments that do not fit."""
    arguments = dict(arguments)
    for name in draw.random.sample(list(arguments), draw.one(1, 1, 2)):
        value = arguments[name]
        if name in ("cu_seqlens", "packing") and isinstance(value, Tensor):
            arguments[name] = spoiled_borders(value, draw)
        elif name == "rows" and isinstance(value, Tensor) and len(value) and draw.chance(0.5):
            arguments[name] = value.clone()
            arguments[name][draw.random.randrange(len(value))] = draw.one(len(value) + 2, 10**6, 2**31 - 1)
        elif isinstance(value, Tensor):
            arguments[name] = spoiled_tensor(value, draw)
        elif isinstance(value, bool):
            arguments[name] = draw.one(None, 0, 2)
        elif isinstance(value, int):
            arguments[name] = draw.one(0, -1, 2**40)
        elif name not in ("chunk", "system", "weights"):
            arguments[name] = draw.one(None, draw.normal(draw.one(0, 1, 3)), 1)
    return arguments
