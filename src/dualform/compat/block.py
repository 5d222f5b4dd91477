"""``Block`` of mamba-ssm: add, norm, mix; and, where there is a feed-forward, add and norm again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dualform.compat.cache import InferenceParams
from dualform.compat.norms import RMSNorm, layer_norm_fn
from dualform.core.errors import ArgumentError


class Block(nn.Module):
    """``r = x + r``; ``x = mixer(norm(r))``; and with a feed-forward ``r = x + r``; ``x = mlp(norm2(r))``.

    The stream is held back: a block returns what its last layer makes, and the stream that this is still to be added
    to.

    Args:
        dim: features.
        mixer_cls: makes the mixer from ``dim``.
        mlp_cls: makes the feed-forward; ``nn.Identity`` for none.
        norm_cls: makes a norm.
        fused_add_norm: whether the norm reads the sum before it is rounded to the dtype of the stream.
        residual_in_fp32: whether the stream is in float32.

    Raises:
        ArgumentError: for ``fused_add_norm`` with a norm that is neither a LayerNorm nor an RMSNorm.
    """

    layer_idx: int | None = None

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ):
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            raise ArgumentError(
                f"Block: fused_add_norm with a norm of the class {type(self.norm).__name__}",
                hint="it takes LayerNorm and mamba_ssm's RMSNorm; leave it out for others",
            )

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the last layer makes, and the stream, both ``(B, T, D)``.

        Args:
            hidden_states: what the block before made.
            residual: the stream before it; None at the first block.
            inference_params: for the mixer.
            seq_idx: for a mixer that takes it, such as Mamba2.
            cu_seqlens: likewise.
        """
        given = {"inference_params": inference_params, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        kept = {name: value for name, value in given.items() if value is not None}
        hidden_states, residual = self._added(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, **kept)
        if self.mlp is not None:
            hidden_states, residual = self._added(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Any:
        """The states of the mixer."""
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype)

    def _added(self, norm: Any, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return add_norm(norm, x, residual, self.fused_add_norm, self.residual_in_fp32, prenorm=True)


def add_norm(
    norm: Any, x: Tensor, residual: Tensor | None, fused: bool, in_fp32: bool, prenorm: bool
) -> tuple[Tensor, Tensor]:
    """The norm of ``x + residual``, and the sum.

    Args:
        norm: a module.
        x: ``(B, T, D)``.
        residual: ``(B, T, D)`` or None.
        fused: whether the norm reads the sum before it is rounded.
        in_fp32: whether the sum is kept in float32.
        prenorm: whether the sum is wanted; otherwise the second result is of no use.
    """
    if fused:
        found = layer_norm_fn(
            x,
            norm.weight,
            norm.bias,
            residual=residual,
            eps=norm.eps,
            prenorm=True,
            residual_in_fp32=in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )
        return found[0], found[1]
    total = x if residual is None else x + residual
    weight = getattr(norm, "weight", None)
    y = norm(total if weight is None else total.to(weight.dtype))
    return y, total.to(torch.float32) if in_fp32 and prenorm else total
