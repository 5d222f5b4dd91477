"""``Mamba2`` of mamba-ssm, under its names."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualform.compat.cache import Cached, InferenceParams, check_step, check_unsupported
from dualform.compat.conv import causal_conv1d_varlen_states
from dualform.compat.conv_update import causal_conv1d_update
from dualform.compat.gated_norms import RMSNorm
from dualform.compat.ssd import split_scan
from dualform.compat.step import selective_state_update
from dualform.compat.vision import depthwise, undecayed
from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors, wide
from dualform.layers.mamba import initial_step
from dualform.ops.device import explains_device
from dualform.ops.ssd import limit_step


@explains_device
class Mamba2(Cached):
    """``z, x, B, C, dt = in_proj(u)``; ``x, B, C = silu(conv1d(x, B, C))``; scan; ``out_proj(norm(y, z))``.

    The parameters are those of mamba-ssm: ``in_proj``, ``conv1d``, ``dt_bias``, ``A_log``, ``D``, ``norm`` and
    ``out_proj``.

    Args:
        d_model: features.
        d_state: N, states per channel.
        d_conv: W, width of the convolution.
        conv_init: its weights start uniform within this; None for PyTorch's own start.
        expand: inner features per feature.
        headdim: P, channels of a head.
        d_ssm: inner features that the scan has; the others are a gated feed-forward. None is all of them.
        ngroups: G, pairs of B and C.
        A_init_range: the rates start uniform in it.
        D_has_hdim: whether D has a value for each channel instead of each head.
        rmsnorm: whether there is a norm before the last projection; otherwise z gates the scan.
        norm_before_gate: whether z gates what is normed, or is part of it.
        dt_min: smallest initial step.
        dt_max: largest one.
        dt_init_floor: no initial step is smaller.
        dt_limit: bounds that hold throughout, after softplus.
        bias: whether the projections have a bias.
        conv_bias: whether the convolution has one.
        chunk_size: changes nothing here, dualform's operator has its own.
        use_mem_eff_path: changes nothing here; there is one path.
        layer_idx: the key of its states in an ``InferenceParams``.
        process_group: must be None.
        sequence_parallel: of no effect without a process group.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ArgumentError: where heads or groups do not divide, and for a process group.

    References:
        Dao & Gu (2024), arXiv:2405.21060, section 7.1.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: object = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_unsupported("Mamba2", process_group=process_group)
        like = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.conv_init, self.expand = (
            d_model,
            d_state,
            d_conv,
            conv_init,
            expand,
        )
        self.process_group, self.sequence_parallel, self.world_size, self.local_rank = None, sequence_parallel, 1, 0
        self.headdim, self.ngroups, self.D_has_hdim, self.rmsnorm = headdim, ngroups, D_has_hdim, rmsnorm
        self.norm_before_gate, self.dt_limit, self.chunk_size = norm_before_gate, dt_limit, chunk_size
        self.use_mem_eff_path, self.layer_idx, self.activation = use_mem_eff_path, layer_idx, "silu"
        self.act = nn.SiLU()
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if self.d_ssm % headdim or self.d_ssm > self.d_inner:
            raise ArgumentError(
                f"Mamba2: d_ssm is {self.d_ssm}, expected a multiple of headdim = {headdim} of at most {self.d_inner}"
            )
        self.nheads = self.d_ssm // headdim
        if self.nheads % ngroups:
            raise ArgumentError(f"Mamba2: {self.nheads} heads cannot be shared out over ngroups = {ngroups}")
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=bias, **like)
        self.conv1d = depthwise(self.d_ssm + 2 * ngroups * d_state, d_conv, conv_bias, **like)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        steps = initial_step(self.nheads, dt_min, dt_max, dt_init_floor).to(**like)
        self.dt_bias = undecayed(nn.Parameter(steps))
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ArgumentError(f"Mamba2: A_init_range is {A_init_range}, expected (smallest, largest) above 0")
        start = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = undecayed(nn.Parameter(start.log().to(dtype)))
        self.D = undecayed(nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device)))
        if rmsnorm:
            self.norm = RMSNorm(self.d_ssm, 1e-5, self.d_ssm // ngroups, norm_before_gate, **like)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **like)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """``(B, T, d_model) -> (B, T, d_model)``.

        Args:
            u: ``(B, T, d_model)``, or ``(B T, d_model)`` with ``seqlen``.
            seqlen: T, where rows are laid end to end; the output then is, too.
            seq_idx: ``(B, T)``, the sequence of each step: runs of equal ids do not see each other.
            cu_seqlens: ``(n + 1,)``, borders of sequences in a single row; states are then one for each.
            inference_params: its states are written in place: those after the last element where ``seqlen_offset`` is
                0, and those after one more, T being 1, where it is above.
        """
        laid = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        check_tensors("Mamba2", u=(laid, f"B T {self.d_model}"))
        rows, states = laid.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, None
        if inference_params is not None:
            states = self._get_states_from_cache(inference_params, rows)
            if inference_params.seqlen_offset > 0:
                y = self.step(laid, *states)[0]
                return y if seqlen is None else y.flatten(0, 1)
        zxbcdt = self.in_proj(laid)
        if states is not None:
            self._keep_inputs(zxbcdt.detach(), states[0], cu_seqlens)
        y, last = split_scan(
            zxbcdt,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            self._A(),
            self._D(),
            initial_states=None,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            dt_limit=self.dt_limit,
            activation=self.activation,
            norm=(self.norm.weight, self.norm.eps, self.norm_before_gate) if self.rmsnorm else (None, 0.0, False),
            sizes=(self.headdim, self.ngroups),
        )
        if states is not None:
            states[1].copy_(last.detach())
        out = self.out_proj(y)
        return out if seqlen is None else out.flatten(0, 1)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One element ``(B, 1, d_model)``; the states are written in place, and returned."""
        check_step("Mamba2", hidden_states, self.d_model)
        gate, value, z, xBC, dt = self._split(self.in_proj(hidden_states[:, 0]))
        xBC = causal_conv1d_update(xBC, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        maps, heads = self.ngroups * self.d_state, (self.nheads, self.headdim)
        x, B, C = xBC.split([self.d_ssm, maps, maps], -1)
        dt = limit_step(dt.to(wide(dt)), self.dt_bias, True, self.dt_limit)
        D = self._D()
        y = selective_state_update(
            ssm_state,
            x.unflatten(-1, heads),
            dt[..., None].expand(-1, *heads),
            self._A()[:, None, None].expand(*heads, self.d_state),
            B.unflatten(-1, (self.ngroups, -1)),
            C.unflatten(-1, (self.ngroups, -1)),
            D if self.D_has_hdim else D[:, None].expand(*heads),
            None if self.rmsnorm else z.unflatten(-1, heads),
        ).flatten(1)
        y = self.norm(y, z) if self.rmsnorm else y
        y = torch.cat([F.silu(gate) * value, y], -1) if gate.shape[-1] else y
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(B, H P + 2 G N, W)`` of the convolution and ``(B, H, P, N)``, zeros; ``max_seqlen`` is ignored."""
        conv, other = self.conv1d.weight, self.in_proj.weight
        return (
            conv.new_zeros(batch_size, conv.shape[0], self.d_conv, dtype=dtype or conv.dtype),
            other.new_zeros(batch_size, self.nheads, self.headdim, self.d_state, dtype=dtype or other.dtype),
        )

    def _A(self) -> Tensor:
        return -self.A_log.to(wide(self.A_log)).exp()

    def _D(self) -> Tensor:
        return self.D.unflatten(0, (self.nheads, self.headdim)) if self.D_has_hdim else self.D

    def _split(self, zxbcdt: Tensor) -> tuple[Tensor, ...]:
        beside = self.d_inner - self.d_ssm
        return zxbcdt.split([beside, beside, self.d_ssm, self.conv1d.weight.shape[0], self.nheads], -1)

    def _keep_inputs(self, zxbcdt: Tensor, conv_state: Tensor, cu_seqlens: Tensor | None) -> None:
        """Write the last W inputs of the convolution to its state."""
        xBC = self._split(zxbcdt)[3]
        if cu_seqlens is None:
            conv_state.copy_(F.pad(xBC.transpose(1, 2), (self.d_conv - xBC.shape[1], 0)))
        else:
            conv_state.copy_(causal_conv1d_varlen_states(xBC[0], cu_seqlens, self.d_conv))
