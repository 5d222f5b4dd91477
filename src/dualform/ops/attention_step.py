"""One step of a block with attention in it: everything from the residual stream to the residual stream."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import readable
from dualform.core.shapes import check_tensors, once_per_shape
from dualform.ops.mamba_step import check_axes, check_step_dtypes, widened
from dualform.ops.normalize import check_norm, normalize, scale
from dualform.ops.op import Op
from dualform.ops.turned import turned

_WHERE = "attention_step"


def attention_step(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    weights: "AttentionWeights",
    *,
    heads: int,
    ring: bool = False,
    interleaved: bool = False,
    factor: float | None = None,
    softcap: float | None = None,
    magnitude: float = 1.0,
    eps: float = 1e-5,
    group: int = 0,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x + out(softmax(factor q K^T) V)`` of one element, where ``q, k, v = in(norm(x))``.

    The key and the value go to the caches K and V, and are attended to like the earlier ones. Queries and keys are
    turned by their position before: the pair i of their features by the angle ``length frequencies[i]``. Here
    ``norm(x) = x / sqrt(mean(x^2) + eps)`` times a weight.

    The matrices may have 16 bits beside a float32 stream, or 8 with scales, and the caches may have 16, to which keys
    and values are rounded; everything else has the dtype of x, in which all of it is computed, and nothing else is
    rounded in between.

    Args:
        x: ``(B, M)``, the residual stream, float32 or float64.
        k: ``(B, S, G, P)``, the keys of earlier elements: that of position p lies in slot p.
        v: ``(B, S, G, V)``, the values.
        length: ``(B,)``, int64, the elements that each row has seen.
        weights: of the norm and the layer.
        heads: H, the heads of queries, a multiple of G.
        ring: whether position p lies in slot ``p mod S``, so that an element sees itself and the ``S - 1`` before it.
            Otherwise there must be a free slot.
        interleaved: whether the features ``2 i`` and ``2 i + 1`` are a pair, and not i and ``R + i``.
        factor: of the products of queries and keys; None is ``1 / sqrt(P)``.
        softcap: c, which bounds the scores s to ``c tanh(s / c)``; None for no bound.
        magnitude: factor of the features that are turned.
        eps: added to the mean square.
        group: for matrices of 8 bits, the neighbours in a row that share a scale, as in
            :func:`~dualform.ops.quantized_linear.quantized_linear`.
        in_place: whether the next keys, values and lengths may be written where these lie.

    Returns:
        The stream ``(B, M)``, and the next k, v and length.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together, and for a row without a free slot.

    References:
        Vaswani et al. (2017), arXiv:1706.03762, section 3.2; Ainslie et al. (2023), arXiv:2305.13245 (shared keys);
        Su et al. (2021), arXiv:2104.09864, section 3.2.2 (turned pairs).
    """
    factor = k.shape[-1] ** -0.5 if factor is None and isinstance(k, Tensor) and k.shape[-1:] > (0,) else factor
    options = heads, ring, interleaved, 1.0 if factor is None else factor, softcap or 0.0, magnitude, eps, group
    a = AttentionStep(x, k, v, length, *weights, *options, in_place)
    _check(a)
    y, k, v, length = attention_step_op(a)
    return y, k, v, length


class AttentionWeights(NamedTuple):
    """What a block with attention is made of."""

    norm: Tensor  # (M,)
    in_weight: Tensor  # ((H + G) P + G V, M), a matrix: queries, keys, values
    in_bias: Tensor | None  # as many as it has rows
    frequencies: Tensor  # (R,), float64, the angle by which a pair turns in a step; R is at most P / 2
    out_weight: Tensor  # (M, H V), a matrix
    out_bias: Tensor | None  # (M,)
    in_scales: Tensor | None = None  # of the matrices where those have 8 bits, (rows, ceil(columns / group)) each
    out_scales: Tensor | None = None


class AttentionStep(NamedTuple):
    """The arguments of the operator, as in :func:`attention_step`."""

    x: Tensor
    k: Tensor
    v: Tensor
    length: Tensor
    norm: Tensor
    in_weight: Tensor
    in_bias: Tensor | None
    frequencies: Tensor
    out_weight: Tensor
    out_bias: Tensor | None
    in_scales: Tensor | None
    out_scales: Tensor | None
    heads: int
    ring: bool
    interleaved: bool
    factor: float
    softcap: float  # 0 for none
    magnitude: float
    eps: float
    group: int = 0
    in_place: bool = False


MATRICES = {"in_weight": "in_scales", "out_weight": "out_scales"}
_TENSORS = AttentionStep._fields.index("heads")


def _check(a: AttentionStep) -> None:
    check_norm(_WHERE, a.eps)
    if not (math.isfinite(a.factor) and math.isfinite(a.magnitude) and 0 <= a.softcap < math.inf):
        came = f"factor, magnitude and softcap are {a.factor}, {a.magnitude} and {a.softcap}"
        raise ArgumentError(f"{_WHERE}: {came}, expected finite numbers, the last one not negative")
    _check_tensors(a.heads, a.group, *a[:_TENSORS])
    if not a.length.is_cpu or not a.length.numel() or not readable(a.length):
        return
    low, high = (int(m) for m in a.length.aminmax())
    if low < 0 or (a.ring and a.k.shape[1] < 1) or (not a.ring and high >= a.k.shape[1]):
        raise ArgumentError(
            f"{_WHERE}: length goes from {low} to {high}, expected 0 or more, and a slot for one more of {a.k.shape[1]}"
        )


@once_per_shape
def _check_tensors(heads: int, group: int, *tensors: Tensor | None) -> None:
    a = AttentionStep._make((*tensors, heads, False, False, 1.0, 0.0, 1.0, 0.0, group, False))
    sizes = check_tensors(
        _WHERE,
        x=(a.x, "B M"),
        k=(a.k, "B S G P"),
        v=(a.v, "B S G V"),
        length=(a.length, "B"),
        norm=(a.norm, "M"),
        in_weight=(a.in_weight, "* M"),
        in_bias=(a.in_bias, "? *"),
        frequencies=(a.frequencies, "R"),
        out_weight=(a.out_weight, "M *"),
        out_bias=(a.out_bias, "? M"),
        **{of: (getattr(a, of), "? * *") for of in MATRICES.values()},
    )
    M, G, P, V, R = (sizes[letter] for letter in "MGPVR")
    if 0 in (M, G, P, V):
        raise ArgumentError(f"{_WHERE}: a size of the weights is 0: M, G, P, V = {M}, {G}, {P}, {V}")
    if not isinstance(heads, int) or heads < 1 or heads % G:
        raise ArgumentError(f"{_WHERE}: heads is {heads}, expected a multiple of the {G} heads of k")
    if 2 * R > P:
        raise ArgumentError(f"{_WHERE}: frequencies has shape ({R},), expected at most {P // 2} for keys of width {P}")
    for name, dtype in (("length", torch.int64), ("frequencies", torch.float64)):
        if getattr(a, name).dtype != dtype:
            raise ArgumentError(f"{_WHERE}: {name} is {getattr(a, name).dtype}, expected {dtype}")
    made = (heads + G) * P + G * V
    expected: dict[str, tuple[Tensor | None, int, int]] = {
        "in_weight": (a.in_weight, 0, made),
        "in_bias": (a.in_bias, 0, made),
        "out_weight": (a.out_weight, 1, heads * V),
    }
    check_axes(_WHERE, expected)
    check_step_dtypes(_WHERE, a, MATRICES, beside=("length", "frequencies"))


def _reference(a: AttentionStep) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, (rows, slots, groups, width), values = a.x.dtype, a.k.shape, a.v.shape[3]

    def of(x: Tensor, matrix: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.linear(x, widened(matrix, scales, a.group, dtype), bias)

    made = of(scale(normalize(a.x, 1, a.eps, False), a.norm, None), a.in_weight, a.in_scales, a.in_bias)
    qk, v = made.split([(a.heads + groups) * width, groups * values], -1)
    angle = a.length[:, None, None] * a.frequencies
    q, k = turned(qk.unflatten(1, (-1, width)), angle, a.magnitude, a.interleaved).split([a.heads, groups], 1)
    at = torch.arange(rows, device=k.device), a.length % slots if a.ring else a.length
    K, V = a.k.index_put(at, k.to(a.k.dtype)), a.v.index_put(at, v.unflatten(1, (groups, -1)).to(a.v.dtype))
    length = a.length + 1
    scores = a.factor * torch.einsum("bghp,bsgp->bghs", q.unflatten(1, (groups, -1)), K.to(dtype))
    scores = a.softcap * torch.tanh(scores / a.softcap) if a.softcap else scores
    hidden = torch.arange(slots, device=k.device) >= length[:, None]
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    y = torch.einsum("bghs,bsgv->bghv", weights, V.to(dtype).masked_fill(hidden[..., None, None], 0))
    return a.x + of(y.flatten(1), a.out_weight, a.out_scales, a.out_bias), K, V, length


def _fake(a: AttentionStep) -> list[Tensor]:
    return [m.new_empty(m.shape) for m in (a.x, a.k, a.v, a.length)]


attention_step_op = Op(_WHERE, AttentionStep, _reference, fake=_fake, check=_check, outputs=4, stepwise=True)
