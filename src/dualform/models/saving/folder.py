"""Where the weights are in a folder: of a saved model, or of a training run.

runs/one/recipe.json
         model/                           of a run that ended, or was stopped
         best/                            with the lowest held-out loss on the way
         checkpoints/step-00000200/model/
"""

import os
import re
import shlex
from pathlib import Path

from dualform.core.errors import CheckpointError
from dualform.models.saving.files import ADAPTER_CONFIG_FILE, CONFIG_FILE, current
from dualform.models.saving.hub import hub_name, snapshot

RECIPE_FILE, MODEL, BEST, CHECKPOINTS = "recipe.json", "model", "best", "checkpoints"
EVALUATION_FILE = "evaluation.json"  # in BEST, beside the model
STEP = r"step-(\d{8,})"


def model_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder with the weights: itself, or, in a training run, its ``model/``, else its newest checkpoint's.

    A run's ``best/`` is a saved model, too, and is taken only by its own name. A folder that is neither is given back
    as it is. The name of a model of the Hugging Face Hub, ``owner/name``, is that of its folder in the Hub's cache,
    downloaded if need be; a folder here comes first.

    Raises:
        CheckpointError: for a run that has saved nothing yet, or a name that the Hub does not give.
    """
    if name := hub_name(folder):
        return snapshot(name)
    path = Path(folder)
    saved = [place / MODEL for place in reversed(checkpoints(path / CHECKPOINTS))]
    for place in (path, path / MODEL, *saved):
        names = CONFIG_FILE, ADAPTER_CONFIG_FILE
        if any(current(place, name).exists() or (place / name).exists() for name in names):  # it may move in between
            return place
    if (path / RECIPE_FILE).exists():
        raise CheckpointError(
            f"{path}: a training run that has not saved a model",
            hint=f"finish it: dualform train {shlex.quote(str(path))} --resume",
        )
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder by their number, oldest first; what has another name is none."""
    numbered = ((re.fullmatch(STEP, path.name), path) for path in folder.glob("step-*"))
    found = sorted((int(match[1]), path) for match, path in numbered if match and path.is_dir())
    return [path for step, path in found if path.name == checkpoint_name(step)]


def checkpoint_name(step: int) -> str:
    """``step-00000200``, and more digits for more steps."""
    return f"step-{step:08d}"
