"""One step of a model as an ONNX file, for devices without Python: a token and a state in, logits and a state out.

A step has a fixed size, so the file is one graph of ONNX's own operators. It is traced from prepared steps, whose
references are plain PyTorch: what depends on the weights alone is a constant of the file.
"""

import importlib.util
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dualform import __version__
from dualform.core.calls import explained
from dualform.core.errors import ArgumentError, CheckpointError, DualformError
from dualform.core.options import joined
from dualform.core.tree import leaves, named_leaves, take
from dualform.models.backbone import Backbone
from dualform.models.saving.incoming import incoming, remove_stale
from dualform.ops.op import backend

FORMAT = 1
METADATA = "dualform"
"""The key under which a file describes itself."""
_NEEDED = ("onnx", "onnxscript")
_FLOATS = (torch.float32, torch.complex64)  # not every operator of onnxruntime takes float64
_ROWS = 2  # of the example; an axis of 1 would be taken for a constant
_LARGE = 2**31 - 2**20  # bytes of weights that one file of protobuf holds


@explained
def export_onnx(model: Backbone, path: str | os.PathLike[str], *, max_len: int = 0) -> None:
    """Write one step of a model as an ONNX file.

    Inputs are ``tokens``, int64 ``(B,)``, or ``x``, ``(B, inputs)`` of a model that reads features, and a tensor for
    each leaf of the state, such as ``state.0.0.h``. Outputs are ``logits``, or ``outputs`` of a classifier or
    regressor, and the state after the step, ``next.0.0.h``, in the same order. The batch B is free. A complex tensor is
    a real one with a last axis of 2. Weights beyond two gigabytes lie in a second file, ``path`` and ``.data``.

    The file's metadata has a JSON text under ``dualform``: the config, and for each leaf of the state the names of its
    input and output, its shape, dtype, and the number that it starts with::

        {"state": [{"input": "state.0.0.h", "output": "next.0.0.h", "shape": ["batch", 48, 16], "dtype": "float32",
                    "complex": false, "start": 0.0}], ...}

    ``start`` is a number, the text ``"-inf"``, or, where the numbers differ, the nested lists of one row.

    Args:
        model: a language model, classifier or regressor, on the CPU, in float32. It is not changed.
        path: of the file; one that is there is replaced.
        max_len: tokens that caches which grow with the context have room for. Beyond it outputs are NaN.

    Raises:
        ArgumentError: for what is no model, a bidirectional one, weights elsewhere or of another dtype, or a model
            with a growing cache without ``max_len``; names it.
        DualformError: for an operator that has no form in ONNX, with the layer that uses it, or a library that is not
            installed.
        CheckpointError: when the disk refuses.
    """
    check_step(model, max_len)
    if wrong := sorted({f"{p.dtype} on {p.device}" for p in model.parameters() if not _fits(p)}):
        hint = "model.float() and model.cpu(), or dualform convert ... --dtype float32"
        raise ArgumentError(f"export_onnx: weights are {joined(wrong)}, expected float32 on cpu", hint=hint)
    path, like = Path(path), model.init_state(_ROWS, max_len=max_len)
    first = "tokens" if model.inputs is None else "x"
    given = torch.zeros(_ROWS, dtype=torch.int64) if model.inputs is None else _zeros(model, model.inputs)
    inputs = [first, *(f"state.{name}" for name, _ in named_leaves(like))]
    outputs = ["outputs" if hasattr(model, "pooling") else "logits"]
    outputs += [f"next.{name}" for name, _ in named_leaves(like)]
    program = _exported(model, given, like, inputs, outputs)
    _plain(program.model, _described(model, like, inputs, outputs))
    _write(program, path)


def check_step(model: Any, max_len: int) -> None:
    """That the step of a model can be traced, by its shape alone, which may be on the meta device.

    Raises:
        ArgumentError: for what is no model, a quantised one, or one with a growing cache without ``max_len``.
        DualformError: for a library that is not installed.
    """
    if not isinstance(model, Backbone):
        hint = "a layer by itself is exported with torch.onnx.export, as a module that calls its step"
        what = f"export_onnx: model is {type(model).__name__}, expected a model of this library"
        raise ArgumentError(what, hint=hint)
    if model.quantization is not None:
        hint = "export the model that it was made of; ONNX's own tools quantise such a file"
        raise ArgumentError("export_onnx: a quantised model as ONNX", hint=hint)
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise DualformError(f"export_onnx needs {' and '.join(missing)}", hint="pip install 'dualform[onnx]'")
    sizes = [named_leaves(model.init_state(1, max_len=length)) for length in (max_len, max_len + 1)]
    growing = [name for (name, a), (_, b) in zip(*sizes, strict=True) if a.shape != b.shape]
    if growing and max_len < 1:
        hint = "such as max_len=1024, or --max-len 1024; outputs after so many tokens are NaN"
        raise ArgumentError(
            f"export_onnx: {joined(growing, 4)} grow with the context, and max_len is {max_len}", hint=hint
        )


def _fits(parameter: Tensor) -> bool:
    return parameter.dtype in _FLOATS and parameter.device.type == "cpu"


def _zeros(model: Backbone, width: int) -> Tensor:
    return torch.zeros(_ROWS, width, dtype=model.norm.weight.dtype)


class _Step(nn.Module):
    """A prepared step of a model, between real tensors."""

    def __init__(self, model: Backbone, like: Any):
        super().__init__()
        flat, self.spec = pytree.tree_flatten(like)
        self.complex = [leaf.is_complex() for leaf in flat]
        self.model, self.prepared = model, model.prepare()

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs and the leaves of the next state."""
        found = [torch.view_as_complex(m) if pair else m for m, pair in zip(state, self.complex, strict=True)]
        y, after = self.prepared.step(x, pytree.tree_unflatten(found, self.spec))
        return (y, *(_as_real(leaf) for leaf in pytree.tree_leaves(after)))


def _as_real(leaf: Tensor) -> Tensor:
    return torch.view_as_real(leaf) if leaf.is_complex() else leaf


def _exported(model: Backbone, given: Tensor, like: Any, inputs: list[str], outputs: list[str]) -> Any:
    """The ONNX program of a step."""
    leafs = tuple(_as_real(leaf) for leaf in leaves(like))
    program: torch.export.ExportedProgram | None = None
    with ExitStack() as stack:
        for context in (torch.no_grad(), backend("reference"), _evaluated(model), _quiet()):
            stack.enter_context(context)
        try:
            program = _traced(_Step(model, like).eval(), given, leafs)
            if any(leaf.is_complex() for leaf in leaves(like)):
                program = program.run_decompositions(_REAL)
            return torch.onnx.export(program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
        except Exception as error:  # of a compiler and of a converter, each with classes of its own
            raise _refused(error, program) from error


def _traced(step: _Step, x: Tensor, state: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """The program of a step for any batch: of a call, or, where that takes the batch for a number, of its bytecode."""
    free = {0: torch.export.Dim.DYNAMIC}
    shapes: Any = (free, tuple(free for _ in state))
    try:
        return torch.export.export(step, (x, state), dynamic_shapes=shapes, strict=False)
    except Exception:  # such as that of PyTorch's LSTM
        return torch.export.export(step, (x, state), dynamic_shapes=shapes, strict=True)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """A model that does not train, which afterwards does as before."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of libraries that are not there, and of its own ones."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


# ONNX has no complex numbers. PyTorch's converter writes their arithmetic as that of pairs, except in these operators.
_aten = torch.ops.aten


def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return x + (a * b if value == 1 else value * a * b)


def _on_pairs(operator: Any) -> Callable[..., Any]:
    """An operator that moves numbers along one axis, on complex ones as pairs."""

    def run(x: Tensor, dim: int, *more: Any) -> Any:
        if not x.is_complex():
            return NotImplemented
        pairs = torch.view_as_real(x.resolve_conj())
        return torch.view_as_complex(operator(pairs, dim if dim >= 0 else dim - 1, *more).contiguous())

    return run


_REAL: dict[Any, Callable[..., Any]] = {
    _aten.addcmul.default: _addcmul,
    _aten.unsqueeze.default: _on_pairs(_aten.unsqueeze.default),
    _aten.select.int: _on_pairs(_aten.select.int),
}


def _refused(error: Exception, program: torch.export.ExportedProgram | None) -> DualformError:
    """What an error of the exporter means: which operator has no form in ONNX, and whose it is."""
    text, cause = str(error), error.__cause__
    while cause is not None:
        text, cause = f"{text}\n{cause}", cause.__cause__
    hint = "the whole model, as a program of PyTorch: torch.export (docs/export.md)"
    if found := re.search(r"OpOverload\(op='([\w.:]+)', overload='(\w+)'\)", text):
        name = f"{found[1]}.{found[2]}"
        return DualformError(f"export_onnx: {name}{_place(program, name)} has no form in ONNX", hint=hint)
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return DualformError(f"export_onnx: the step cannot be traced: {line}", hint=hint)


def _place(program: torch.export.ExportedProgram | None, name: str) -> str:
    """`` of layers/moe``: whose an operator is, once PyTorch's usual decompositions have made it; empty if unknown."""
    nodes = []
    with suppress(Exception):
        nodes = [] if program is None else list(program.run_decompositions().graph.nodes)
    traces = [str(node.meta.get("stack_trace")) for node in nodes if str(node.target) == name]
    places = re.findall(r"dualform/((?:layers|models)/\w+)\.py", traces[0]) if traces else []
    return f" of {places[-1]}" if places else ""


def _described(model: Backbone, like: Any, inputs: list[str], outputs: list[str]) -> dict[str, Any]:
    """What a file says of itself."""
    state = [
        {
            "input": given,
            "output": made,
            "shape": ["batch", *leaf.shape[1:]],
            "dtype": str(leaf.dtype).removeprefix("torch."),
            "complex": pair,
            "start": _start(leaf),
        }
        for given, made, leaf, pair in zip(
            inputs[1:],
            outputs[1:],
            map(_as_real, leaves(like)),
            (leaf.is_complex() for leaf in leaves(like)),
            strict=True,
        )
    ]
    about = {"format": FORMAT, "library": f"dualform {__version__}", "kind": type(model).__name__}
    return {**about, "input": inputs[0], "output": outputs[0], "state": state, "model": model.config.to_dict()}


def _start(leaf: Tensor) -> Any:
    """The one number of a leaf's rows, or the numbers of one."""
    row = take(leaf, slice(0, 1))[0]
    if row.numel() and (row == row.flatten()[0]).all():
        return _number(row.flatten()[0].item())
    return _nested(row.tolist()) if row.numel() else 0


def _number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def _nested(value: Any) -> Any:
    return [_nested(v) for v in value] if isinstance(value, list) else _number(value)


def _plain(model: Any, about: dict[str, Any]) -> None:
    """Describe a program, call its batch so, and leave out where on this machine its nodes come from."""
    nodes = list(model.graph.all_nodes())
    free = model.graph.inputs[0].shape[0]  # an axis with a symbol of the tracer
    for value in (*model.graph.inputs, *(v for node in nodes for v in node.outputs)):
        value.metadata_props.clear()
        for axis, size in enumerate(value.shape or ()):
            if size == free:
                value.shape[axis] = "batch"
    for part in (*nodes, *model.graph.initializers.values(), model.graph):
        part.metadata_props.clear()
        part.doc_string = None
    model.metadata_props.clear()
    model.metadata_props[METADATA] = json.dumps(about, ensure_ascii=False, allow_nan=False)


def _write(program: Any, path: Path) -> None:
    """Put a program in its place, complete or not at all; before it a file with the weights where they are large."""
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        with incoming(path) as new:
            new.mkdir()
            program.save(new / path.name, external_data=size > _LARGE)
            for file in sorted(new.iterdir(), key=lambda file: file.name == path.name):
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
                os.replace(file, path.with_name(file.name))
    except OSError as error:
        hint = "free some space or choose another place; a file saved there before is unchanged"
        raise CheckpointError(f"{path}: cannot save: {error.strerror or error}", hint=hint) from error
