"""``Mamba`` of mamba-ssm, under its names, with what vision forks added."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualform.compat import vision
from dualform.compat.cache import Cached, InferenceParams, check_step
from dualform.compat.conv_update import causal_conv1d_update
from dualform.compat.step import selective_state_update
from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors, wide
from dualform.layers.mamba import initial_step
from dualform.ops.causal_conv1d import causal_conv1d
from dualform.ops.device import explains_device
from dualform.ops.selective_scan import selective_scan


@explains_device
class Mamba(Cached):
    """``x, z = in_proj(u)``; ``x = silu(conv1d(x))``; ``dt, B, C = x_proj(x)``; scan, gated by z; ``out_proj``.

    The parameters are those of mamba-ssm: ``in_proj``, ``conv1d``, ``x_proj``, ``dt_proj``, ``A_log``, ``D`` and
    ``out_proj``; vision forks add those of a second and third direction with the suffixes ``_b`` and ``_s``, and
    ``gamma``.

    Args:
        d_model: features.
        d_state: N, states per channel.
        d_conv: W, width of the convolution.
        expand: channels of the scan per feature.
        dt_rank: width of the bottleneck that makes the step; "auto" is ``ceil(d_model / 16)``.
        dt_min: smallest initial step.
        dt_max: largest one.
        dt_init: how the step's projection starts: "random" or "constant".
        dt_scale: multiplies its spread.
        dt_init_floor: no initial step is smaller.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections in and out have one.
        use_fast_path: changes nothing here; there is one path.
        layer_idx: the key of its states in an ``InferenceParams``.
        device: of the parameters.
        dtype: of the parameters.
        bimamba_type: None or "none"; "v1", "v2" or "v3", several directions, as in :mod:`dualform.compat.vision`.
        bimamba: true is "v2".
        nslices: slices of the third direction of "v3".
        if_divide_out: whether the two directions of "v2" are averaged instead of added.
        init_layer_scale: initial value of ``gamma``, which multiplies the output; None for no such parameter.
        if_devide_out: the spelling of early forks.

    Raises:
        ArgumentError: for an option that is not one of these values.

    References:
        Gu & Dao (2023), arXiv:2312.00752, section 3.4; the directions, Zhu et al. (2024), arXiv:2401.09417.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str | None = None,
        bimamba: bool = False,
        nslices: int = 5,
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        if_devide_out: bool = False,
    ):
        super().__init__()
        like = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        if dt_rank != "auto" and not isinstance(dt_rank, int):
            raise ArgumentError(f"Mamba: dt_rank is {dt_rank!r}, expected 'auto' or a number")
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **like)
        self.conv1d = vision.depthwise(self.d_inner, d_conv, conv_bias, **like)
        self.activation, self.act = "silu", nn.SiLU()
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **like)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, **like)
        spread = self.dt_rank**-0.5 * dt_scale
        if dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        elif dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, spread)
        else:
            raise ArgumentError(f"Mamba: dt_init is {dt_init!r}, expected 'random' or 'constant'")
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_step(self.d_inner, dt_min, dt_max, dt_init_floor))
        self.dt_proj.bias._no_reinit = True  # pyright: ignore[reportAttributeAccessIssue]
        self.A_log = vision.rates(self.d_inner, d_state, device)
        self.D = vision.skip(self.d_inner, device)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **like)
        self.bimamba_type = vision.kind(bimamba_type, bimamba)
        self.nslices, self.if_divide_out = nslices, if_divide_out or if_devide_out
        vision.add_directions(self, self.bimamba_type, conv_bias, device, dtype)
        self.init_layer_scale = init_layer_scale
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model, **like))

    def forward(self, hidden_states: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """``(B, T, d_model) -> (B, T, d_model)``.

        With ``inference_params`` its states are written in place: those after the last element where
        ``seqlen_offset`` is 0, and those after one more, T being 1, where it is above.
        """
        check_tensors("Mamba", hidden_states=(hidden_states, f"B T {self.d_model}"))
        states = None
        if inference_params is not None:
            if self.bimamba_type is not None:
                raise ArgumentError(
                    f"Mamba: inference_params with bimamba_type {self.bimamba_type!r}",
                    hint="what reads the sequence from its end cannot run step by step: leave it out",
                )
            states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
        xz = self.in_proj(hidden_states)
        if self.bimamba_type is not None:
            return self._scaled(vision.mix(self, self.bimamba_type, xz.transpose(1, 2)))
        x, z = xz.chunk(2, -1)
        if states is not None:
            states[0].copy_(F.pad(x.detach().transpose(1, 2), (self.d_conv - x.shape[1], 0)))
        x, _ = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation=self.activation)
        dt, B, C = self._maps(x)
        y, last = selective_scan(
            x,
            dt,
            self._A(),
            B.unsqueeze(2),
            C.unsqueeze(2),
            self.D,
            z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
        )
        if states is not None:
            states[1].copy_(last.detach())
        return self._scaled(self.out_proj(y))

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One element ``(B, 1, d_model)``; the states are written in place, and returned."""
        check_step("Mamba", hidden_states, self.d_model)
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, -1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        dt, B, C = self._maps(x)
        y = selective_state_update(ssm_state, x, dt, self._A(), B, C, self.D, z, self.dt_proj.bias, True)
        return self._scaled(self.out_proj(y))[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(B, D, W)`` of the convolution and ``(B, D, N)`` of the scan, zeros; ``max_seqlen`` is ignored."""
        conv, step = self.conv1d.weight, self.dt_proj.weight
        return (
            conv.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or conv.dtype),
            step.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype or step.dtype),
        )

    def _A(self) -> Tensor:
        return -self.A_log.to(wide(self.A_log)).exp()

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        return F.linear(low, self.dt_proj.weight), B, C

    def _scaled(self, y: Tensor) -> Tensor:
        return y if self.init_layer_scale is None else y * self.gamma
