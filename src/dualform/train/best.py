"""The weights with the lowest held-out loss of a run, as a model of their own.

best/config.json, model.safetensors, tokenizer.json, manifest.json     as of any saved model
     evaluation.json                                                   its step and its bits per byte
"""

import math
from pathlib import Path

from dualform.core.errors import CheckpointError
from dualform.core.json_file import entry, read_table, to_json
from dualform.models.lm import LanguageModel
from dualform.models.saving.files import current, replacing
from dualform.models.saving.folder import EVALUATION_FILE
from dualform.models.saving.model import write
from dualform.models.saving.verify import check_files
from dualform.models.tokenizer import Tokenizer
from dualform.train.commands import resuming


class Best:
    """What a folder keeps: ``bits`` per byte of held-out text, infinite before the first evaluation, after ``step``.

    Args:
        folder: that of the kept model.
        resumed: whether what is there counts; where a run begins again from nothing, it does not.

    Raises:
        CheckpointError: for files that were damaged since, or an evaluation that cannot be read.
    """

    def __init__(self, folder: Path, *, resumed: bool):
        self.folder, self.bits, self.step = folder, math.inf, 0
        if resumed and current(folder, EVALUATION_FILE).exists():
            check_files(folder, digests=True, hint=_remedy(folder))
            self.step, self.bits = read_evaluation(folder)

    def offer(self, bits: float, step: int, model: LanguageModel, tokenizer: Tokenizer) -> None:
        """Keep a model if its loss is lower than that of the one that is kept: all of its files are replaced at once.

        Raises:
            CheckpointError: when the disk refuses; the model that was kept still loads.
        """
        if bits < self.bits:
            with replacing(self.folder) as new:
                write(model, new, tokenizer)
                about = {"step": step, "bits_per_byte": bits}
                (new / EVALUATION_FILE).write_text(to_json(about), encoding="utf-8")
            self.bits, self.step = bits, step


def read_evaluation(folder: Path) -> tuple[int, float]:
    """The step and the bits per byte of a kept model.

    Raises:
        CheckpointError: names the file, and the key that is missing or wrong.
    """
    path, hint = current(folder, EVALUATION_FILE), _remedy(folder)
    about = read_table(path, hint=hint)
    step, bits = entry(about, "step", int, path), entry(about, "bits_per_byte", float, path)
    for name, value in (("step", step), ("bits_per_byte", bits)):
        if not 0 <= value < 2**53:
            raise CheckpointError(f"{path}: {name} is {value}, expected 0 or more", hint=hint)
    return step, bits


def _remedy(folder: Path) -> str:
    return f"remove {folder}, and the run goes on without it: {resuming(folder.parent)}"
