"""An operator: one reference that is its definition, and backends that must equal it.

The choice of backend lies below PyTorch's dispatcher: autograd, ``torch.compile(fullgraph=True)`` and export see
one opaque operator of fixed arity, whatever runs inside. The choice travels as an argument, so that a backward
on another thread, or a compiled graph, keeps it. The reference is the exception: forced by name it runs as plain
PyTorch, so that autograd differentiates it to any order.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import BackendError

_LIB = torch.library.Library("dualform", "DEF")
_forced = os.environ.get("DUALFORM_BACKEND", "")  # empty: the best that accepts the call
_warned: set[str] = set()
OPS: dict[str, "Op"] = {}


class SlowBackendWarning(UserWarning):
    """A faster backend exists for this device and could not run the call; says why and what to do."""


def _never(*args: Any) -> None:
    return None


def _nothing(*args: Any) -> list[Tensor]:
    return []


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: ``torch``, ``native``, ``triton``, ``cuda``.
        forward: ``(*args) -> [*outputs, *saved]``: fresh tensors; ``saved`` is what the backward wants to keep.
        backward: ``(grads, kept, *args) -> gradients``: one per floating tensor among the args, in their order;
            ``kept`` are the outputs named by the op's ``keeps``, then ``saved``.
        infer: ``(*args) -> [*outputs]``, when nothing will be differentiated; the default is ``forward``.
        saved: empty tensors shaped like ``saved``, for compilers.
        devices: device types it runs on; empty means any.
        refuses: why it cannot run a call, or None; it may look at shapes and dtypes only.
        missing: why it cannot run here at all, and what to install; empty when it can.
    """

    name: str
    forward: Callable[..., list[Tensor]]
    backward: Callable[..., list[Tensor]]
    infer: Callable[..., list[Tensor]] | None = None
    saved: Callable[..., list[Tensor]] = _nothing
    devices: tuple[str, ...] = ()
    refuses: Callable[..., str | None] = _never
    missing: str = ""

    def runs_on(self, device: str) -> bool:
        """Whether this backend is meant for a device type."""
        return not self.devices or device in self.devices


class Op:
    """A differentiable operator: tensors in, fresh tensors out.

    Args:
        name: ``dualform::name``.
        reference: its definition, in plain PyTorch and the letters of its paper; annotated with plain ``Tensor``,
            it gives the operator its schema.
        fake: the reference's signature, returning its outputs empty.
        keeps: outputs, by position, that the backward of every backend needs.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        *,
        fake: Callable[..., list[Tensor]],
        keeps: tuple[int, ...] = (),
    ):
        self.name, self.reference, self.fake, self.keeps = name, reference, fake, keeps
        self.backends: list[Backend] = []
        schema = torch.library.infer_schema(reference, mutates_args=())
        args, outputs = schema[1:].rsplit(") ->", 1)
        self.outputs = outputs.count("Tensor")
        _LIB.define(f"{self.name}(str backend, bool save, {args}) -> Tensor[]")
        _LIB.define(f"{self.name}_backward(str backend, Tensor[] grads, Tensor[] kept, {args}) -> Tensor[]")
        _LIB.impl(self.name, self._run, "CompositeExplicitAutograd")
        _LIB.impl(f"{self.name}_backward", self._run_backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dualform::{self.name}", self._fake, lib=_LIB)
        torch.library.register_fake(f"dualform::{self.name}_backward", _like_inputs, lib=_LIB)
        self._forward = getattr(torch.ops.dualform, self.name).default
        self._backward = getattr(torch.ops.dualform, f"{self.name}_backward").default
        self._function = _function(self)
        OPS[self.name] = self

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        if _forced == "reference":
            out = self.reference(*args)
            return out if isinstance(out, tuple) else (out,)
        wanted = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if wanted:
            return self._function.apply(_forced, *args)
        return tuple(self._forward(_forced, False, *args))

    def add(self, backend: Backend) -> None:
        """Register a backend; the last one registered is preferred."""
        self.backends.insert(0, backend)

    def choose(self, forced: str, *args: Any) -> Backend:
        """The backend that runs a call.

        Raises:
            BackendError: when the one asked for cannot, with its reason.
        """
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        refusals = []
        for backend in self.backends:
            if forced and backend.name != forced:
                continue
            if not backend.runs_on(device):
                refusals += [f"{backend.name}: runs on {', '.join(backend.devices)}, not on {device}"] if forced else []
                continue
            why = backend.missing or backend.refuses(*args)
            if why is None or why == "":
                if refusals:
                    _warn_once(f"{self.name} runs on the slower backend {backend.name!r} ({'; '.join(refusals)})")
                return backend
            refusals.append(f"{backend.name}: {why}")
        known = ", ".join(["reference", *(b.name for b in self.backends)])
        raise BackendError(
            f"{self.name}: backend {forced!r} cannot run on {device} ({'; '.join(refusals) or f'it has only {known}'})",
            hint="leave the backend unset, or use dualform.backend('reference')",
        )

    def _run(self, forced: str, save: bool, *args: Any) -> list[Tensor]:
        backend = self.choose(forced, *args)
        with on_device(args):
            return (backend.forward if save or backend.infer is None else backend.infer)(*args)

    def _run_backward(self, forced: str, grads: list[Tensor], kept: list[Tensor], *args: Any) -> list[Tensor]:
        with on_device(args):
            return self.choose(forced, *args).backward(grads, kept, *args)

    def _fake(self, forced: str, save: bool, *args: Any) -> list[Tensor]:
        backend = self.choose(forced, *args)
        return self.fake(*args) + (backend.saved(*args) if save or backend.infer is None else [])


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the block on the backend called ``name``; an op that lacks it raises.

    Names: ``reference`` (the definition, any device, differentiable to any order), ``torch`` (portable, chunked),
    and whatever ``dualform doctor`` lists. The environment variable ``DUALFORM_BACKEND`` does the same for a whole
    process. The choice is per process, not per thread.
    """
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str:
    """The name of the backend that was asked for; empty for the best."""
    return _forced


def differentiable(args: tuple[Any, ...]) -> list[Tensor]:
    """The arguments that have a gradient: the floating and complex tensors."""
    return [a for a in args if isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex())]


def on_device(args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Kernels are launched where the arguments are, whichever device is the current one."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    return getattr(torch, device.type).device(device) if device.type in ("cuda", "xpu") else nullcontext()


def _like_inputs(forced: str, grads: list[Tensor], kept: list[Tensor], *args: Any) -> list[Tensor]:
    return [torch.empty_like(a, memory_format=torch.contiguous_format) for a in differentiable(args)]


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, SlowBackendWarning, stacklevel=4)


def _function(op: Op) -> type[torch.autograd.Function]:
    class OpFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, forced: str, *args: Any) -> Any:
            results = op._forward(forced, True, *args)
            kept = [results[i] for i in op.keeps] + results[op.outputs :]
            ctx.forced, ctx.kept = forced, len(kept)
            ctx.plain = tuple(None if isinstance(a, Tensor) else (a,) for a in args)
            ctx.save_for_backward(*kept, *(a for a in args if isinstance(a, Tensor)))
            return tuple(results[: op.outputs])

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
            kept, tensors = list(saved[: ctx.kept]), iter(saved[ctx.kept :])
            args = [next(tensors) if a is None else a[0] for a in ctx.plain]
            found = iter(op._backward(ctx.forced, [g.contiguous() for g in grads], kept, *args))
            has = [isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()) for a in args]
            return (None, *(next(found) if h else None for h in has))

    OpFunction.__name__ = OpFunction.__qualname__ = op.name
    return OpFunction
