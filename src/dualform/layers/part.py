"""The base of every sub-layer of a block, and how it is constructed."""

from abc import ABCMeta
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, ClassVar, get_type_hints

from torch import Tensor, nn

from dualform.core.errors import ArgumentError, ConfigError

DEEPEST = 1_000
"""Layers inside of one sub-layer; a config that asks for more is damaged."""


class PartClass(ABCMeta):
    """Lets a layer be written without its config: ``Layer(64, d_state=16)`` is ``LayerConfig(d_state=16).build(64)``.

    Applies to every class whose constructor is ``(config, d_model)``, the config annotated with a dataclass.
    """

    def __call__(cls, *args: Any, **keywords: Any) -> Any:
        """``cls(config, d_model)`` or ``cls(d_model, **options)``, the options those of the config.

        Raises:
            ConfigError: for an option that the config does not have, suggesting the nearest, or a missing ``d_model``.
        """
        first = args[0] if args else keywords.get("config")
        config = get_type_hints(cls.__init__).get("config")
        if not is_dataclass(config) or is_dataclass(first):
            return super().__call__(*args, **keywords)
        names = [f.name for f in fields(config)]
        given = [*args, *([keywords.pop("d_model")] if "d_model" in keywords else [])]
        if len(given) != 1 or not isinstance(given[0], int) or isinstance(given[0], bool):
            came = ", ".join(map(repr, given)) or "nothing"
            raise ConfigError(
                f"{cls.__name__}: d_model is {came}, expected one whole number",
                hint=f"{cls.__name__}(64), with options by name: {', '.join(names)}",
            )
        make: Any = config
        return super().__call__(make(**keywords), given[0])


class Part(nn.Module, metaclass=PartClass):
    """A sub-layer of a block, ``(B, T, D) -> (B, T, D)``: a mixer, or a feed-forward that sees each step alone.

    ``residual`` names the parameters that a model scales at the start to scale what the part adds to the residual
    stream, as ``parameters()`` names them: the weight of its last linear map. Names that a configuration of the part
    lacks are skipped.
    """

    residual: ClassVar[tuple[str, ...]] = ("out_proj.weight",)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("forward", "step"):
            if name in vars(cls):
                setattr(cls, name, _explained(vars(cls)[name]))


def _explained(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run(part, x, ...)``, with an error of PyTorch over the dtype of ``x`` said plainly."""

    @wraps(run)
    def explained(self: Part, x: Any, *args: Any, **keywords: Any) -> Any:
        try:
            return run(self, x, *args, **keywords)
        except RuntimeError as error:
            mixed = _mixed(self, x)
            if mixed is None:
                raise
            raise mixed from error

    return explained


def _mixed(part: Part, x: Any) -> ArgumentError | None:
    """The error of an input whose dtype is not that of the weights."""
    weight = next((p for p in part.parameters() if p.is_floating_point()), None)
    if not isinstance(x, Tensor) or weight is None or x.dtype == weight.dtype:
        return None
    return ArgumentError(
        f"{type(part).__name__}: x is {x.dtype}, but the weights are {weight.dtype}",
        hint=f"x.to({weight.dtype}), or layer.to({x.dtype})" if x.is_floating_point() else f"x.to({weight.dtype})",
    )
