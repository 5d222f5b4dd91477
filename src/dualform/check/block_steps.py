"""Arguments for steps of whole blocks, in odd sizes: tensors by name, of one dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualform.ops.mamba2_step import Mamba2Weights, mamba2_step
from dualform.ops.mamba_step import MATRICES, MambaWeights, mamba_step

Normal = Callable[..., Tensor]


def mamba_block(normal: Normal, *, bias: bool, sizes: tuple[int, ...] = (3, 5, 7, 3, 2, 4)) -> dict[str, Tensor]:
    """Tensors of :func:`one_mamba_step`: rows, features, channels, states, rank and taps as in ``sizes``."""
    B, M, D, N, R, W = sizes
    biases = {"in_bias": normal(2 * D), "conv_bias": normal(D), "out_bias": normal(M)} if bias else {}
    return {
        "x": normal(B, M),
        "conv": normal(B, D, W - 1),
        "h": normal(B, D, N),
        "norm": normal(M),
        "in_weight": normal(2 * D, M) / M**0.5,
        "conv_weight": normal(D, W),
        "maps": normal(R + 2 * N, D) / D**0.5,
        "steps": normal(D, R) / R**0.5,
        "dt_bias": normal(D),
        "A": -normal(D, N).exp(),
        "D": normal(D),
        "out_weight": normal(M, D) / D**0.5,
        **biases,
    }


def mamba2_block(
    normal: Normal, groups: int = 1, *, bias: bool = False, sizes: tuple[int, ...] = (3, 5, 6, 3, 4, 3)
) -> dict[str, Tensor]:
    """Tensors of :func:`one_mamba2_step`: rows, features, heads, their width, states and taps as in ``sizes``."""
    B, M, H, P, N, W = sizes
    inner = H * P
    through = inner + 2 * groups * N
    every = inner + through + H
    biases = {"in_bias": normal(every), "conv_bias": normal(through), "out_bias": normal(M)} if bias else {}
    return {
        "x": normal(B, M),
        "conv": normal(B, through, W - 1),
        "h": normal(B, H, P, N),
        "norm": normal(M),
        "in_weight": normal(every, M) / M**0.5,
        "conv_weight": normal(through, W),
        "dt_bias": normal(H),
        "A": -normal(H).exp(),
        "D": normal(H),
        "gate": normal(inner),
        "out_weight": normal(M, inner) / inner**0.5,
        **biases,
    }


def one_mamba_step(x: Tensor, conv: Tensor, h: Tensor, **given: Any) -> Any:
    """``mamba_step`` of tensors by name; all but the matrices are made float32 at least."""
    return _step(mamba_step, MambaWeights, x, conv, h, given)


def one_mamba2_step(x: Tensor, conv: Tensor, h: Tensor, **given: Any) -> Any:
    """``mamba2_step`` likewise."""
    return _step(mamba2_step, Mamba2Weights, x, conv, h, given)


def _step(run: Callable[..., Any], weights: Any, x: Tensor, conv: Tensor, h: Tensor, given: dict[str, Any]) -> Any:
    def widened(name: str, m: Tensor) -> Tensor:
        keep = name in MATRICES or not isinstance(m, Tensor)
        return m if keep else m.to(torch.promote_types(m.dtype, torch.float32))

    found = {name: widened(name, given.pop(name, None)) for name in weights._fields}
    x, conv, h = (widened("", m) for m in (x, conv, h))
    return run(x, conv, h, weights(**found), **given)
