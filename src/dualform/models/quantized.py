"""Models whose linear maps and embeddings have 8 bits, for inference on a CPU."""

from typing import Any, TypeVar

from torch import nn

from dualform.core.errors import ArgumentError
from dualform.core.int8 import check_group
from dualform.core.options import brief
from dualform.layers.implicit_filter import ImplicitFilter
from dualform.layers.projection import plain
from dualform.layers.quantized import QuantizedEmbedding, QuantizedLinear
from dualform.models.adapters import adapter_tensors
from dualform.models.backbone import Backbone, Quantization

Model = TypeVar("Model", bound=Backbone)
INT8 = "int8"
GROUP = 64
_WHERE = "quantize"


def quantize(model: Model, *, group: int = GROUP) -> Model:
    """Give the linear maps, the embedding and the head of a model weights of 8 bits, in place.

    A weight becomes the nearest of 255 multiples of a scale, which ``group`` neighbours in a row share: the largest
    magnitude among them, over 127. Everything else, states and activations included, is float32: what is left of the
    model beside its matrices, such as norms, convolutions and rates of decay, is made so. Experts, and the networks
    that make the filters of a Hyena, keep the weights they have.

    It is a model as before: it reads, steps, generates and is saved, in little more than a quarter of the bytes, and on
    a CPU its steps take less than half of the time. It can no longer be trained.

    Args:
        model: a language model, classifier or regressor; its parameters will want no gradient, and it will be in
            evaluation mode.
        group: neighbours in a row of a matrix that share a scale, a multiple of 32; one as long as the rows gives each
            output one scale. A scale takes 4 bytes.

    Returns:
        The model.

    Raises:
        ArgumentError: for what is no model, one that is quantised already or has adapters or hooks on its maps, another
            group, or weights that hold NaN or infinity. The model is then as it was.
    """
    if not isinstance(model, Backbone):
        raise ArgumentError(f"{_WHERE}: model is {type(model).__name__}, expected a model of dualform")
    if model.quantization is not None:
        raise ArgumentError(f"{_WHERE}: the model is quantised already, in groups of {model.quantization.group}")
    if model.adaptation is not None or any(adapter_tensors(model)):
        raise ArgumentError(f"{_WHERE}: the model has adapters", hint="merge them first: dualform convert FOLDER OUT")
    check_group(_WHERE, group)
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding):
            _check(name, module)
    _replace(model, group, values=True)
    model.float()
    return _marked(model, Quantization(group))


def quantized_shape(model: Model, how: Quantization) -> Model:
    """:func:`quantize` of the modules alone, whose weights are empty: a saved model is about to fill them."""
    kept = {model.get_submodule(name) for name in how.kept}
    _replace(model, how.group, values=False, made=dict(zip(kept, kept, strict=True)))
    return _marked(model, how)


def check_kind(where: str, kind: str) -> None:
    """That a kind of quantisation is one that there is.

    Raises:
        ArgumentError: names those that there are.
    """
    if kind != INT8:
        raise ArgumentError(f"{where}: quantize is {brief(kind)}, expected {INT8!r}")


def _check(name: str, module: Any) -> None:
    if not plain(module, kind=type(module)):
        hint = "remove it, and hook the quantised map"
        raise ArgumentError(f"{_WHERE}: {name} has a hook, which a map in its place would not have", hint=hint)
    if not bool(module.weight.isfinite().all()):
        raise ArgumentError(f"{_WHERE}: {name}.weight holds NaN or infinity, which 8 bits do not have")


def _marked(model: Model, how: Quantization) -> Model:
    model.quantization = how
    model.requires_grad_(False)
    return model.eval()


def _replace(module: nn.Module, group: int, *, values: bool, made: dict[nn.Module, nn.Module] | None = None) -> None:
    """Put quantised modules in the places of plain ones; one that stands in several places stays one."""
    made = {} if made is None else made
    for name, child in module._modules.items():
        if child is None:
            continue
        if child not in made:
            made[child] = _quantized(child, group, values)
            if made[child] is child and not isinstance(child, ImplicitFilter):
                _replace(child, group, values=values, made=made)
        if made[child] is not child:
            setattr(module, name, made[child])


def _quantized(module: Any, group: int, values: bool) -> nn.Module:
    """A quantised module in the place of another, or that one itself."""
    if type(module) is nn.Linear:
        new = QuantizedLinear(module.in_features, module.out_features, group, module.bias)
    elif type(module) is nn.Embedding:
        new = QuantizedEmbedding(module.num_embeddings, module.embedding_dim, group)
    else:
        return module
    if values:
        new.take(module.weight)
        del module.weight  # its memory is free before the next one is read
        return new
    return new.to(module.weight.device)
