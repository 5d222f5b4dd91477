"""What a run says before its first step and after its last, in sentences."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dualform.train.best import Best
from dualform.train.commands import resuming
from dualform.train.recipe import AUTO, Recipe
from dualform.train.report import amount


def about_the_text(path: str, about: Mapping[str, Any]) -> Iterator[str]:
    """What is trained on and what is held out, and what was passed over.

    Args:
        path: of the text.
        about: of the prepared data.
    """
    train, held_out = about["train"], about["held_out"]
    share = held_out["bytes"] / (train["bytes"] + held_out["bytes"])
    documents = f"{train['documents']} and {held_out['documents']} documents"
    sizes = f"{amount(train['bytes'], 'B')} to train on, {amount(held_out['bytes'], 'B')} held out, {share:.1%}"
    sizes += ", of answers" if "learned" in train else ""
    yield f"{path}: {sizes} ({documents})"
    if about["skipped"]:
        yield f"{path}: passed over {about['skipped']} files that are not text"
    if about.get("cut"):
        why = ": whole documents would be too much or too little" if train["documents"] > 1 else ""
        yield f"held out is the end of {about['cut']}{why}"


def of_cut_conversations(starts: np.ndarray, tokens: int, length: int) -> Iterator[str]:
    """A warning, where conversations are longer than a sequence.

    Args:
        starts: where each conversation begins.
        tokens: of all of them.
        length: the most tokens that one sequence predicts.
    """
    predicted = np.diff(starts, append=tokens) - 1  # of each; nothing foretells its first token
    if cut := int((predicted > length).sum()):
        some = f"{cut:,} of {len(predicted):,} conversations have more than {length:,} tokens (data.length)"
        why = "the answers in a later piece are learned without what came before it"
        yield f"warning: {some} and are cut: {why}; whole: --set data.length={predicted.max()}"


def size(model: nn.Module) -> str:
    """``486,384 parameters``, and how many of them are trained where some are not."""
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{every:,} parameters" + (f", {trained:,} of them trained" if trained < every else "")


def devices(device: torch.device, processes: int) -> str:
    """``cuda:1``, or ``cuda, 2 processes``."""
    return f"{device.type}, {processes} processes" if processes > 1 else str(device)


def of_a_finished_run(recipe: Recipe, step: int) -> str:
    """That nothing is left to train, and the command that trains on: twice as long."""
    longer: dict[str, Any] = {}
    if recipe.steps is not None:
        longer["steps"] = 2 * max(recipe.steps, step)
    if recipe.minutes is not None:
        longer["minutes"] = 2 * recipe.minutes
    return f"finished before, after step {step}: nothing is trained now; to train on: {resuming(recipe.out, longer)}"


def of_a_long_warmup(recipe: Recipe, steps: int) -> Iterator[str]:
    """A warning, where the learning rate rises for more than half of the run."""
    warmup = recipe.optim.warmup
    if warmup != AUTO and warmup > steps / 2:
        rate = f"so that the learning rate stays below optim.lr, {recipe.optim.lr:g}"
        yield f"warning: optim.warmup is {warmup}, more than half of {steps} steps, {rate}"


def of_the_held_out(bits: float, about: Mapping[str, Any]) -> str:
    """The result, beside that of the compressors."""
    compressors = ", ".join(f"{name} {about[name]:.2f}" for name in ("gzip", "xz") if about[name])
    return f"held-out: {bits:.2f} bits per byte" + (f" ({compressors})" if compressors else "")


def of_the_best(best: Best, bits: float, sample: str) -> str:
    """Where the weights with the lowest loss are, and whether the loss has risen since.

    Args:
        best: of the run.
        bits: per byte in the end, of the same text.
        sample: ``" sample"`` where that is not all of the text.
    """
    lowest = f"held-out{sample} was lowest after step {best.step}, {best.bits:.2f}"
    holds = f"{best.folder} holds the model of that step"
    if best.bits < 0.99 * bits:
        why = "and has risen since: the model has begun to learn its text by heart"
        return f"{lowest}, {why}; {holds}. Train for fewer steps, or on more text"
    return f"{lowest}: {holds}"


def of_a_stopped_run(out: Path, step: int, progress: float, place: Path | None) -> Iterator[str]:
    """What was saved, and how to go on."""
    yield f"stopped after step {step}, {progress:.0%} of the run; saved {place}"
    yield f"resume with: {resuming(out)}"
