"""Linear attention whose heads forget at constant rates: what RetNet and lightning attention share."""

from jaxtyping import Float
from torch import Tensor

from dualform.core.packing import Packing
from dualform.ops.selective_scan import selective_state_update
from dualform.ops.ssd import ssd


def decayed_attention(
    q: Float[Tensor, "B T H N"],
    k: Float[Tensor, "B T H N"],
    v: Float[Tensor, "B T H P"],
    rates: Float[Tensor, " H"],
    h: Float[Tensor, "R H P N"] | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "R H P N"]]:
    """``h_t = exp(-rate) h_{t-1} + v_t k_t^T``, ``y_t = h_t q_t`` for each head; a rate of 0 is plain linear attention.

    It is state space duality with a step of 1 throughout.

    Args:
        q: queries, scaled where they are to be scaled.
        k: keys.
        v: values.
        rates: at least 0; float32 or wider.
        h: the states before the first step, one for each row, or sequence of the packing.
        packing: of the inputs.

    Returns:
        y in the dtype of v, and the state after the last step, float32 or wider.

    References:
        Katharopoulos et al. (2020), arXiv:2006.16236, equations 18 to 20 (no decay); Sun et al. (2023),
        arXiv:2307.08621, equation 6; Dao & Gu (2024), arXiv:2405.21060, section 5.3.
    """
    one = rates.new_ones(()).expand(v.shape[:3])
    return ssd(v, one, -rates, k, q, initial_state=h, cu_seqlens=packing)


def decayed_attention_step(
    q: Float[Tensor, "B H N"],
    k: Float[Tensor, "B H N"],
    v: Float[Tensor, "B H P"],
    rates: Float[Tensor, " H"],
    h: Float[Tensor, "B H P N"],
) -> tuple[Float[Tensor, "B H P"], Float[Tensor, "B H P N"]]:
    """One step of :func:`decayed_attention`."""
    one = rates.new_ones(()).expand(*v.shape[:2], 1)
    return selective_state_update(h, v, one, -rates[:, None, None], k, q)
