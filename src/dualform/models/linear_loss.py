"""Cross-entropy behind a linear map, whose logits are held for one span of the rows at a time."""

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.shapes import wide
from dualform.ops.derivatives import once, refuse_transforms
from dualform.ops.dispatch import exactly
from dualform.ops.op import SlowBackendWarning, forced

_NAME = "LanguageModel.loss"
IGNORED = -100  # a target that does not count, as in torch.nn.functional.cross_entropy
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}  # of a span: large enough to be worth a matrix product
_WORTH_COMPILING = 2**22  # logits; fewer are done before a compiler has begun


def counted(h: Tensor, targets: Tensor) -> Tensor:
    """``h`` ``(M, D)`` with 0 in the rows whose target does not count: whatever they hold, NaN too, reaches no sum."""
    return h.masked_fill((targets == IGNORED)[:, None], 0)


def mean_cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """The mean over the targets that count, in nats; 0 where none does.

    Args:
        logits: ``(M, V)``. Its gradient is finite where those of targets that count are.
        targets: ``(M,)``, int64; -100 does not count.
        weight: ``(V,)``, what a target of each class counts; None is 1.
        smoothing: the share of a target that goes to all classes alike.
    """
    logits = counted(logits, targets).to(wide(logits))
    given: dict[str, Any] = {"weight": weight, "label_smoothing": smoothing, "ignore_index": IGNORED}
    total = F.cross_entropy(logits, targets, reduction="sum", **given)
    count = targets != IGNORED
    if weight is None:
        return total / count.sum().clamp(min=1)
    amount = (weight[targets.clamp(min=0)] * count).sum()
    return total / amount.where(amount > 0, 1)


def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """``sum_i logsumexp(W h_i) - (W h_i)[targets_i]`` over the targets that count, in nats.

    The gradient is computed along with the loss, span by span, and kept instead of the logits: three matrix products
    in all, none of them twice. Logits and their gradient are in the dtype of the product (bfloat16 under autocast),
    sums in float32 or wider; the gradient is scaled before it is rounded to the dtype of its tensor, so that float16
    trains under a ``GradScaler``. Differentiable once; to any order in ``dualform.backend("reference")``.

    Args:
        h: ``(M, D)``, what the map reads.
        weight: ``(V, D)``, its weight.
        targets: ``(M,)``, int64; -100 does not count.
    """
    if forced() == "reference":
        logits = F.linear(counted(h, targets), weight)
        return F.cross_entropy(logits.to(wide(logits)), targets, ignore_index=IGNORED, reduction="sum")
    if not torch.compiler.is_compiling():
        refuse_transforms(_NAME, [h, weight])
    if not torch.is_grad_enabled():
        h, weight = h.detach(), weight.detach()
    return _LinearCrossEntropy.apply(h, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        most = LOGITS_AT_ONCE.get(h.device.type, LOGITS_AT_ONCE["cpu"])
        count = h.shape[0]
        spans = -(-count * weight.shape[0] // most)
        rows = count if spans <= 1 else -(-count // spans)  # alike, so that a compiler sees few shapes
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=wide(weight)) if ctx.needs_input_grad[1] else None
        losses, scale = [], 1.0
        for i in range(0, count, rows) if spans > 1 else (0,):
            part = counted(h[i : i + rows], targets[i : i + rows])
            logits = F.linear(part, weight)
            if dh is None and dweight is None:
                logits = logits.to(wide(logits))
                losses.append(F.cross_entropy(logits, targets[i : i + rows], ignore_index=IGNORED, reduction="sum"))
                continue
            scale = _scale(logits.dtype)
            loss, slope = _slope_on(h.device.type)(logits, targets[i : i + rows])
            losses.append(loss)
            if dh is not None:
                dh[i : i + rows] = torch.mm(slope, weight)
            if dweight is not None and slope.dtype == part.dtype == dweight.dtype:
                dweight.addmm_(slope.T, part)
            elif dweight is not None:
                dweight += _summed(slope.T, part)
        ctx.dtype, ctx.scale = weight.dtype, scale
        ctx.save_for_backward(dh, dweight, h, weight)
        return torch.stack(losses).sum() if losses else h.new_zeros((), dtype=wide(h))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dh, dweight, h, weight = ctx.saved_tensors
        with torch.no_grad():
            scaled = grad / ctx.scale
            found = (
                None if dh is None else (dh.to(scaled.dtype) * scaled).to(dh.dtype),
                None if dweight is None else (dweight * scaled).to(ctx.dtype),
            )
        return (*once(_NAME, found, grad, h, weight), None)


def _scale(dtype: torch.dtype) -> float:
    """What a slope of that dtype is multiplied by: small probabilities are no normal numbers of float16."""
    return 1024.0 if dtype == torch.float16 else 1.0


def _summed(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, a sum over all rows of a span, in float32 where float16 would overflow."""
    if torch.float16 not in (a.dtype, b.dtype):
        return torch.mm(a, b)
    if a.device.type == "cuda" and torch.version.cuda:
        return torch.mm(a.half(), b.half(), out_dtype=torch.float32)
    with exactly(a.device.type):
        return torch.mm(a.float(), b.float())


def _slope(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by the logits, ``softmax(x) - onehot(target)``, in their dtype, times its scale."""
    x = logits.to(wide(logits))
    total, keep, at = x.logsumexp(1, keepdim=True), (targets != IGNORED)[:, None], targets.clamp(min=0)[:, None]
    loss = ((total - x.gather(1, at)) * keep).sum()
    slope = torch.exp(x - total)
    if torch.compiler.is_compiling():
        slope = slope - (torch.arange(x.shape[1], device=x.device) == at).to(slope.dtype)
    else:
        slope.scatter_add_(1, at, torch.full_like(total, -1))
    return loss, (slope * (keep * _scale(logits.dtype))).to(logits.dtype)


def _slope_on(device: str) -> Any:
    return _compiled_slope() if device == "cuda" else _slope


@cache
def _compiled_slope() -> Any:
    """:func:`_slope`, compiled to read the logits fewer times; where that fails, a warning and the function itself."""
    compiled, broken = torch.compile(_slope), list[Exception]()

    def slope(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not broken and logits.numel() >= _WORTH_COMPILING:
            try:
                return compiled(logits, targets)
            except Exception as error:
                broken.append(error)
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(f"the loss runs uncompiled ({reason})", SlowBackendWarning, stacklevel=2)
        return _slope(logits, targets)

    return slope
