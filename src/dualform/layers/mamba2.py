"""Mamba-2: projections and a short convolution around state space duality, one decay per head."""

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor, nn

from dualform.core.discretize import hold
from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.tree import state_class
from dualform.layers.mamba import check_sizes, initial_step
from dualform.layers.mixer import Hint, Mixer, check_intervals, check_kind
from dualform.layers.norm import GatedRMSNorm
from dualform.layers.poles import check_steps
from dualform.layers.projection import plain, project
from dualform.layers.quantized import group_of, scales_of
from dualform.layers.stream_step import StreamStep, runs_as_stream_step, size_of, wide_of
from dualform.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from dualform.ops.mamba2_step import Mamba2Step, mamba2_step_op
from dualform.ops.selective_scan import selective_state_update
from dualform.ops.ssd import limit_step, ssd


@options
class Mamba2Config:
    """A Mamba-2 layer.

    Args:
        d_state: N, states per channel.
        d_head: P, channels of a head, which share one decay.
        d_conv: W, width of the short convolution.
        expand: channels of the scan per feature of the model.
        d_inner: H P, the channels of the scan, in place of ``expand``; None is ``expand * d_model``.
        groups: G, pairs of input and output maps, each shared by heads / groups heads.
        bias: whether the projections in and out have a bias.
        conv_bias: whether the convolution has one.
        dt_min: smallest initial step.
        dt_max: largest initial step.
        dt_limit: bounds that hold throughout, after softplus.
        norm_eps: epsilon of the gated norm before the projection out.
        norm: whether there is that norm; without it the gate alone is left, ``y silu(z)``.
        norm_before_gate: whether the gate multiplies the norm of y, ``norm(y) silu(z)``.
        scales: factors of z, x, B, C and dt as they leave the projection in; None is 1 throughout.
    """

    d_state: int = 128
    d_head: int = 64
    d_conv: int = 4
    expand: int = 2
    d_inner: int | None = None
    groups: int = 1
    bias: bool = False
    conv_bias: bool = True
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm_eps: float = 1e-5
    norm: bool = True
    norm_before_gate: bool = False
    scales: tuple[float, float, float, float, float] | None = None

    def build(self, d_model: int) -> "Mamba2":
        """The layer, freshly initialised."""
        return Mamba2(self, d_model)


@state_class
class Mamba2State(NamedTuple):
    """Constant in the length of the context."""

    conv: Tensor  # (B, H P + 2 G N, W-1), the last inputs of the convolution
    h: Tensor  # (B, H, P, N), the state of the scan


class Mamba2(Mixer):
    """State space duality between projections and a short convolution.

    ``z, x, B, C, dt = in(u)``; ``x, B, C = silu(conv(x, B, C))``; ``h_t = exp(dt A) h_{t-1} + dt x B^T``;
    ``y = out(norm((h C + D x) silu(z)))``.

    With ``intervals`` s, x is held over s of these steps: ``h_t = a^s h_{t-1} + (a^s - 1) / (a - 1) dt x B^T`` with
    ``a = exp(dt A)``. The convolution counts samples, not time.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, H heads of width P with P N states each.

    Raises:
        ConfigError: where heads or groups do not divide.

    References:
        Dao & Gu (2024), arXiv:2405.21060, section 7.1.
    """

    continuous: ClassVar[bool] = True
    hints: ClassVar[dict[str, Hint]] = {
        "A_log": Hint(decay=False),
        "D": Hint(decay=False),
        "dt_bias": Hint(decay=False),
    }

    def __init__(self, config: Mamba2Config, d_model: int):
        super().__init__()
        c, self.config = config, config
        self.d_model, self.d_inner = d_model, c.expand * d_model if c.d_inner is None else c.d_inner
        check_sizes(
            "mamba2",
            d_model=d_model,
            d_state=c.d_state,
            d_head=c.d_head,
            d_conv=c.d_conv,
            expand=c.expand,
            d_inner=self.d_inner,
            groups=c.groups,
        )
        if not 0 < c.norm_eps < math.inf:
            raise ConfigError(f"mamba2: norm_eps is {c.norm_eps}, expected a small positive number")
        if self.d_inner % c.d_head:
            width = "expand * d_model" if c.d_inner is None else "d_inner"
            raise ConfigError(
                f"mamba2: {width} = {self.d_inner} is not a multiple of d_head = {c.d_head}",
                hint=f"set d_head to a divisor of {self.d_inner}",
            )
        check_steps("mamba2", c)
        self.heads = self.d_inner // c.d_head
        if self.heads % c.groups:
            raise ConfigError(
                f"mamba2: {self.heads} heads cannot be shared out over {c.groups} groups",
                hint=f"set groups to a divisor of {self.heads}",
            )
        self.d_conv_in = self.d_inner + 2 * c.groups * c.d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + self.d_conv_in + self.heads, bias=c.bias)
        self.conv_weight = nn.Parameter(torch.empty(self.d_conv_in, c.d_conv).uniform_(-1, 1) / math.sqrt(c.d_conv))
        self.conv_bias = (
            nn.Parameter(torch.empty(self.d_conv_in).uniform_(-1, 1) / math.sqrt(c.d_conv)) if c.conv_bias else None
        )
        self.dt_bias = nn.Parameter(initial_step(self.heads, c.dt_min, c.dt_max))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = _Gate()
        if c.norm:
            self.norm = GatedRMSNorm(self.d_inner, c.groups, c.norm_eps, norm_before_gate=c.norm_before_gate)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=c.bias)

    def init_state(self, batch: int, *, max_len: int = 0) -> Mamba2State:
        """Zeros; ``max_len`` is ignored."""
        c, new, dtype = self.config, self.A_log.new_zeros, wide(self.A_log)
        return Mamba2State(
            conv=new(batch, self.d_conv_in, c.d_conv - 1, dtype=dtype),
            h=new(batch, self.heads, c.d_head, c.d_state, dtype=dtype),
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: Mamba2State | None = None,
        *,
        cu_seqlens: Borders = None,
        intervals: Real[Tensor, "B T"] | None = None,
    ) -> tuple[Tensor, Mamba2State]:
        """The parallel form."""
        check_features("mamba2", x, self.d_model)
        packing = Packing.of("mamba2", cu_seqlens, x)
        intervals = check_intervals("mamba2", x, intervals, wide(self.A_log))
        if state is not None:
            check_kind("mamba2", state, Mamba2State)
        conv, h = (None, None) if state is None else state
        z, xBC, dt = self._projected(x)
        xBC, conv = causal_conv1d(
            xBC, self.conv_weight, self.conv_bias, activation="silu", initial_state=conv, cu_seqlens=packing
        )
        x, B, C = self._maps(xBC)
        if intervals is not None:
            u, steps = self._held(x, dt, intervals)
            y, h = ssd(u, steps, self.A(), B, C, initial_state=h, cu_seqlens=packing)
            y = y + self.D[:, None].to(y.dtype) * x
            return self.out_proj(self.norm(y.flatten(2), z)), Mamba2State(conv, h)
        y, h = ssd(
            x,
            dt,
            self.A(),
            B,
            C,
            self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.config.dt_limit,
            initial_state=h,
            cu_seqlens=packing,
        )
        return self.out_proj(self.norm(y.flatten(2), z)), Mamba2State(conv, h)

    def step(
        self, x: Float[Tensor, "B D"], state: Mamba2State, interval: Real[Tensor, " B"] | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """The recurrent form."""
        check_features("mamba2", x, self.d_model, "B")
        check_kind("mamba2", state, Mamba2State)
        if interval is not None:
            check_intervals("mamba2", x, interval, wide(self.A_log))
            y, state = self.forward(x[:, None], state, intervals=interval[:, None])
            return y[:, 0], state
        z, xBC, dt = self._projected(x)
        xBC, conv = causal_conv1d_update(xBC, state.conv, self.conv_weight, self.conv_bias, activation="silu")
        x, B, C = self._maps(xBC)
        dt = limit_step(dt.to(wide(dt)), self.dt_bias, True, self.config.dt_limit)
        y, h = selective_state_update(state.h, x, dt[..., None], self.A()[:, None, None], B, C, self.D[:, None])
        return project(self.out_proj, self.norm(y.flatten(1), z)), Mamba2State(conv, h)

    def prepare_residual(self, norm: Any) -> StreamStep | None:
        """By :func:`dualform.ops.mamba2_step.mamba2_step`, where nothing is scaled behind the projection in."""
        c = self.config
        gate = type(self.norm) is _Gate or plain(self.norm, kind=GatedRMSNorm)
        if c.scales is not None or not gate or not runs_as_stream_step(norm, self, self.in_proj, self.out_proj):
            return None
        A = self.A()
        weights = (
            wide_of(norm.weight),
            self.in_proj.weight,
            wide_of(self.in_proj.bias),
            wide_of(self.conv_weight),
            wide_of(self.conv_bias),
            wide_of(self.dt_bias),
            A,
            wide_of(self.D),
            wide_of(self.norm.weight) if isinstance(self.norm, GatedRMSNorm) else None,
            self.out_proj.weight,
            wide_of(self.out_proj.bias),
            scales_of(self.in_proj),
            scales_of(self.out_proj),
            c.groups,
            norm.eps,
            c.norm_eps,
            c.norm and c.norm_before_gate,
            float(c.dt_limit[0]),
            float(c.dt_limit[1]),
            group_of(self.in_proj),
        )
        record = lambda x, conv, h: Mamba2Step(x, conv, h, *weights)  # noqa: E731
        return StreamStep(mamba2_step_op, record, Mamba2State, A.dtype, size_of(self))

    def A(self) -> Tensor:
        """The decay rates ``(H,)``: negative, so that the recurrence is stable."""
        return -self.A_log.to(wide(self.A_log)).exp()

    def _held(self, x: Tensor, dt: Tensor, intervals: Tensor) -> tuple[Tensor, Tensor]:
        """The input and the step ``s dt`` with which the scan's own rule, weight ``s dt x``, is that of s steps."""
        A, s = self.A(), intervals[..., None]
        dt = limit_step(dt.to(A.dtype), self.dt_bias, True, self.config.dt_limit)
        _, weight = hold(dt * A, s)
        return (weight / s)[..., None].to(x.dtype) * x, s * dt

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate, what enters the convolution, and the step before its bias."""
        zxBCdt = project(self.in_proj, x)
        if self.config.scales is not None:
            width = self.config.groups * self.config.d_state
            sizes = (self.d_inner, self.d_inner, width, width, self.heads)
            factors = [zxBCdt.new_full((size,), s) for s, size in zip(self.config.scales, sizes, strict=True)]
            zxBCdt = zxBCdt * torch.cat(factors)
        z, xBC, dt = zxBCdt.split([self.d_inner, self.d_conv_in, self.heads], -1)
        return z, xBC, dt

    def _maps(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.config.groups * self.config.d_state
        x, B, C = xBC.split([self.d_inner, width, width], -1)
        return (
            x.unflatten(-1, (self.heads, self.config.d_head)),
            B.unflatten(-1, (self.config.groups, -1)),
            C.unflatten(-1, (self.config.groups, -1)),
        )


class _Gate(nn.Module):
    """``y silu(z)``, where there is no norm."""

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return (y.to(wide(y)) * F.silu(z.to(wide(z)))).to(y.dtype)
