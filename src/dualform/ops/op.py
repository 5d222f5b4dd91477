"""An operator: one record of arguments, one reference that is its definition, and backends that must equal it.

The choice of backend lies below PyTorch's dispatcher: autograd, ``torch.compile(fullgraph=True)`` and export see
one opaque operator of fixed arity, whatever runs inside. The choice travels as an argument, so that a backward
on another thread, or a compiled graph, keeps it. The reference is the exception: forced by name it runs as plain
PyTorch, so that autograd differentiates it to any order. An eager call on plain tensors does not need the dispatcher
and goes straight to the backend.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError, BackendError
from dualform.core.packing import Packing
from dualform.ops.derivatives import as_grad, floats, refuse_transforms, transformed, unshared
from dualform.ops.dispatch import distinct, exactly, on_device, ordinary_dispatch, run_there
from dualform.ops.function import function_of
from dualform.ops.in_place import writing
from dualform.ops.layout import empty_like

Arguments = TypeVar("Arguments", bound=tuple)

PREFERENCE = ("cuda", "native", "triton", "torch")
"""Which backend runs a call: the first of these that can. One by another name goes before them all."""

_LIB = torch.library.Library("dualform", "DEF")
_forced = os.environ.get("DUALFORM_BACKEND", "")  # empty: the best that accepts the call
_warned: set[str] = set()
OPS: dict[str, "Op[Any]"] = {}
_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    torch.dtype: "ScalarType",
    Packing | None: "Tensor?",  # see Packing.as_tensor
}
_PLAIN = {Tensor, nn.Parameter}
_watchers, _traced = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state


class SlowBackendWarning(UserWarning):
    """A faster backend exists for this device and could not run the call; says why and what to do."""


def _none(a: Any) -> None:
    return None


def _nothing(a: Any) -> list[Any]:
    return []


def _here() -> str:
    return ""


@dataclass(frozen=True)
class Backend(Generic[Arguments]):
    """One implementation of an op. Every function is given the op's record of arguments, whose fields it reads by name.

    Args:
        name: ``torch``, ``native``, ``triton``, ``cuda``.
        forward: ``(a) -> [*outputs, *saved]``: fresh tensors, outputs as :mod:`dualform.ops.layout` has them;
            ``saved`` is what the backward wants to keep.
        backward: ``(grads, kept, a) -> {name: gradient}`` for every floating tensor of the record; ``kept`` are the
            outputs named by the op's ``keeps``, then ``saved``. A gradient may be wider than its tensor, or complex
            where that is real: the op casts it. None: calls that want a gradient run on another backend.
        infer: ``(a) -> [*outputs]``, when nothing will be differentiated; the default is ``forward``.
        saved: empty tensors shaped like ``saved``, for compilers.
        devices: device types it runs on; empty means any.
        refuses: why it cannot run a call, or None; it may look at shapes and dtypes only.
        missing: asked when a call comes: why the backend cannot run here at all, and what to install; empty when it
            can.
        plain: the outputs of an eager call in operations that PyTorch records and differentiates by itself, or None
            where the backward should rather compute anew; see :mod:`dualform.ops.rerun` and :mod:`dualform.ops.spans`.
        unread: the tensors of which the backward reads shape and dtype only: an eager call does not keep their memory.
        again: of a stepwise op, the outputs of an eager call in operations whose gradient PyTorch can differentiate,
            where that of the backend is to be differentiated through something else than the reference.
    """

    name: str
    forward: Callable[[Arguments], list[Tensor]]
    backward: Callable[[list[Tensor], list[Tensor], Arguments], dict[str, Tensor]] | None = None
    infer: Callable[[Arguments], list[Tensor]] | None = None
    saved: Callable[[Arguments], list[Tensor]] = _nothing
    devices: tuple[str, ...] = ()
    refuses: Callable[[Arguments], str | None] = _none
    missing: Callable[[], str] = _here
    plain: Callable[[Arguments], tuple[Tensor, ...] | None] = _none
    unread: Callable[[Arguments], Sequence[str]] = _nothing
    again: Callable[[Arguments], Sequence[Tensor]] | None = None

    def runs_on(self, device: str) -> bool:
        """Whether this backend is meant for a device type."""
        return not self.devices or device in self.devices


class Op(Generic[Arguments]):
    """A differentiable operator: a record of arguments in, fresh tensors out.

    Args:
        name: ``dualform::name``.
        arguments: the record, a NamedTuple whose annotations give the operator its schema: ``Tensor``,
            ``Tensor | None``, ``Packing | None``, bool, int, float or a dtype. A field ``out_state`` is memory for the
            state that comes out: a backend may write there, and return it, or not. In a compiled program the operator
            ``name_`` writes there, see :mod:`dualform.ops.in_place`. ``in_place`` is for eager calls alone.
        reference: the definition, in plain PyTorch and the letters of its paper: ``(a) -> outputs``.
        fake: the outputs, empty.
        check: raises for a record whose shapes, dtypes or devices do not fit together. Public functions check what
            they are given themselves; this guards the calls that come past them, compiled or through ``torch.ops``.
        outputs: how many there are.
        keeps: outputs, by position, that the backward of every backend needs.
        stepwise: the reference has no loop over time, or none that PyTorch has a better form of: it is the backend
            ``torch`` as well, and runs as plain PyTorch wherever a gradient is wanted that no kernel has. The gradient
            of a kernel is differentiated again through the reference.
    """

    def __init__(
        self,
        name: str,
        arguments: type[Arguments],
        reference: Callable[[Arguments], tuple[Tensor, ...]],
        *,
        fake: Callable[[Arguments], list[Tensor]],
        check: Callable[[Arguments], Any],
        outputs: int = 2,
        keeps: tuple[int, ...] = (),
        stepwise: bool = False,
    ):
        self.name, self.reference, self.fake, self.check, self.keeps = name, reference, fake, check, keeps
        self.arguments, self.outputs, self.stepwise = arguments, outputs, stepwise
        self.backends: list[Backend[Arguments]] = []
        hints = get_type_hints(arguments)
        self.fields: tuple[str, ...] = arguments._fields  # pyright: ignore[reportAttributeAccessIssue]
        self._buffer = self.fields.index("out_state") if "out_state" in self.fields else None
        self._packing = next((i for i, f in enumerate(self.fields) if hints[f] == Packing | None), None)
        self._first = next(i for i, f in enumerate(self.fields) if hints[f] is Tensor)
        schema = ", ".join(f"{_SCHEMA[hints[f]]} {f}" for f in self.fields)
        _LIB.define(f"{name}(str backend, bool save, {schema}) -> Tensor[]")
        _LIB.define(f"{name}_backward(str backend, Tensor[] grads, Tensor[] kept, {schema}) -> Tensor[]")
        _LIB.impl(name, self._run, "CompositeExplicitAutograd")
        _LIB.impl(f"{name}_backward", self._run_backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dualform::{name}", self._fake, lib=_LIB)
        torch.library.register_fake(f"dualform::{name}_backward", self._fake_backward, lib=_LIB)
        self._forward = getattr(torch.ops.dualform, name).default
        self._backward = getattr(torch.ops.dualform, f"{name}_backward").default
        self._write: Callable[..., Any] = _none if self._buffer is None else writing(self, _LIB, schema)
        self._function = function_of(self)
        if stepwise:
            self.add(Backend("torch", lambda a: list(reference(a))))
        OPS[name] = self

    def __call__(
        self, a: Arguments, again: Callable[[Arguments], Sequence[Tensor]] | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs; ``a`` was checked.

        Args:
            a: the record.
            again: the outputs of a stepwise op in operations that PyTorch records, where there is a faster form of them
                than the reference: what the gradient of a kernel is differentiated through.
        """
        tensors = [m for m in a if isinstance(m, Tensor)]
        wanted = False
        if torch.is_grad_enabled():
            for m in tensors:
                if m.requires_grad:
                    wanted = True
                    break
        if _forced == "reference" or (wanted and self.stepwise and not self.has_kernel(a, True)):
            with exactly(tensors[0].device.type):
                return self.reference(a)
        direct = _direct(self.name, tensors) and (self._packing is None or self._borders_are_known(a))
        if not direct:
            if wanted:
                return self._function.apply(_forced, again, *distinct(self._flat(a)))
            if self._buffer is not None and a[self._buffer] is not None:
                return self._write(_forced, *a), a[self._buffer]
            return tuple(self._forward(_forced, False, *self._flat(a)))
        backend, device = self.choose(_forced, a, wanted), tensors[0].device
        if not wanted:
            return tuple(run_there(backend.infer or backend.forward, a, device))
        recorded = None if backend.plain is _none else run_there(backend.plain, a, device)
        return self._function.apply(backend, again, *a) if recorded is None else recorded

    def add(self, backend: Backend[Arguments]) -> None:
        """Register a backend, at its place in :data:`PREFERENCE`."""
        self.backends.append(backend)
        self.backends.sort(key=lambda b: PREFERENCE.index(b.name) if b.name in PREFERENCE else -1)

    def choose(self, forced: str, a: Arguments, differentiate: bool = False) -> Backend[Arguments]:
        """The backend that runs a call.

        Raises:
            BackendError: when the one asked for cannot, with its reason.
        """
        device = a[self._first].device.type
        refusals = []
        for backend in self.backends:
            if forced and backend.name != forced:
                continue
            if backend.devices and device not in backend.devices:
                refusals += [f"{backend.name}: runs on {', '.join(backend.devices)}, not on {device}"] if forced else []
                continue
            why = backend.missing() or (None if backend.refuses is _none else backend.refuses(a))
            if not why and differentiate and backend.backward is None:
                why = "it has no gradient"
            if not why:
                if refusals:
                    _warn_once(f"{self.name} runs on the slower backend {backend.name!r} ({'; '.join(refusals)})")
                return backend
            refusals.append(f"{backend.name}: {why}")
        known = ", ".join(["reference", *(b.name for b in self.backends)])
        raise BackendError(
            f"{self.name}: backend {forced!r} cannot run on {device} ({'; '.join(refusals) or f'it has only {known}'})",
            hint="leave the backend unset, or use dualform.backend('reference')",
        )

    def has_kernel(self, a: Arguments, differentiate: bool) -> bool:
        """Whether something else than the reference would run an eager call of a stepwise op, or give its gradient."""
        fitting = [b for b in self.backends if b.name != "torch" and (b.backward is not None or not differentiate)]
        if not fitting or (_forced and all(b.name != _forced for b in fitting)) or transformed():
            return False
        tensors = [m for m in a if isinstance(m, Tensor)]
        device = tensors[0].device.type
        able = (b for b in fitting if b.runs_on(device) and (not _forced or b.name == _forced))
        return _direct(self.name, tensors) and any(not (b.missing() or b.refuses(a)) for b in able)

    def differentiable(self, a: Arguments) -> list[tuple[str, Tensor]]:
        """The arguments that have a gradient, with their names: the floating and complex tensors."""
        return [(f, m) for f, m in zip(self.fields, a, strict=True) if isinstance(m, Tensor) and floats(m)]

    def _borders_are_known(self, a: Arguments) -> bool:
        """Whether the borders of packed sequences were read: below the dispatcher they are, or they are clamped."""
        return self._packing is None or a[self._packing] is None or a[self._packing].host is not None

    # Records as the dispatcher sees them: a packing is a tensor there.

    def _flat(self, a: Arguments) -> tuple[Any, ...]:
        i, buffer = self._packing, self._buffer
        if i is not None and a[i] is not None:
            return (*a[:i], a[i].as_tensor(), *a[i + 1 :])
        return a if buffer is None else (*a[:buffer], None, *a[buffer + 1 :])

    def _record(self, args: tuple[Any, ...]) -> Arguments:
        """A record for a fake call, where no values are known."""
        i = self._packing
        if i is not None and args[i] is not None:
            args = (*args[:i], Packing(args[i], None), *args[i + 1 :])
        return self.arguments(*args)

    def _checked(self, args: tuple[Any, ...]) -> tuple[Arguments, Tensor | None]:
        """A record for a call from the dispatcher, and whether its borders were wrong where they cannot be read."""
        i, wrong = self._packing, None
        if i is not None and args[i] is not None:
            packing, wrong = Packing.inside(self.name, args[i], args[0])
            args = (*args[:i], packing, *args[i + 1 :])
        if self._buffer is not None and args[self._buffer] is not None:
            raise ArgumentError(
                f"{self.name}: out_state was given, but an operator writes to none of its arguments",
                hint=f"call dualform.ops.{self.name}, or leave out_state out",
            )
        args = tuple(False if f == "in_place" else m for f, m in zip(self.fields, args, strict=True))
        a = self.arguments(*args)
        self.check(a)
        return a, wrong

    def _check_backward(self, grads: list[Tensor], kept: list[Tensor], a: Arguments) -> None:
        """Gradients, and the outputs that were kept, must be like the outputs: kernels go by the sizes of those."""
        out = self.fake(self.arguments(*(m.to("meta") if isinstance(m, Tensor) else m for m in a)))
        like = [*out, *(out[i] for i in self.keeps)]
        given = [*grads, *kept[: len(self.keeps)]]
        came, expected = ([(tuple(m.shape), m.dtype) for m in tensors] for tensors in (given, like))
        if came != expected or any(m.device != a[0].device for m in (*grads, *kept)):
            raise ArgumentError(
                f"{self.name}_backward: gradients and kept outputs are {came}, expected {expected} on {a[0].device}"
            )

    # What runs below the dispatcher.

    def _run(self, forced: str, save: bool, *args: Any) -> list[Tensor]:
        a, wrong = self._checked(args)
        backend = self.choose(forced, a, save)
        with torch.no_grad(), on_device(args[0].device), ordinary_dispatch():  # autograd is told by the caller
            return _blank(wrong, (backend.forward if save or backend.infer is None else backend.infer)(a))

    def _run_backward(self, forced: str, grads: list[Tensor], kept: list[Tensor], *args: Any) -> list[Tensor]:
        a, wrong = self._checked(args)
        self._check_backward(grads, kept, a)
        with on_device(args[0].device), ordinary_dispatch():
            return _blank(wrong, unshared(self._gradients(self.choose(forced, a, True), grads, kept, a)))

    def _gradients(
        self, backend: Backend[Arguments], grads: list[Tensor], kept: list[Tensor], a: Arguments
    ) -> list[Tensor]:
        assert backend.backward is not None
        found = backend.backward(grads, kept, a)
        return [
            as_grad(found[f], m) for f, m in zip(self.fields, a, strict=True) if isinstance(m, Tensor) and floats(m)
        ]

    def _fake(self, forced: str, save: bool, *args: Any) -> list[Tensor]:
        a = self._record(args)
        backend = self.choose(forced, a, save)
        saved = backend.saved(a) if save or backend.infer is None else []
        return self.fake(a) + ([_unguarded(m) for m in saved] if torch.compiler.is_exporting() else saved)

    def _fake_backward(self, forced: str, grads: list[Tensor], kept: list[Tensor], *args: Any) -> list[Tensor]:
        return [empty_like(m) for _, m in self.differentiable(self._record(args))]


def _unguarded(saved: Tensor) -> Tensor:
    """A fake of what a forward keeps, of unknown sizes: an exported program asks nothing of its number of chunks."""
    free = [torch.library.get_ctx().new_dynamic_size() if isinstance(n, torch.SymInt) else n for n in saved.shape]
    return saved.new_empty(free) if any(isinstance(n, torch.SymInt) for n in free) else saved


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the block on the backend called ``name``; an op that lacks it raises.

    Names: ``reference`` (the definition, any device, differentiable to any order), ``torch`` (portable, chunked),
    and whatever ``dualform doctor`` lists; the empty string is the best for each call. The environment variable
    ``DUALFORM_BACKEND`` does the same for a whole process. The choice is per process, not per thread.

    Raises:
        BackendError: for a name that no op knows.
    """
    global _forced
    check_name(name, "backend")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str:
    """The name of the backend that was asked for; empty for the best."""
    return _forced


def check_name(name: str, where: str) -> None:
    """Refuse the name of a backend that no op has.

    Raises:
        BackendError: lists those that there are.
    """
    known = {"reference", *PREFERENCE, *(b.name for op in OPS.values() for b in op.backends)}
    if name and name not in known:
        raise BackendError(f"{where}: no op has a backend {name!r}", hint=f"known: {', '.join(sorted(known))}")


def _blank(wrong: Tensor | None, outputs: list[Tensor]) -> list[Tensor]:
    """NaN instead of what was made of borders that were wrong."""
    return outputs if wrong is None else [m.masked_fill_(wrong, torch.nan) if floats(m) else m for m in outputs]


def _direct(name: str, tensors: list[Tensor]) -> bool:
    """Whether a call may go past the dispatcher: eager, on plain tensors that nothing watches.

    Raises:
        BackendError: for derivatives and maps that PyTorch takes of what it sees, and it does not see into a kernel.
    """
    if torch.compiler.is_compiling():
        return False
    if transformed():
        refuse_transforms(name, tensors)
    if _watchers() or _traced() is not None or tensors[0].is_meta:
        return False
    # A list: a generator would be called for each of them. Backends resolve conjugates themselves.
    return all([type(m) in _PLAIN and not m.is_neg() for m in tensors])


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, SlowBackendWarning, stacklevel=4)
