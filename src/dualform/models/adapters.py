"""Low-rank adapters: beside a weight W that stays, B A of rank r is trained, and W + (alpha / r) B A is what runs.

The adapters themselves are those of PEFT, laid on the linear maps of a model's blocks; what is here chooses the maps
and remembers where the weights below them came from.

References:
    Hu et al. (2021), LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from dualform.core.errors import ConfigError, DualformError
from dualform.core.options import brief

_NAME = "default"  # PEFT's own for the one adapter of a model
_PREFIX = "base_model.model.model."  # PEFT's own, and the name of the model inside of dualform.hf
_MARKS = ("lora_A", "lora_B")


class Adaptation(NamedTuple):
    """What a model with adapters was made from.

    Attributes:
        base: the folder of the weights below the adapters, or their name on the Hugging Face Hub.
        digests: of the files with those weights, by name.
        options: PEFT's, as in ``adapter_config.json``.
    """

    base: str
    digests: dict[str, str]
    options: dict[str, Any]


def adapt(
    model: nn.Module,
    base: str | Path,
    digests: dict[str, str],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Iterable[str] = (),
) -> Adaptation:
    """Lay adapters on linear maps of a model, in place; they alone are trained from then on.

    Args:
        model: a language model with the weights of ``base``.
        base: where they came from; saved with the adapters.
        digests: of the files there.
        rank: r.
        alpha: the factor of B A is ``alpha / rank``.
        dropout: the share of inputs of A that are dropped in training.
        targets: names of linear maps, whole as ``"blocks.0.parts.0.in_proj"`` or their ends as ``"in_proj"``; none
            means every linear map of the blocks.

    Returns:
        What the ``adaptation`` of the model is to be, so that its adapters are saved by themselves.

    Raises:
        ConfigError: for a target that names no linear map of a block, with the nearest.
        DualformError: where PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise DualformError("lora needs the library peft", hint="pip install 'dualform[hf]'") from error
    options = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # a number; PEFT divides it
        lora_dropout=dropout,
        target_modules=_chosen(model, tuple(targets)),
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
    )
    peft.inject_adapter_in_model(options, model, adapter_name=_NAME)
    about = {**options.to_dict(), "target_modules": sorted(options.target_modules or ()), "inference_mode": True}
    return Adaptation(str(base), dict(digests), about)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's adapters, by their names in the model."""
    found = model.state_dict(keep_vars=True).items()
    return {name: tensor for name, tensor in found if any(f".{mark}." in name for mark in _MARKS)}


def stored_name(name: str) -> str:
    """The name of a tensor of :func:`adapter_tensors` in PEFT's files."""
    return _PREFIX + name.replace(f".{_NAME}.", ".")


def adapted_map(stored: str) -> tuple[str, str] | None:
    """The linear map and the matrix, ``"lora_A"`` or ``"lora_B"``, of a name in PEFT's files; None for another name."""
    parts = stored.removeprefix(_PREFIX).split(".")
    if not stored.startswith(_PREFIX) or parts[-1] != "weight" or parts[-2] not in _MARKS:
        return None
    return ".".join(parts[:-2]), parts[-2]


def _chosen(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """The whole names of the linear maps that are meant."""
    maps = [name for name, module in model.named_modules() if name.startswith("blocks.") and type(module) is nn.Linear]
    chosen = maps if not targets else []
    for target in targets:
        found = [name for name in maps if f".{name}".endswith(f".{target}")]
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in maps})
            near = ", ".join(map(repr, get_close_matches(target, [*ends, *maps])))
            hint = f"did you mean {near}?" if near else f"it has {', '.join(ends) or 'none'}"
            raise ConfigError(f"recipe: lora.targets names {brief(target)}, no linear map of a block", hint=hint)
        chosen += found
    if not chosen:
        raise ConfigError("recipe: lora finds no linear map in the blocks of the model", hint="train it without lora")
    return sorted(set(chosen))
