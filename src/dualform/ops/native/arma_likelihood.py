"""The likelihood of stationary series on a CPU, with its gradient and the derivatives of that along a direction."""

from typing import Any

import torch
from torch import Tensor

from dualform.ops.arma_likelihood import ArmaLikelihood, arma_likelihood_op
from dualform.ops.derivatives import once, outline
from dualform.ops.native import library
from dualform.ops.native.structs import ARMA
from dualform.ops.op import Backend

_WHERE = "arma_likelihood"


def _call(a: ArmaLikelihood, way: ArmaLikelihood | None = None, **found: Tensor | None) -> None:
    rows, length = a.y.shape
    sizes = {"rows": rows, "length": length, "p": a.ar.shape[1], "q": a.ma.shape[1], "dtype": a.y.dtype}
    given = {name: x.resolve_neg().contiguous() for name, x in a._asdict().items()}
    if way is not None:
        given |= {f"{name}_way": x.contiguous() for name, x in way._asdict().items()}
    library.call("arma", ARMA, **sizes, **given, **found)


def _infer(a: ArmaLikelihood) -> list[Tensor]:
    loglik = torch.zeros_like(a.variance)
    _call(a, loglik=loglik)
    return [loglik]


def _forward(a: ArmaLikelihood) -> list[Tensor]:
    """The value and its gradient at once; by y only where that is wanted, or nobody knows."""
    loglik, gradient = torch.zeros_like(a.variance), _empty(a)
    some = a.y.requires_grad or not any(x.requires_grad for x in a)
    _call(a, loglik=loglik, **_named(gradient._replace(y=gradient.y if some else None)))
    return [loglik, *(gradient if some else gradient._replace(y=a.y.new_empty(0)))]


def _backward(grads: list[Tensor], kept: list[Tensor], a: ArmaLikelihood) -> dict[str, Tensor]:
    found = {name: g for name, g in zip(a._fields, kept, strict=True) if g.shape == getattr(a, name).shape}
    scaled = {name: g * grads[0].view(-1, *[1] * (g.dim() - 1)) for name, g in found.items()}
    return {name: scaled.get(name, outline(x)) for name, x in a._asdict().items()}


def _empty(a: ArmaLikelihood) -> ArmaLikelihood:
    return ArmaLikelihood._make(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in a)


def _named(gradient: Any) -> dict[str, Any]:
    return {f"d{name}": x for name, x in gradient._asdict().items()}


class _Value(torch.autograd.Function):
    """The likelihoods, whose gradient can be differentiated."""

    @staticmethod
    def forward(ctx: Any, *a: Tensor) -> Tensor:
        ctx.save_for_backward(*a)
        return _infer(ArmaLikelihood(*a))[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = _Gradient.apply(*ctx.saved_tensors)
        return tuple(g * grads[0].view(-1, *[1] * (g.dim() - 1)) for g in found)


class _Gradient(torch.autograd.Function):
    """The gradient, of each row by itself; it is differentiated once."""

    @staticmethod
    def forward(ctx: Any, *a: Tensor) -> Any:
        ctx.save_for_backward(*a)
        found = _empty(ArmaLikelihood(*a))
        _call(ArmaLikelihood(*a), **_named(found))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a = ctx.saved_tensors
        with torch.no_grad():  # the Hessian is symmetric, so that both ways to multiply by it are one
            found = _empty(ArmaLikelihood(*a))
            _call(ArmaLikelihood(*a), ArmaLikelihood(*grads), **_named(found))
        return once(_WHERE, tuple(found), *grads, *a)


arma_likelihood_op.add(
    Backend(
        "native",
        _forward,
        _backward,
        infer=_infer,
        saved=_empty,  # pyright: ignore[reportArgumentType]
        devices=("cpu",),
        missing=library.why_missing,
        again=lambda a: [_Value.apply(*a)],
    )
)
