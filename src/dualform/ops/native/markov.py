"""Markov chains on a CPU: the filter, the smoother and the most likely path, a row after the other."""

from typing import Any

import torch
from torch import Tensor

from dualform.ops.layout import whole_steps
from dualform.ops.markov_filter import MarkovFilter, markov_filter_op
from dualform.ops.markov_path import MarkovPath, markov_path_op
from dualform.ops.markov_smoother import MarkovSmoother, markov_smoother_op
from dualform.ops.native import library
from dualform.ops.native.library import fresh
from dualform.ops.native.structs import MARKOV_CHAIN
from dualform.ops.op import Backend

_MOST = 4096  # states; what a vector and a transition take is kept by each thread


def _call(name: str, a: Any, **fields: Any) -> None:
    rows, length, states = a.log_b.shape
    if rows and length and states:
        views = {"a": whole_steps(a.A), "b": whole_steps(a.log_b)}
        library.call(name, MARKOV_CHAIN, dtype=a.A.dtype, rows=rows, length=length, states=states, **views, **fields)


def _filter(a: MarkovFilter) -> list[Tensor]:
    p, c, top = found = [fresh(m) for m in _empty(a.log_b, 3)]
    _call("markov_filter", a, start=a.start.contiguous(), p=p, sum=c, top=top)
    return found


def _smooth(a: MarkovSmoother) -> list[Tensor]:
    probs, weight = (fresh(m) for m in _empty(a.log_b, 2))
    after = fresh(torch.empty_like(probs if a.messages else probs[:, :0]))
    messages = {"after": after} if a.messages else {}
    _call("markov_smoother", a, p=a.p.contiguous(), probs=probs, weight=weight, **messages)
    return [probs, weight, after]


def _path(a: MarkovPath) -> list[Tensor]:
    rows, length, _ = a.log_b.shape
    path, score = a.log_b.new_full((rows, length), -1, dtype=torch.int64), a.log_b.new_zeros(rows)
    lengths = None if a.lengths is None else a.lengths.contiguous()
    _call("markov_path", a, start=a.start.contiguous(), lengths=lengths, path=path, score=score)
    return [path, score]


def _empty(log_b: Tensor, count: int) -> list[Tensor]:
    """For numbers of each state, and for some of each step."""
    return [log_b.new_empty(log_b.shape), *(log_b.new_empty(log_b.shape[:2]) for _ in range(count - 1))]


def _refuses(a: Any) -> str | None:
    return f"it takes {_MOST} states" if a.A.shape[-1] > _MOST else None


_ABLE = {"devices": ("cpu",), "refuses": _refuses, "missing": library.why_missing}
markov_filter_op.add(Backend("native", _filter, **_ABLE))
markov_smoother_op.add(Backend("native", _smooth, **_ABLE))
markov_path_op.add(Backend("native", _path, **_ABLE))
