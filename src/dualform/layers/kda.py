"""Kimi delta attention: the delta rule with a decay of each key channel."""

import torch
from torch import Tensor, nn

from dualform.core.options import options
from dualform.layers.delta import DeltaMixer, log_decay
from dualform.layers.mamba import check_sizes, initial_step
from dualform.layers.norm import RMSNorm
from dualform.layers.poles import check_steps


@options
class KDAConfig:
    """A layer of Kimi delta attention.

    Args:
        heads: H, each with a state and decays of its own.
        key_heads: G, pairs of query and key, each shared by heads / key_heads heads; None is ``heads``.
        d_key: N, width of a query and a key; None is ``d_model / heads``.
        d_value: P, width of a value; None is ``d_key``.
        d_conv: W, width of the short convolution.
        rank: width of the bottlenecks that make the decays and the gate; None is ``d_value``.
        negative: whether beta reaches 2, so that the state's transitions have negative eigenvalues, too.
        dt_min: smallest initial step of the decays.
        dt_max: largest initial step.
        norm_eps: epsilon of the norm before the projection out.
    """

    heads: int = 4
    key_heads: int | None = None
    d_key: int | None = None
    d_value: int | None = None
    d_conv: int = 4
    rank: int | None = None
    negative: bool = False
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    norm_eps: float = 1e-5

    def build(self, d_model: int) -> "KDA":
        """The layer, freshly initialised."""
        return KDA(self, d_model)


class KDA(DeltaMixer):
    """The delta rule, with a decay of each key channel, between a short convolution and a gated norm.

    ``q, k, v = silu(conv(in(u)))`` with q and k divided by their lengths; ``beta = sigmoid(b(u))``;
    ``g = -exp(A_log) softplus(decay(f(u)) + dt_bias)``; ``S' = diag(exp(g_t)) S_{t-1}``,
    ``S_t = S' + beta_t k_t (v_t - S'^T k_t)^T``; ``y = out(rms(S_t^T q_t / sqrt(N)) sigmoid(gate(z(u))))``.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, H heads with N by P states each.

    Raises:
        ConfigError: for a size below 1, and where heads do not divide.

    References:
        Kimi Team (2025), arXiv:2510.26692, equation 1 and section 4.
    """

    def __init__(self, config: KDAConfig, d_model: int):
        check_steps("kda", config)
        self._rank = config.rank
        super().__init__("kda", config, d_model)
        self.config = config
        (rank, _) = self.extra()
        check_sizes("kda", rank=rank)
        channels = self.heads * self.d_key
        self.decay_proj = nn.Linear(rank, channels, bias=False)
        self.dt_bias = nn.Parameter(initial_step(channels, config.dt_min, config.dt_max))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.gate_proj = nn.Linear(rank, self.d_inner, bias=False)
        self.norm = RMSNorm(self.d_value, config.norm_eps)

    def extra(self) -> tuple[int, ...]:
        """What the decays and the gate are made of."""
        rank = self.d_value if self._rank is None else self._rank
        return rank, rank

    def gates(self, extra: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """``-exp(A_log) softplus(decay(f) + dt_bias)`` and ``gate(z)``."""
        steps = self.decay_proj(extra[0]).unflatten(-1, (self.heads, -1))
        return log_decay(steps, self.A_log[:, None], self.dt_bias.view(self.heads, -1)), self.gate_proj(extra[1])

    def normalised(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """``rms(y) sigmoid(z)``."""
        assert gate is not None
        return self.norm(y) * gate.sigmoid()
