"""Mamba: a selective scan between a short convolution and a gate."""

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.tree import state_class
from dualform.layers.mixer import Hint, Mixer, check_intervals, check_kind
from dualform.layers.norm import RMSNorm
from dualform.layers.poles import check_steps
from dualform.layers.projection import project
from dualform.layers.quantized import group_of, scales_of
from dualform.layers.stream_step import StreamStep, runs_as_stream_step, size_of, wide_of
from dualform.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from dualform.ops.irregular_scan import irregular_scan
from dualform.ops.mamba_step import MambaStep, mamba_step_op
from dualform.ops.selective_scan import selective_scan, selective_state_update


@options
class MambaConfig:
    """A Mamba layer.

    Args:
        d_state: N, states per channel.
        d_conv: W, width of the short convolution.
        expand: channels of the scan per feature of the model.
        d_inner: D, the channels of the scan, in place of ``expand``; None is ``expand * d_model``.
        dt_rank: width of the bottleneck that makes the step; None is ``ceil(d_model / 16)``.
        bias: whether the projections in and out have a bias.
        conv_bias: whether the convolution has one.
        dt_min: smallest initial step.
        dt_max: largest initial step.
        norm_maps: epsilon of RMS norms of B, of C and of the bottleneck of the step, as Falcon-Mamba has them; None for
            no such norms.
        norm_weights: whether those norms have weights, as in Jamba.
        heads: slices of the channels, each with its own B, C and bottleneck, made of its channels alone, as in Zamba.
    """

    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    d_inner: int | None = None
    dt_rank: int | None = None
    bias: bool = False
    conv_bias: bool = True
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    norm_maps: float | None = None
    norm_weights: bool = False
    heads: int = 1

    def build(self, d_model: int) -> "Mamba":
        """The layer, freshly initialised."""
        return Mamba(self, d_model)


@state_class
class MambaState(NamedTuple):
    """Constant in the length of the context."""

    conv: Tensor  # (B, D, W-1), the last inputs of the convolution
    h: Tensor  # (B, D, N), the state of the scan


class Mamba(Mixer):
    """A selective scan between a short convolution and a gate.

    ``x, z = in(u)``; ``x = silu(conv(x))``; ``dt, B, C = f(x)``; ``h_t = exp(dt A) h_{t-1} + dt B x``;
    ``y = out((C h + D x) silu(z))``.

    With ``intervals`` s, x is held over s of these steps: ``h_t = a^s h_{t-1} + (a^s - 1) / (a - 1) dt B x`` with
    ``a = exp(dt A)``. The convolution counts samples, not time.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, D channels with N states each.

    References:
        Gu & Dao (2023), arXiv:2312.00752, section 3.4 and algorithm 2; the norms of the maps, Zuo et al. (2024),
        arXiv:2410.05355, section 3.1, and Lieber et al. (2024), arXiv:2403.19887, section 6.4; the heads, Glorioso et
        al. (2024), arXiv:2405.16712.
    """

    continuous: ClassVar[bool] = True
    hints: ClassVar[dict[str, Hint]] = {
        "A_log": Hint(decay=False),
        "D": Hint(decay=False),
        "dt_bias": Hint(decay=False),
    }

    def __init__(self, config: MambaConfig, d_model: int):
        super().__init__()
        c, self.config, self.d_model = config, config, d_model
        check_sizes("mamba", d_model=d_model, d_state=c.d_state, d_conv=c.d_conv, expand=c.expand)
        self.d_inner = c.expand * d_model if c.d_inner is None else c.d_inner
        self.dt_rank = math.ceil(d_model / 16) if c.dt_rank is None else c.dt_rank
        check_sizes("mamba", d_inner=self.d_inner, dt_rank=self.dt_rank)
        check_steps("mamba", c)
        if c.norm_maps is not None and not 0 < c.norm_maps < math.inf:
            raise ConfigError(f"mamba: norm_maps is {c.norm_maps}, expected a small positive number, or none")
        if c.heads < 1 or self.d_inner % c.heads:
            raise ConfigError(f"mamba: heads is {c.heads}, expected a divisor of the {self.d_inner} channels")
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=c.bias)
        self.conv_weight = nn.Parameter(torch.empty(self.d_inner, c.d_conv).uniform_(-1, 1) / math.sqrt(c.d_conv))
        self.conv_bias = (
            nn.Parameter(torch.empty(self.d_inner).uniform_(-1, 1) / math.sqrt(c.d_conv)) if c.conv_bias else None
        )
        self.x_proj = _map_of_heads(c.heads, self.d_inner // c.heads, self.dt_rank + 2 * c.d_state)
        self.dt_proj = _map_of_heads(c.heads, self.dt_rank, self.d_inner // c.heads)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        if c.norm_maps is not None and c.norm_weights:
            self.dt_norm = RMSNorm(self.dt_rank, c.norm_maps)
            self.B_norm, self.C_norm = (RMSNorm(c.d_state, c.norm_maps) for _ in "BC")
        self.dt_bias = nn.Parameter(initial_step(self.d_inner, c.dt_min, c.dt_max))
        self.A_log = nn.Parameter(torch.arange(1, c.d_state + 1.0).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=c.bias)

    def init_state(self, batch: int, *, max_len: int = 0) -> MambaState:
        """Zeros; ``max_len`` is ignored."""
        new, dtype = self.A_log.new_zeros, wide(self.A_log)
        return MambaState(
            conv=new(batch, self.d_inner, self.config.d_conv - 1, dtype=dtype),
            h=new(batch, self.d_inner, self.config.d_state, dtype=dtype),
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: MambaState | None = None,
        *,
        cu_seqlens: Borders = None,
        intervals: Real[Tensor, "B T"] | None = None,
    ) -> tuple[Tensor, MambaState]:
        """The parallel form."""
        check_features("mamba", x, self.d_model)
        packing = Packing.of("mamba", cu_seqlens, x)
        intervals = check_intervals("mamba", x, intervals, wide(self.A_log))
        if state is not None:
            check_kind("mamba", state, MambaState)
        conv, h = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, -1)
        x, conv = causal_conv1d(
            x, self.conv_weight, self.conv_bias, activation="silu", initial_state=conv, cu_seqlens=packing
        )
        dt, B, C = self._maps(x)
        if intervals is not None:
            if self.config.heads > 1:
                raise ArgumentError("mamba: intervals are given, and the layer has several heads", hint="heads=1")
            dt = F.softplus(dt.to(intervals.dtype) + self.dt_bias)
            y, h = irregular_scan(x, intervals, dt, self.A(), B[..., 0, :], C[..., 0, :], h, cu_seqlens=packing)
            return self.out_proj((y + self.D.to(y.dtype) * x) * F.silu(z)), MambaState(conv, h)
        y, h = selective_scan(
            x,
            dt,
            self.A(),
            B,
            C,
            self.D,
            z,
            delta_bias=self.dt_bias,
            delta_softplus=True,
            initial_state=h,
            cu_seqlens=packing,
        )
        return self.out_proj(y), MambaState(conv, h)

    def step(
        self, x: Float[Tensor, "B D"], state: MambaState, interval: Real[Tensor, " B"] | None = None
    ) -> tuple[Tensor, MambaState]:
        """The recurrent form."""
        check_features("mamba", x, self.d_model, "B")
        check_kind("mamba", state, MambaState)
        if interval is not None:
            check_intervals("mamba", x, interval, wide(self.A_log))
            y, state = self.forward(x[:, None], state, intervals=interval[:, None])
            return y[:, 0], state
        x, z = project(self.in_proj, x).chunk(2, -1)
        x, conv = causal_conv1d_update(x, state.conv, self.conv_weight, self.conv_bias, activation="silu")
        dt, B, C = self._maps(x)
        y, h = selective_state_update(
            state.h,
            x,
            dt,
            self.A(),
            B,
            C,
            self.D,
            z,
            dt_bias=self.dt_bias,
            dt_softplus=True,
        )
        return project(self.out_proj, y), MambaState(conv, h)

    def prepare_residual(self, norm: Any) -> StreamStep | None:
        """By :func:`dualform.ops.mamba_step.mamba_step`, where the layer has no heads and no norms of its maps."""
        c, maps = self.config, (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        if c.heads > 1 or c.norm_maps is not None or not runs_as_stream_step(norm, self, *maps):
            return None
        A = self.A()
        weights = (
            wide_of(norm.weight),
            self.in_proj.weight,
            wide_of(self.in_proj.bias),
            wide_of(self.conv_weight),
            wide_of(self.conv_bias),
            self.x_proj.weight,
            self.dt_proj.weight,
            wide_of(self.dt_bias),
            A,
            wide_of(self.D),
            self.out_proj.weight,
            wide_of(self.out_proj.bias),
            scales_of(self.in_proj),
            scales_of(self.x_proj),
            scales_of(self.dt_proj),
            scales_of(self.out_proj),
            norm.eps,
            group_of(self.in_proj),
        )
        record = lambda x, conv, h: MambaStep(x, conv, h, *weights)  # noqa: E731
        return StreamStep(mamba_step_op, record, MambaState, A.dtype, size_of(self))

    def A(self) -> Tensor:
        """The decay rates ``(D, N)``: negative, so that the recurrence is stable."""
        return -self.A_log.to(wide(self.A_log)).exp()

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step ``(..., D)``, and B and C ``(..., heads, N)``."""
        c = self.config
        maps = project(self.x_proj, x) if c.heads == 1 else self.x_proj(x.unflatten(-1, (c.heads, -1)))
        low, B, C = maps.split([self.dt_rank, c.d_state, c.d_state], -1)
        if c.norm_maps is not None and c.norm_weights:
            low, B, C = self.dt_norm(low), self.B_norm(B), self.C_norm(C)
        elif c.norm_maps is not None:
            low, B, C = (_rms(m, c.norm_maps) for m in (low, B, C))
        if c.heads == 1:
            return project(self.dt_proj, low), B.unsqueeze(-2), C.unsqueeze(-2)
        return self.dt_proj(low).flatten(-2), B, C


class _MapOfHeads(nn.Module):
    """A map of each head's own, ``(..., H, I) -> (..., H, O)``, without a bias."""

    def __init__(self, heads: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, outputs, inputs).uniform_(-1, 1) / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...hi,hoi->...ho", x, self.weight)


def _map_of_heads(heads: int, inputs: int, outputs: int) -> Any:
    return nn.Linear(inputs, outputs, bias=False) if heads == 1 else _MapOfHeads(heads, inputs, outputs)


def _rms(m: Tensor, eps: float) -> Tensor:
    return F.rms_norm(m.to(wide(m)), m.shape[-1:], eps=eps).to(m.dtype)


def initial_step(size: int, smallest: float, largest: float, floor: float = 1e-4) -> Tensor:
    """A bias whose softplus is log-uniform between two steps, and at least ``floor``."""
    dt = torch.empty(size).uniform_(math.log(smallest), math.log(largest)).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def check_sizes(kind: str, **sizes: int) -> None:
    """Every size must be a positive integer.

    Raises:
        ConfigError: names the first that is not.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"{kind}: {name} is {size!r}, expected a positive integer")
