"""DeltaNet: linear attention in which a write replaces what a key holds."""

from torch import Tensor

from dualform.core.options import options
from dualform.layers.delta import DeltaMixer
from dualform.layers.norm import RMSNorm


@options
class DeltaNetConfig:
    """A DeltaNet layer.

    Args:
        heads: H, each with a state of its own.
        key_heads: G, pairs of query and key, each shared by heads / key_heads heads; None is ``heads``.
        d_key: N, width of a query and a key; None is ``d_model / heads``.
        d_value: P, width of a value; None is ``d_key``.
        d_conv: W, width of the short convolution.
        negative: whether beta reaches 2, so that the state's transitions have eigenvalues down to -1.
        norm_eps: epsilon of the norm before the projection out.
    """

    heads: int = 4
    key_heads: int | None = None
    d_key: int | None = None
    d_value: int | None = None
    d_conv: int = 4
    negative: bool = False
    norm_eps: float = 1e-5

    def build(self, d_model: int) -> "DeltaNet":
        """The layer, freshly initialised."""
        return DeltaNet(self, d_model)


class DeltaNet(DeltaMixer):
    """The delta rule between a short convolution and a norm.

    ``q, k, v = silu(conv(in(u)))`` with q and k divided by their lengths; ``beta = sigmoid(b(u))``;
    ``S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T``; ``y = out(rms(S_t^T q_t / sqrt(N)))``.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, H heads with N by P states each.

    Raises:
        ConfigError: for a size below 1, and where heads do not divide.

    References:
        Yang et al. (2024), arXiv:2406.06484, section 3 and figure 2; beta up to 2: Grazzi et al. (2024),
        arXiv:2411.12537.
    """

    def __init__(self, config: DeltaNetConfig, d_model: int):
        super().__init__("delta_net", config, d_model)
        self.config = config
        self.norm = RMSNorm(self.d_value, config.norm_eps)

    def extra(self) -> tuple[int, ...]:
        """Nothing."""
        return ()

    def gates(self, extra: tuple[Tensor, ...]) -> tuple[None, None]:
        """Neither decays nor a gate."""
        return None, None

    def normalised(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """The norm of each head."""
        return self.norm(y)
