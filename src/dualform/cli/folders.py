"""From what a person types for MODEL to a model."""

from pathlib import Path
from typing import TYPE_CHECKING

from dualform.core.errors import CheckpointError

if TYPE_CHECKING:
    from dualform.models.lm import LanguageModel
    from dualform.models.tokenizer import Tokenizer

RUN_SUMMARY = "summary.json"  # in the folder of a training run


def model_folder(model: str) -> Path:
    """The folder with the weights: of a saved model, or inside a training run.

    Raises:
        CheckpointError: for a preset, which has no weights, and for a run that has not saved any yet.
    """
    from dualform.models.presets import PRESETS
    from dualform.models.saving.folder import model_folder as inside

    if not Path(model).exists() and model in PRESETS:
        out = f"runs/{model}"
        raise CheckpointError(
            f"{model!r} is a preset: the shape of a model, without weights",
            hint=f"train it: dualform train --set model={model} --out {out}, then give {out}",
        )
    return inside(model)


def load_model(model: str, device: str = "auto", dtype: str | None = None) -> "tuple[LanguageModel, Tokenizer]":
    """The model of a folder and its tokenizer.

    Raises:
        CheckpointError: for a folder that holds no whole model.
        ArgumentError: for a device that does not exist.
    """
    from dualform.models.lm import LanguageModel
    from dualform.models.saving.model import load
    from dualform.models.saving.undisturbed import undisturbed
    from dualform.models.tokenizer import load_tokenizer
    from dualform.ops.device import chosen_device

    chosen = chosen_device(device, f"--device {device}")

    def read(folder: Path) -> "tuple[LanguageModel, Tokenizer]":
        lm = load(folder, device=chosen, dtype=dtype, kind=LanguageModel).eval()
        return lm, load_tokenizer(folder, lm.config.vocab_size)

    return undisturbed(lambda: model_folder(model), read)
