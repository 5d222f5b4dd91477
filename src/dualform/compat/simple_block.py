"""``Block`` of mamba-ssm in its first form, ``mamba_ssm.modules.mamba_simple.Block``."""

from collections.abc import Callable

from torch import nn

from dualform.compat.block import Block as PairBlock


class Block(PairBlock):
    """A block without a feed-forward.

    Args:
        dim: features.
        mixer_cls: makes the mixer from ``dim``.
        norm_cls: makes the norm.
        fused_add_norm: whether the norm reads the sum before it is rounded to the dtype of the stream.
        residual_in_fp32: whether the stream is in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ):
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)
