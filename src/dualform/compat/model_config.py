"""``MambaConfig`` of mamba-ssm."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class MambaConfig:
    """Sizes of a :class:`~dualform.compat.mixer_seq.MambaLMHeadModel`.

    Args:
        d_model: features.
        d_intermediate: inner width of a feed-forward in every block; 0 for none.
        n_layer: blocks.
        vocab_size: tokens; the table is padded.
        ssm_cfg: options of the mixer, and its name as "layer": "Mamba1" or "Mamba2".
        attn_layer_idx: the blocks with attention instead.
        attn_cfg: options of :class:`~dualform.compat.mha.MHA`.
        rms_norm: whether norms have no mean.
        residual_in_fp32: whether the stream is in float32.
        fused_add_norm: whether norms read the sum before it is rounded.
        pad_vocab_size_multiple: what the size of the table is a multiple of.
        tie_embeddings: whether the head is the table.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
