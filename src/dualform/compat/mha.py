"""``MHA`` of mamba-ssm: attention with a cache, rotary positions, a short convolution and a feed-forward beside it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualform.compat.cache import InferenceParams
from dualform.compat.vision import depthwise
from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors
from dualform.ops.device import explains_device


@explains_device
class MHA(nn.Module):
    """``softmax(scale q k^T) v`` between two projections, of which the first is followed by a convolution if asked for.

    Args:
        embed_dim: features.
        num_heads: H, query heads.
        num_heads_kv: key and value heads, each shared by several query heads; None is H.
        head_dim: P; None is ``embed_dim / H``.
        mlp_dim: inner width of a gated feed-forward beside the attention, rounded up to a multiple of 256; 0 for none.
        qkv_proj_bias: whether the first projection has a bias.
        out_proj_bias: whether the last one has one.
        softmax_scale: None is ``1 / sqrt(P)``.
        causal: whether no element sees a later one.
        layer_idx: the key of its cache in an ``InferenceParams``.
        d_conv: width of a convolution over queries, keys and values; 0 for none.
        rotary_emb_dim: leading features of a head that are rotated by their position; 0 for none.
        rotary_emb_base: of the angles.
        rotary_emb_interleaved: whether neighbours are rotated together, instead of halves.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ArgumentError: where heads do not divide.

    References:
        Vaswani et al. (2017), arXiv:1706.03762, section 3.2; Su et al. (2021), arXiv:2104.09864, section 3.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.embed_dim, self.num_heads, self.layer_idx, self.causal = embed_dim, num_heads, layer_idx, causal
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % self.num_heads_kv or (head_dim is None and embed_dim % num_heads):
            raise ArgumentError(
                f"MHA: num_heads is {num_heads}, expected a multiple of num_heads_kv = {self.num_heads_kv} and, "
                f"without head_dim, a divisor of embed_dim = {embed_dim}"
            )
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        if rotary_emb_dim % 2 or rotary_emb_dim > self.head_dim:
            raise ArgumentError(
                f"MHA: rotary_emb_dim is {rotary_emb_dim}, expected an even number up to {self.head_dim}"
            )
        self.mlp_dim, self.d_conv, self.softmax_scale = math.ceil(mlp_dim / 256) * 256, d_conv, softmax_scale
        self.rotary_emb_dim, self.rotary_emb_base = rotary_emb_dim, rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved
        qkv = self.head_dim * (num_heads + 2 * self.num_heads_kv)
        like = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(embed_dim, qkv + self.mlp_dim, bias=qkv_proj_bias, **like)
        if d_conv > 0:
            self.conv1d = depthwise(qkv, d_conv, True, **like)
        self.out_proj = nn.Linear(self.head_dim * num_heads + self.mlp_dim // 2, embed_dim, bias=out_proj_bias, **like)

    def forward(self, x: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """``(B, T, D) -> (B, T, D)``.

        With ``inference_params`` keys and values are written to its cache behind those of the first ``seqlen_offset``
        elements, and read from it.
        """
        check_tensors("MHA", x=(x, f"B T {self.embed_dim}"))
        qkv, beside = self.in_proj(x).split([self.in_proj.out_features - self.mlp_dim, self.mlp_dim], -1)
        offset, cache = 0, None
        if inference_params is not None:
            cache, offset = self._cache(inference_params, len(x)), inference_params.seqlen_offset
            if not self.causal:
                raise ArgumentError("MHA: inference_params without causal", hint="MHA(..., causal=True)")
            if offset + x.shape[1] > cache[0].shape[1]:
                raise ArgumentError(
                    f"MHA: {offset} + {x.shape[1]} elements, but the cache has room for {cache[0].shape[1]}",
                    hint="give InferenceParams a larger max_seqlen",
                )
        if self.d_conv > 0:
            qkv = self._convolved(qkv, cache, offset)
        heads = self.num_heads, self.num_heads_kv, self.num_heads_kv
        q, k, v = (m.unflatten(-1, (-1, self.head_dim)) for m in qkv.split([self.head_dim * n for n in heads], -1))
        q, k = self._rotated(q, offset), self._rotated(k, offset)
        if cache is not None:
            end = offset + x.shape[1]
            cache[0][:, offset:end, 0].copy_(k.detach())
            cache[0][:, offset:end, 1].copy_(v.detach())
            if offset:
                k, v = (m.to(q.dtype) for m in cache[0][:, :end].unbind(2))
        y = self._attend(q, k, v, offset).flatten(2)
        if self.mlp_dim:
            up, gate = beside.chunk(2, -1)
            y = torch.cat([y, up * F.silu(gate)], -1)
        return self.out_proj(y)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """Keys and values ``(B, S, 2, heads, P)``, zeros, and the last inputs of the convolution if there is one."""
        new, size = self.out_proj.weight.new_zeros, (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        kv = new(*size, dtype=dtype or self.out_proj.weight.dtype)
        if not self.d_conv:
            return (kv,)
        return kv, new(batch_size, self.conv1d.weight.shape[0], self.d_conv, dtype=dtype or self.conv1d.weight.dtype)

    def _cache(self, inference_params: InferenceParams, batch: int) -> tuple[Tensor, ...]:
        if self.layer_idx is None:
            raise ArgumentError("MHA: inference_params needs a layer_idx", hint="MHA(..., layer_idx=0)")
        known = inference_params.key_value_memory_dict
        if self.layer_idx not in known:
            known[self.layer_idx] = self.allocate_inference_cache(batch, inference_params.max_seqlen)
        cache = known[self.layer_idx]
        begin = inference_params.batch_size_offset
        cache = tuple(m[begin : begin + batch] for m in ((cache,) if isinstance(cache, Tensor) else cache))
        if len(cache[0]) != batch:
            raise ArgumentError(f"MHA: the cache has room for {len(cache[0])} rows, got {batch}")
        return cache

    def _convolved(self, qkv: Tensor, cache: tuple[Tensor, ...] | None, offset: int) -> Tensor:
        """The convolution, without an activation, behind the inputs that the cache has kept."""
        line = qkv.transpose(1, 2)
        if cache is None:
            return self.conv1d(line)[..., : line.shape[2]].transpose(1, 2)
        past = cache[1].to(line.dtype) if offset else torch.zeros_like(cache[1], dtype=line.dtype)
        whole = torch.cat([past, line], -1)
        cache[1].copy_(whole[..., -self.d_conv :].detach())
        conv = self.conv1d
        return F.conv1d(whole[..., 1:], conv.weight, conv.bias, groups=conv.groups).transpose(1, 2)

    def _rotated(self, m: Tensor, offset: int) -> Tensor:
        """``(B, T, heads, P)`` with its leading features rotated by position."""
        size = self.rotary_emb_dim
        if not size:
            return m
        places = torch.arange(offset, offset + m.shape[1], device=m.device, dtype=torch.float32)
        rates = self.rotary_emb_base ** (-torch.arange(0, size, 2, device=m.device, dtype=torch.float32) / size)
        angles = (places[:, None] * rates)[:, None]
        cos, sin = angles.cos().to(m.dtype), angles.sin().to(m.dtype)
        turned, rest = m[..., :size], m[..., size:]
        if self.rotary_emb_interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([turned, rest], -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
        """``(B, T, H, P)`` queries over ``(B, S, heads, P)``, S being ``offset + T``."""
        mask = None
        if self.causal and offset:
            steps = torch.arange(q.shape[1], device=q.device)
            mask = torch.arange(k.shape[1], device=q.device) <= (steps + offset)[:, None]
        q, k, v = (m.transpose(1, 2) for m in (q, k, v))
        shared = self.num_heads != self.num_heads_kv
        causal = self.causal and not offset
        y = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=self.softmax_scale, enable_gqa=shared)
        return y.transpose(1, 2)
