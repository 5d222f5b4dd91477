"""How well a model predicts held-out text, in bits per byte: comparable across tokenizers, and with compressors."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from dualform.core.tree import nbytes
from dualform.models.lm import IGNORED, LanguageModel
from dualform.train.data import Dataset

_STREAMS, _SPAN = 16, 256  # rows and tokens that go through the model together
_LOGITS = 2**26  # at most


@torch.inference_mode()
def bits_per_byte(
    model: LanguageModel, dataset: Dataset, *, length: int, limit: int | None = None, bfloat16: bool = False
) -> float:
    """``-sum_t log2 p(x_t | x_<t)`` over the held-out tokens, divided by the bytes of their text.

    The text is cut into at most 16 streams, read side by side. Within a stream the state is carried from the first
    token to the last, as far as the text goes; only a state that would grow without bound (attention without a
    window) restarts after every ``length`` tokens. Separators between documents are predicted, too, but are no bytes.

    Args:
        model: left in the mode, training or evaluation, that it is in.
        dataset: its held-out part is read.
        length: tokens of a training window.
        limit: tokens to read, the first of every stream; None for all.
        bfloat16: whether matrix products are taken in bfloat16.
    """
    training = model.training
    model.eval()
    try:
        nats, text = _read(model, dataset, length, limit, bfloat16)
    finally:
        model.train(training)
    return nats / math.log(2) / max(1, text)


def _read(model: LanguageModel, dataset: Dataset, length: int, limit: int | None, bfloat16: bool) -> tuple[float, int]:
    """The cost of the text in nats, and its bytes."""
    ids, device = dataset.held_out, next(model.parameters()).device
    grows = nbytes(model.init_state(1, max_len=2 * length)) > nbytes(model.init_state(1, max_len=length))
    span, targets = length if grows else _SPAN, len(ids) - 1
    streams = max(1, min(_STREAMS, targets // span, _LOGITS // (span * model.config.vocab_size)))
    borders = np.arange(streams + 1) * targets // streams
    longest = int(np.diff(borders).max())
    columns = longest if limit is None else min(longest, -(-limit // streams))
    nats, text, state = torch.zeros((), dtype=torch.float64), 0, None
    for at in range(0, columns, span):
        places = borders[:-1, None] + np.arange(at, min(at + span, columns))
        inside = places < borders[1:, None]
        text += int(dataset.nbytes[places[inside] + 1].sum())
        places = np.minimum(places, targets - 1)
        tokens, after = (torch.from_numpy(ids[places + i].astype(np.int64)).to(device) for i in (0, 1))
        after = after.masked_fill(~torch.from_numpy(inside).to(device), IGNORED)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits, state = model(tokens, None if grows else state)
        nats += F.cross_entropy(
            logits.flatten(0, 1).float(), after.flatten(), ignore_index=IGNORED, reduction="sum"
        ).cpu()
    return nats.item(), text
