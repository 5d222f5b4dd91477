"""What quantising a model costs: bits per byte of a text, and how far its logits move."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualform.models.lm import LanguageModel
from dualform.models.quantized import GROUP, quantize
from dualform.models.tokenizer import Tokenizer
from dualform.train.corpus import Corpus, split
from dualform.train.data import Dataset, whole_text
from dualform.train.evaluate import score
from dualform.train.recipe import Data

_DEMO_BYTES = 2**16
_COMPARED = 512  # tokens whose logits are compared


class Change(NamedTuple):
    """A model before and after it was quantised.

    Attributes:
        before: bits per byte of the text.
        after: the same, quantised.
        tokens: how many were predicted.
        distance: of the logits of the first tokens, ``|quantised - before| / |before|``; the mean over the vocabulary
            is taken off both, as it changes no probability.
        agreement: the share of those tokens behind which the most likely token is the same.
    """

    before: float
    after: float
    tokens: int
    distance: float
    agreement: float


def quantize_measured(
    model: LanguageModel, dataset: Dataset, *, group: int = GROUP, length: int = 1024, limit: int | None = None
) -> Change:
    """Quantise a model in place, as :func:`dualform.quantize` does, and compare it with what it was.

    Args:
        model: a language model.
        dataset: its held-out part is read.
        group: neighbours in a row of a matrix that share a scale.
        length: tokens after which a state that grows begins anew.
        limit: tokens to read; None for all.
    """
    before, logits = score(model, dataset, length=length, limit=limit), _logits(model, dataset)
    quantize(model, group=group)
    after, moved = score(model, dataset, length=length, limit=limit), _logits(model, dataset)
    distance = float((moved - logits).norm() / logits.norm())
    agreement = float((moved.argmax(-1) == logits.argmax(-1)).double().mean())
    return Change(before.bits_per_byte, after.bits_per_byte, before.tokens, distance, agreement)


@contextmanager
def text_of(path: Path | None, tokenizer: Tokenizer) -> Iterator[Dataset]:
    """A text to measure on: a file or folder, or without one what the demo holds out of Python's standard library.

    Raises:
        DataError: for a path that does not exist or holds no text.
    """
    if path is not None:
        with whole_text(Data(path=str(path)), tokenizer) as dataset:
            yield dataset
        return
    with TemporaryDirectory(prefix="dualform-") as folder:
        size = 0
        for number, (document, held_out) in enumerate(split(Corpus(Data()))):
            if held_out:
                (Path(folder) / f"{number:06}.txt").write_bytes(document.text)
                size += len(document.text)
            if size >= _DEMO_BYTES:
                break
        with whole_text(Data(path=folder), tokenizer) as dataset:
            yield dataset


@torch.inference_mode()
def _logits(model: LanguageModel, dataset: Dataset) -> Tensor:
    """``(T, V)`` of the first tokens, without their means."""
    training = model.training
    model.eval()
    tokens = torch.from_numpy(dataset.held_out[:_COMPARED].astype(np.int64))[None]
    logits = model(tokens.to(next(model.parameters()).device))[0][0].double().cpu()
    model.train(training)
    return logits - logits.mean(-1, keepdim=True)
