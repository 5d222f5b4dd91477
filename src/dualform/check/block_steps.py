"""Arguments for steps of whole blocks, in odd sizes: tensors by name, of one dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualform.ops.attention_step import AttentionWeights, attention_step
from dualform.ops.head_step import HeadWeights, head_step
from dualform.ops.lti_step import LtiWeights, lti_step
from dualform.ops.mamba2_step import Mamba2Weights, mamba2_step
from dualform.ops.mamba_step import MATRICES, MambaWeights, mamba_step
from dualform.ops.mlp_step import MLPWeights, mlp_step

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


def lti_block(
    normal: Normal, *, shared: bool, gate: bool, bias: bool = True, sizes: tuple[int, ...] = (3, 5, 7)
) -> dict[str, Tensor]:
    """Tensors of :func:`one_lti_step`: rows, features and states as in ``sizes``; complex numbers as pairs."""
    B, M, N = sizes
    own = (N,) if shared else (M, N)
    outputs = M if gate else 2 * M
    return {
        "x": normal(B, M),
        "h": normal(B, *own, 2),
        "norm": normal(M),
        "a": normal(*own, 2) / 2,
        "b": normal(N, M, 2) / M**0.5 if shared else normal(M, N, 2),
        "C": normal(M, N, 2) / N**0.5,
        "D": normal(M),
        "out_weight": normal(outputs, M) / M**0.5,
        **({"out_bias": normal(outputs)} if bias else {}),
    }


def attention_block(
    normal: Normal, *, bias: bool = False, sizes: tuple[int, ...] = (3, 5, 4, 2, 6, 5, 4)
) -> dict[str, Tensor]:
    """Tensors of :func:`one_attention_step`: rows, features, heads, groups, their widths and slots as in ``sizes``."""
    B, M, H, G, P, V, S = sizes
    made = (H + G) * P + G * V
    return {
        "x": normal(B, M),
        "k": normal(B, S, G, P),
        "v": normal(B, S, G, V),
        "norm": normal(M),
        "in_weight": normal(made, M) / M**0.5,
        "out_weight": normal(M, H * V) / (H * V) ** 0.5,
        **({"in_bias": normal(made), "out_bias": normal(M)} if bias else {}),
    }


def mlp_block(
    normal: Normal, *, gated: bool = True, bias: bool = False, sizes: tuple[int, ...] = (3, 5, 7)
) -> dict[str, Tensor]:
    """Tensors of :func:`one_mlp_step`: rows, features and hidden features as in ``sizes``."""
    B, M, D = sizes
    inner = 2 * D if gated else D
    return {
        "x": normal(B, M),
        "norm": normal(M),
        "in_weight": normal(inner, M) / M**0.5,
        "out_weight": normal(M, D) / D**0.5,
        **({"in_bias": normal(inner), "out_bias": normal(M)} if bias else {}),
    }


def head_block(normal: Normal, *, bias: bool = False, sizes: tuple[int, ...] = (3, 5, 11)) -> dict[str, Tensor]:
    """Tensors of :func:`one_head_step`: rows, features and outputs as in ``sizes``."""
    B, M, V = sizes
    biases = {"out_bias": normal(V)} if bias else {}
    return {"x": normal(B, M), "norm": normal(M), "out_weight": normal(V, M) / M**0.5, **biases}


def one_attention_step(x: Tensor, k: Tensor, v: Tensor, *, turned: int = 0, **given: Any) -> Any:
    """``attention_step`` of tensors by name, where row i has seen so many tokens that rows differ; without lengths.

    Args:
        x: as there.
        k: as there.
        v: as there.
        turned: the pairs of features that turn.
        given: the weights, and options as there.
    """
    most = 3 * k.shape[1] if given.get("ring") else k.shape[1]
    length = 5 * torch.arange(len(x), device=x.device) % max(most, 1)
    frequencies = 0.7 ** torch.arange(turned, dtype=torch.float64, device=x.device)
    weights = {name: given.pop(name, None) for name in AttentionWeights._fields if name != "frequencies"}
    weights = {name: m if name in MATRICES else _widened(m) for name, m in weights.items()}
    held = AttentionWeights(**weights, frequencies=frequencies)
    return attention_step(_widened(x), _widened(k), _widened(v), length, held, **given)[:3]


def one_mlp_step(x: Tensor, **given: Any) -> Any:
    """``mlp_step`` of tensors by name; all but the matrices are made float32 at least."""
    return (_stateless(mlp_step, MLPWeights, x, given),)


def one_head_step(x: Tensor, **given: Any) -> Any:
    """``head_step`` likewise."""
    return (_stateless(head_step, HeadWeights, x, given),)


def _stateless(run: Callable[..., Any], weights: Any, x: Tensor, given: dict[str, Any]) -> Any:
    found = {name: given.pop(name, None) for name in weights._fields}
    held = weights(**{name: m if name in MATRICES else _widened(m) for name, m in found.items()})
    return run(_widened(x), held, **given)


def one_lti_step(x: Tensor, h: Tensor, **given: Any) -> Any:
    """``lti_step`` of tensors by name, with pairs of real numbers for complex ones, and for the next state."""
    pairs = {name: _paired(given.pop(name)) for name in ("a", "b", "C")}
    real = {name: given.pop(name, None) for name in LtiWeights._fields if name not in pairs}
    real = {name: m if name == "out_weight" else _widened(m) for name, m in real.items()}
    weights = LtiWeights(**real, **pairs)
    x, h = lti_step(_widened(x), _paired(h), weights, **given)
    return x, torch.view_as_real(h)


def one_mamba_step(x: Tensor, conv: Tensor, h: Tensor, **given: Any) -> Any:
    """``mamba_step`` of tensors by name; all but the matrices are made float32 at least."""
    return _step(mamba_step, MambaWeights, x, conv, h, given)


def one_mamba2_step(x: Tensor, conv: Tensor, h: Tensor, **given: Any) -> Any:
    """``mamba2_step`` likewise."""
    return _step(mamba2_step, Mamba2Weights, x, conv, h, given)


def _step(run: Callable[..., Any], weights: Any, x: Tensor, conv: Tensor, h: Tensor, given: dict[str, Any]) -> Any:
    found = {name: given.pop(name, None) for name in weights._fields}
    found = {name: m if name in MATRICES else _widened(m) for name, m in found.items()}
    x, conv, h = map(_widened, (x, conv, h))
    return run(x, conv, h, weights(**found), **given)


def _paired(m: Any) -> Any:
    return torch.view_as_complex(_widened(m).contiguous()) if isinstance(m, Tensor) else m


def _widened(m: Any) -> Any:
    return m.to(torch.promote_types(m.dtype, torch.float32)) if isinstance(m, Tensor) else m


def block_cases(normal: Normal) -> list[tuple[str, str, Callable[..., Any], dict[str, Tensor], dict[str, Any]]]:
    """Of each case the name, the op, the function, its tensors and its options."""
    ring = {"heads": 4, "ring": True, "turned": 2, "interleaved": True, "softcap": 2.0, "factor": 0.7, "magnitude": 1.3}
    relu2 = {"gated": False, "activation": "relu2", "factor": 0.5}
    two_norms = {"groups": 3, "norm_before_gate": True, "dt_limit": (0.1, 2.0)}
    return [
        ("mamba_step", "mamba_step", one_mamba_step, mamba_block(normal, bias=True), {}),
        ("mamba_step no bias", "mamba_step", one_mamba_step, mamba_block(normal, bias=False), {}),
        ("mamba2_step", "mamba2_step", one_mamba2_step, mamba2_block(normal, bias=True), {}),
        ("mamba2_step groups", "mamba2_step", one_mamba2_step, mamba2_block(normal, 3), two_norms),
        ("lti_step", "lti_step", one_lti_step, lti_block(normal, shared=False, gate=False), {}),
        ("lti_step shared", "lti_step", one_lti_step, lti_block(normal, shared=True, gate=True, bias=False), {}),
        ("attention_step", "attention_step", one_attention_step, attention_block(normal), {"heads": 4, "turned": 3}),
        ("attention_step ring", "attention_step", one_attention_step, attention_block(normal, bias=True), ring),
        ("mlp_step", "mlp_step", one_mlp_step, mlp_block(normal, bias=True), {"activation": "gelu_tanh"}),
        ("mlp_step no gate", "mlp_step", one_mlp_step, mlp_block(normal, gated=False), relu2),
        ("head_step", "head_step", one_head_step, head_block(normal, bias=True), {"factor": 0.5, "cap": 2.0}),
    ]
