"""The base of every sub-layer of a block, and how it is constructed."""

from abc import ABCMeta
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import signature
from itertools import chain
from typing import Any, ClassVar, get_type_hints

from torch import Tensor, nn

from dualform.core.door import other_device, other_rows
from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.options import misfit
from dualform.core.packing import Packing

DEEPEST = 1_000
"""Layers inside of one sub-layer; a config that asks for more is damaged."""

ELSEWHERE = {
    "attention_mask": "models such as LanguageModel take attention_mask; layers take cu_seqlens, of packed sequences",
    "inference_params": "a state is given and returned: y, state = layer(x, state)",
    "interval": "layers in continuous time take intervals, such as S4D, S5 and Mamba2",
    "intervals": "layers in continuous time take intervals, such as S4D, S5 and Mamba2",
    "rate": "layers whose step can be scaled take a rate, such as S4, S4D and DSS",
}
"""Hints for keywords that not every layer has."""


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
    lacks are skipped. ``idle`` is how many parameters one element does not use, such as those of experts that it does
    not go to.

    A part that is ``in_context`` is called with ``context=``, see :class:`~dualform.layers.context.Context`.
    """

    residual: ClassVar[tuple[str, ...]] = ("out_proj.weight",)
    in_context: bool = False
    idle: int = 0

    def prepare_residual(self, norm: Any) -> Any:
        """Steps of ``x + layer(norm(x))``, a :class:`~dualform.layers.stream_step.StreamStep`; None without a kernel.

        What depends on the weights alone is computed in advance, as in ``prepare``.
        """
        return None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("forward", "step"):
            if name in vars(cls):
                setattr(cls, name, _explained(vars(cls)[name]))


def _explained(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run(part, x, ...)``, with an error over arguments that do not fit the part said plainly.

    That is: arguments that it does not have, ``x`` of another dtype or on another device than the weights, and a state
    on another device or with other rows. Nothing is looked at until an error is there.
    """
    shape = signature(run)

    @wraps(run)
    def explained(*args: Any, **keywords: Any) -> Any:
        try:
            return run(*args, **keywords)
        except TypeError:
            if (wrong := misfit(shape, args, keywords, ELSEWHERE)) is None:
                raise
            name = type(args[0]).__name__ + ("" if run.__name__ == "forward" else f".{run.__name__}")
            raise ArgumentError(f"{name}: {wrong[0]}", hint=wrong[1]) from None
        except (RuntimeError, ArgumentError) as error:
            given = shape.bind(*args, **keywords).arguments
            part, x, *_ = given.values()
            rank = 3 if run.__name__ == "forward" else 2
            wrong = _unfit(part, x, rank, given.get("state"), given.get("cu_seqlens"))
            if wrong is None:
                raise
            raise wrong from error

    return explained


def _unfit(part: Part, x: Any, rank: int, state: Any, cu_seqlens: Any) -> ArgumentError | None:
    """The error of an input or a state on another device, of another dtype, or with other rows; None if all fit."""
    name, weight = type(part).__name__, next(chain(part.parameters(), part.buffers()), None)
    if not isinstance(x, Tensor):
        return None
    state = state if getattr(part, "causal", True) else None  # which it refuses
    wrong = None if weight is None else other_device(name, "layer", weight.device, {"x": x, "state": state})
    if wrong is None and x.dim() == rank:
        borders = cu_seqlens.as_tensor() if isinstance(cu_seqlens, Packing) else cu_seqlens
        rows = len(borders) - 1 if isinstance(borders, Tensor) and borders.dim() else len(x)
        wrong = other_rows(name, state, rows)
    return wrong or _mixed(part, x)


def _mixed(part: Part, x: Tensor) -> ArgumentError | None:
    """The error of an input whose dtype is not that of the weights."""
    weight = next((p for p in part.parameters() if p.is_floating_point()), None)
    if weight is None or x.dtype == weight.dtype:
        return None
    return ArgumentError(
        f"{type(part).__name__}: x is {x.dtype}, but the weights are {weight.dtype}",
        hint=f"x.to({weight.dtype}), or layer.to({x.dtype})" if x.is_floating_point() else f"x.to({weight.dtype})",
    )


def check_parts(where: str, parts: Any) -> None:
    """That there are parts.

    Raises:
        ConfigError: says what came.
    """
    if not parts:
        raise ConfigError(f"{where}: parts is empty, expected the configs of its sub-layers")
    for part in parts:
        if isinstance(part, type) or not callable(getattr(part, "build", None)):
            raise ConfigError(f"{where}: parts has {part!r}, expected a config with build(d_model)")


def as_weights(part: nn.Module, y: Tensor) -> Tensor:
    """``y`` in the dtype of a part's weights, where no norm has given it that."""
    weight = next((p for p in part.parameters() if p.is_floating_point()), y)
    return y.to(weight.dtype)
