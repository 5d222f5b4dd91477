"""``Mamba2Simple`` of mamba-ssm, under its names."""

import math

import torch
from torch import Tensor, nn

from dualform.compat.gated_norms import RMSNorm
from dualform.compat.ssd import split_scan
from dualform.compat.vision import depthwise, undecayed
from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors, wide
from dualform.layers.mamba import initial_step
from dualform.ops.device import explains_device


@explains_device
class Mamba2Simple(nn.Module):
    """Mamba-2 for training only, with initial states that can be learned.

    Args:
        d_model: features.
        d_state: N, states per channel.
        d_conv: W, width of the convolution.
        conv_init: its weights start uniform within this; None for PyTorch's own start.
        expand: inner features per feature.
        headdim: P, channels of a head.
        ngroups: G, pairs of B and C.
        A_init_range: the rates start uniform in it.
        dt_min: smallest initial step.
        dt_max: largest one.
        dt_init_floor: no initial step is smaller.
        dt_limit: bounds that hold throughout, after softplus.
        learnable_init_states: whether ``init_states`` ``(H, P, N)`` is a parameter, where every row starts.
        activation: of the convolution: "silu" or "swish".
        bias: whether the projections have a bias.
        conv_bias: whether the convolution has one.
        chunk_size: changes nothing here.
        use_mem_eff_path: changes nothing here; there is one path.
        layer_idx: kept.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ArgumentError: where heads or groups do not divide, and for another activation.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        like = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand, self.headdim = d_model, d_state, d_conv, expand, headdim
        self.d_inner, self.ngroups, self.dt_limit, self.activation = expand * d_model, ngroups, dt_limit, activation
        self.learnable_init_states, self.layer_idx, self.chunk_size = learnable_init_states, layer_idx, chunk_size
        if self.d_inner % headdim or (self.d_inner // headdim) % ngroups:
            raise ArgumentError(
                f"Mamba2Simple: {self.d_inner} inner features are no multiple of ngroups = {ngroups} times "
                f"headdim = {headdim}"
            )
        if activation not in ("silu", "swish"):
            raise ArgumentError(f"Mamba2Simple: activation is {activation!r}, expected 'silu' or 'swish'")
        self.nheads = self.d_inner // headdim
        inner = 2 * self.d_inner + 2 * ngroups * d_state + self.nheads
        self.in_proj = nn.Linear(d_model, inner, bias=bias, **like)
        self.conv1d = depthwise(self.d_inner + 2 * ngroups * d_state, d_conv, conv_bias, **like)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        if learnable_init_states:
            self.init_states = undecayed(nn.Parameter(torch.zeros(self.nheads, headdim, d_state, **like)))
        self.act = nn.SiLU()
        steps = initial_step(self.nheads, dt_min, dt_max, dt_init_floor).to(**like)
        self.dt_bias = undecayed(nn.Parameter(steps))
        start = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = undecayed(nn.Parameter(start.log().to(dtype)))
        self.D = undecayed(nn.Parameter(torch.ones(self.nheads, device=device)))
        self.norm = RMSNorm(self.d_inner, 1e-5, self.d_inner // ngroups, False, **like)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **like)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """``(B, T, d_model) -> (B, T, d_model)``; runs of equal ids ``(B, T)`` do not see each other."""
        check_tensors("Mamba2Simple", u=(u, f"B T {self.d_model}"))
        y, _ = split_scan(
            self.in_proj(u),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            -self.A_log.to(wide(self.A_log)).exp(),
            self.D,
            initial_states=self.init_states.expand(len(u), -1, -1, -1) if self.learnable_init_states else None,
            seq_idx=seq_idx,
            cu_seqlens=None,
            dt_limit=self.dt_limit,
            activation=self.activation,
            norm=(self.norm.weight, self.norm.eps, False),
            sizes=(self.headdim, self.ngroups),
        )
        return self.out_proj(y)
