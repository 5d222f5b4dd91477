"""Gated DeltaProduct: Gated DeltaNet with several writes in each step, a product of Householder matrices."""

from dualform.core.options import options
from dualform.layers.gated_delta_net import HeadDecays
from dualform.layers.mamba import check_sizes


@options
class GatedDeltaProductConfig:
    """A Gated DeltaProduct layer.

    Args:
        heads: H, each with a state and a decay of its own.
        key_heads: G, sets of a query and its keys, each shared by heads / key_heads heads; None is ``heads``.
        d_key: N, width of a query and a key; None is ``d_model / heads``.
        d_value: P, width of a value; None is ``2 * d_key``.
        d_conv: W, width of the short convolution.
        householders: J, writes in each step, each with a key and values of its own.
        decay: whether the state decays, once in each step; without decays it is DeltaProduct.
        negative: whether beta reaches 2, so that a write can be a reflection.
        dt_min: smallest initial step of the decays.
        dt_max: largest initial step.
        norm_eps: epsilon of the gated norm before the projection out.
    """

    heads: int = 4
    key_heads: int | None = None
    d_key: int | None = None
    d_value: int | None = None
    d_conv: int = 4
    householders: int = 2
    decay: bool = True
    negative: bool = True
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    norm_eps: float = 1e-5

    def build(self, d_model: int) -> "GatedDeltaProduct":
        """The layer, freshly initialised."""
        return GatedDeltaProduct(self, d_model)


class GatedDeltaProduct(HeadDecays):
    """Gated DeltaNet with J writes between two reads.

    ``q, k_1..J, v_1..J = silu(conv(in(u)))`` with q and the keys divided by their lengths; ``beta_j = 2 sigmoid(b_j)``;
    ``S = exp(g_t) S_{t-1}``, then ``S <- S + beta_j k_j (v_j - S^T k_j)^T`` for each j, which makes ``S_t``;
    ``y = out(rms(S_t^T q_t / sqrt(N)) silu(z(u)))``.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, H heads with N by P states each.

    Raises:
        ConfigError: for a size below 1, and where heads do not divide.

    References:
        Siems et al. (2025), arXiv:2502.10297, section 3.
    """

    def __init__(self, config: GatedDeltaProductConfig, d_model: int):
        check_sizes("gated_delta_product", householders=config.householders)
        super().__init__("gated_delta_product", config, d_model, writes=config.householders, decay=config.decay)
        self.config = config
