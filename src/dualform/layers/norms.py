"""The norms around the sub-layers of a block, by the names that configs use."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import suggestion
from dualform.core.shapes import wide
from dualform.layers.norm import RMSNorm


class OffsetRMSNorm(RMSNorm):
    """``rms(x) * (1 + weight)``, the weight 0 at the start; otherwise as :class:`~dualform.layers.norm.RMSNorm`.

    References:
        Gemma Team (2024), arXiv:2403.08295, whose models store the weight so.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "... D"], stream: Float[Tensor, "... D"] | None = None) -> Any:
        """The norm of x, or of ``stream + x``, and that sum."""
        x = x if stream is None else stream + x
        dtype = wide(x, self.weight)
        y = F.rms_norm(x.to(dtype), self.weight.shape, 1 + self.weight.to(dtype), self.eps).to(self.weight.dtype)
        return y if stream is None else (y, x)


class LayerNorm(nn.LayerNorm):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, in the dtype of the weight; computed in float32 or wider.

    Args:
        width: the size of the last axis.
        eps: added to the variance.
        bias: whether there is one.

    References:
        Ba et al. (2016), arXiv:1607.06450, equation 3.
    """

    def __init__(self, width: int, eps: float = 1e-5, *, bias: bool = True):
        super().__init__(width, eps, bias=bias)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "... D"], stream: Float[Tensor, "... D"] | None = None
    ) -> Any:
        """The norm of x, or of ``stream + x``, and that sum."""
        x = x if stream is None else stream + x
        dtype = wide(x, self.weight)
        bias = None if self.bias is None else self.bias.to(dtype)
        y = F.layer_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), bias, self.eps).to(self.weight.dtype)
        return y if stream is None else (y, x)


class BatchNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, of each feature over the elements of a batch.

    While the model trains (``norm.train()``, gradients recorded) mean and variance are those of all elements that are
    no padding, padded or packed. ``running_mean`` and ``running_var`` follow them, ``r = 0.9 r + 0.1 new``, the
    variance without its bias. In evaluation and in steps these are used, so that an output depends on its own row and
    past alone. In training it depends on later elements, too: language models have another norm. A batch with a single
    element has no variance, and trains with the running ones.

    Args:
        width: the size of the last axis.
        eps: added to the variance.

    References:
        Ioffe & Szegedy (2015), arXiv:1502.03167, algorithms 1 and 2.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(
        self, x: Float[Tensor, "... D"], stream: Float[Tensor, "... D"] | None = None, *, counted: Tensor | None = None
    ) -> Any:
        """The norm of x ``(B, T, D)``, or of ``stream + x``, and that sum; of a step, ``(B, D)``.

        ``counted`` ``(B, T)`` says which elements are no padding, None that all are.
        """
        x = x if stream is None else stream + x
        dtype = wide(x, self.weight)
        mean, var = self.running_mean.to(dtype), self.running_var.to(dtype)
        h = x.to(dtype)
        if self.training and torch.is_grad_enabled() and x.dim() > 2:
            mean, var = self._of_batch(h, counted, mean, var)
        y = (h - mean) * (torch.rsqrt(var + self.eps) * self.weight.to(dtype)) + self.bias.to(dtype)
        y = y.to(self.weight.dtype)
        return y if stream is None else (y, x)

    def _of_batch(self, h: Tensor, counted: Tensor | None, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the elements that count; the running ones move once for each forward."""
        rows = h.flatten(0, -2)
        gone = None if counted is None else counted.expand(h.shape[:-1]).flatten().logical_not()[:, None]

        def total(m: Tensor) -> Tensor:
            return (m if gone is None else m.masked_fill(gone, 0)).sum(0)

        count = torch.full((), len(rows), device=h.device) if gone is None else gone.logical_not().sum()
        some, n = count > 1, count.clamp(min=2).to(h.dtype)
        center = total(rows) / n
        spread = total((rows - center).square()) / n
        mean, spread = torch.where(some, center, mean), torch.where(some, spread, var)
        if not in_backward():
            with torch.no_grad():
                unbiased = torch.where(some, spread * n / (n - 1), var)
                self.running_mean.lerp_(mean.to(self.running_mean), 0.1)
                self.running_var.lerp_(unbiased.to(self.running_var), 0.1)
        return mean, spread


def in_backward() -> bool:
    """Whether autograd runs here a forward once more, of a checkpoint."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def counting(norm: Any, counted: Tensor | None) -> Any:
    """A norm that knows which elements ``(B, T)`` are no padding, where it makes a difference."""
    return partial(norm, counted=counted) if counted is not None and isinstance(norm, BatchNorm) else norm


class NoNorm(nn.Module):
    """``x`` as it is, where a block would have a norm."""

    def forward(self, x: Float[Tensor, "... D"], stream: Float[Tensor, "... D"] | None = None) -> Any:
        """x, or ``stream + x`` twice."""
        return x if stream is None else (stream + x, stream + x)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms": RMSNorm,
    "rms_offset": OffsetRMSNorm,
    "layer": LayerNorm,
    "batch": BatchNorm,
    "layer_no_bias": lambda width, eps: LayerNorm(width, eps, bias=False),
}
"""The norms of configs: each is called with a width and an epsilon."""


def make_norm(kind: str | None, width: int, eps: float) -> nn.Module:
    """The norm called ``kind``; without a name, :class:`NoNorm`."""
    return NoNorm() if kind is None else NORMS[kind](width, eps)


def check_norm_kind(where: str, kind: str | None) -> None:
    """That there is a norm of that name.

    Raises:
        ConfigError: suggests the nearest.
    """
    if kind is not None and kind not in NORMS:
        raise ConfigError(f"{where} is {kind!r}, expected the name of a norm", hint=suggestion(kind, list(NORMS)))
