"""Gated DeltaNet: the delta rule with a decay of each head, and a gate."""

from typing import Protocol

import torch
from torch import Tensor, nn

from dualform.core.options import options
from dualform.layers.delta import DeltaMixer, Sizes, log_decay
from dualform.layers.mamba import initial_step
from dualform.layers.norm import GatedRMSNorm
from dualform.layers.poles import Steps, check_steps


@options
class GatedDeltaNetConfig:
    """A Gated DeltaNet layer.

    Args:
        heads: H, each with a state and a decay of its own.
        key_heads: G, pairs of query and key, each shared by heads / key_heads heads; None is ``heads``.
        d_key: N, width of a query and a key; None is ``d_model / heads``.
        d_value: P, width of a value; None is ``2 * d_key``.
        d_conv: W, width of the short convolution.
        negative: whether beta reaches 2, so that the state's transitions have negative eigenvalues, too.
        dt_min: smallest initial step of the decays.
        dt_max: largest initial step.
        norm_eps: epsilon of the gated norm before the projection out.
    """

    heads: int = 4
    key_heads: int | None = None
    d_key: int | None = None
    d_value: int | None = None
    d_conv: int = 4
    negative: bool = False
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    norm_eps: float = 1e-5

    def build(self, d_model: int) -> "GatedDeltaNet":
        """The layer, freshly initialised."""
        return GatedDeltaNet(self, d_model)


class Decaying(Sizes, Steps, Protocol):
    """The options of a layer whose decays depend on steps."""


class HeadDecays(DeltaMixer):
    """A layer of the delta rule with a decay of each head, or without, and a gate behind the norm.

    Args:
        kind: of layer, first word of every error.
        config: its options.
        d_model: D.
        writes: J, in each step.
        decay: whether the state decays.

    Raises:
        ConfigError: for a size below 1, and where heads do not divide.
    """

    def __init__(self, kind: str, config: Decaying, d_model: int, *, writes: int = 1, decay: bool = True):
        check_steps(kind, config)
        self._decay = decay
        super().__init__(kind, config, d_model, expand=2, writes=writes)
        if decay:
            self.dt_bias = nn.Parameter(initial_step(self.heads, config.dt_min, config.dt_max))
            self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(0.01, 16).log())
        self.norm = GatedRMSNorm(self.d_value, eps=config.norm_eps, norm_before_gate=True)

    def extra(self) -> tuple[int, ...]:
        """The gate, and the steps of the decays."""
        return (self.d_inner, self.heads) if self._decay else (self.d_inner,)

    def gates(self, extra: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor]:
        """``-exp(A_log) softplus(a + dt_bias)`` and z."""
        return log_decay(extra[1], self.A_log, self.dt_bias) if self._decay else None, extra[0]

    def normalised(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """``rms(y) silu(z)``."""
        assert gate is not None
        return self.norm(y, gate)


class GatedDeltaNet(HeadDecays):
    """The gated delta rule between a short convolution and a gated norm.

    ``q, k, v = silu(conv(in(u)))`` with q and k divided by their lengths; ``beta = sigmoid(b(u))``;
    ``g = -exp(A_log) softplus(a(u) + dt_bias)``; ``S' = exp(g_t) S_{t-1}``,
    ``S_t = S' + beta_t k_t (v_t - S'^T k_t)^T``; ``y = out(rms(S_t^T q_t / sqrt(N)) silu(z(u)))``.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, H heads with N by P states each.

    Raises:
        ConfigError: for a size below 1, and where heads do not divide.

    References:
        Yang et al. (2024), arXiv:2412.06464, equation 10 and figure 1; Qwen3-Next has it with fewer key heads.
    """

    def __init__(self, config: GatedDeltaNetConfig, d_model: int):
        super().__init__("gated_delta_net", config, d_model)
        self.config = config
