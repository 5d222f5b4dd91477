"""The filter of a Markov chain that is seen through log-likelihoods of its states, a step after the other."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.ops.op import Op
from dualform.ops.state import check_dtype

_WHERE = "markov_filter"


class Filtered(NamedTuple):
    """The probabilities of the states after each observation, and that of the observation."""

    p: Tensor  # (B, T, K)
    c: Tensor  # (B, T)
    top: Tensor  # (B, T)


def markov_filter(start: Tensor, A: Tensor, log_b: Tensor) -> Filtered:
    """Filter a chain with ``p(z_1 = i) = start_i`` and ``p(z_{t+1} = j | z_t = i) = A_tij``.

        e_t = exp(log_b_t - top_t),   top_t = max_k log_b_tk, or 0 where that is not finite
        p_t = v_t e_t / c_t,          c_t = sum_k v_tk e_tk,      v_1 = start,   v_{t+1} = p_t A_t

    Then ``p_t = p(z_t | y_1 .. y_t)``, and ``log c_t + top_t = log p(y_t | y_1 .. y_{t-1})``. What is constant in time,
    or the same in all rows, may be an expanded view, which is not copied. Everything is computed in float32, or in
    float64 where an argument is. Numbers that fall below the smallest normal one are 0.

    Args:
        start: ``(B, K)``.
        A: ``(B, T - 1, K, K)``, from each step to the next.
        log_b: ``log p(y_t | z_t = k)``, ``(B, T, K)``.

    Returns:
        ``p`` (B, T, K), ``c`` (B, T) and ``top`` (B, T). After observations of probability 0, c is 0 and p is NaN.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Rabiner (1989), "A tutorial on hidden Markov models and selected applications in speech recognition", section
        V.A.
    """
    return Filtered(*markov_filter_op(MarkovFilter(*taken(_WHERE, start, A, log_b))))


class MarkovFilter(NamedTuple):
    """The arguments of the operator, as in :func:`markov_filter`; all in one dtype."""

    start: Tensor  # (B, K)
    A: Tensor  # (B, T - 1, K, K)
    log_b: Tensor  # (B, T, K)


def taken(where: str, vector: Tensor, A: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a caller gave, checked and in one dtype; the first is of the first step, or of every one."""
    check_chain(where, vector, A, log_b)
    dtype = wide(vector, A, log_b)
    return vector.to(dtype), A.to(dtype), log_b.to(dtype)


@once_per_shape
def check_chain(where: str, vector: Tensor, A: Tensor, log_b: Tensor) -> None:
    """That shapes, dtypes and devices fit together.

    Raises:
        ArgumentError: names the argument that does not.
    """
    name, axes = ("p", "B T K") if where == "markov_smoother" else ("start", "B K")
    sizes = check_tensors(where, log_b=(log_b, "B T K"), A=(A, "B S K K"), **{name: (vector, axes)})
    if sizes["S"] != max(sizes["T"] - 1, 0):
        hint = "a transition leads from each step to the next; a constant one is A.expand(B, T - 1, K, K)"
        raise ArgumentError(f"{where}: A has {sizes['S']} steps, but log_b has {sizes['T']}", hint=hint)
    check_real(where, log_b=log_b, A=A, **{name: vector})


def check_record(where: str, a: Any) -> None:
    """A record of a vector, A and log_b, whatever comes behind these, of one dtype.

    Raises:
        ArgumentError: names the argument that does not fit.
    """
    check_chain(where, *a[:3])
    check_dtype(where, a.A.dtype)
    for name, m in zip(a._fields[:3], a[:3], strict=True):
        if m.dtype != a.A.dtype:
            raise ArgumentError(f"{where}: {name} is {m.dtype}, but A is {a.A.dtype}", hint=f"{name}.to({a.A.dtype})")


def _check(a: MarkovFilter) -> None:
    check_record(_WHERE, a)


def relative_likelihoods(log_b: Tensor) -> tuple[Tensor, Tensor]:
    """``e_t`` ``(B, T, K)``, 1 for the likeliest state, and ``top`` ``(B, T)``."""
    if not log_b.shape[-1]:
        return log_b, log_b.sum(-1)
    top = log_b.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    return (log_b - top).exp(), top.squeeze(-1)


def _reference(a: MarkovFilter) -> tuple[Tensor, ...]:
    e, top = relative_likelihoods(a.log_b)
    v, probs, sums = a.start, [], []
    for t in range(e.shape[1]):
        joint = v * e[:, t]
        c = joint.sum(-1, keepdim=True)
        p = joint / c
        probs.append(p)
        sums.append(c)
        if t + 1 < e.shape[1]:
            v = (p.unsqueeze(-2) @ a.A[:, t]).squeeze(-2)
    if not probs:
        return tuple(_fake(a))
    return torch.stack(probs, 1), torch.cat(sums, 1), top


def _fake(a: MarkovFilter) -> list[Tensor]:
    rows, length, _ = a.log_b.shape
    return [a.log_b.new_empty(a.log_b.shape), *(a.log_b.new_empty(rows, length) for _ in range(2))]


markov_filter_op = Op(_WHERE, MarkovFilter, _reference, fake=_fake, check=_check, outputs=3, stepwise=True)
