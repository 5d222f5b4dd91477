"""How well a model predicts held-out text, in bits per byte: comparable across tokenizers, and with compressors."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from dualform.core.tree import nbytes
from dualform.models.lm import IGNORED, LanguageModel
from dualform.train.data import Dataset
from dualform.train.packed import Sequences

_STREAMS, _SPAN = 16, 256  # rows and tokens that go through the model together
_LOGITS = 2**26  # at most


@torch.inference_mode()
def bits_per_byte(
    model: LanguageModel,
    dataset: Dataset,
    *,
    length: int,
    packed: bool = False,
    limit: int | None = None,
    bfloat16: bool = False,
) -> float:
    """``-sum_t log2 p(x_t | x_<t)`` over the held-out tokens, divided by the bytes of their text.

    The text is cut into at most 16 streams, read side by side. Within a stream the state is carried from the first
    token to the last, as far as the text goes; only a state that would grow without bound (attention without a
    window) restarts after every ``length`` tokens. Separators between documents are predicted, too, but are no bytes.

    With ``packed``, as in training, every document is read by itself, from a fresh state; one of more than 4096 tokens
    (of ``length`` where the state grows) is cut into several.

    Args:
        model: evaluated on its own device; its training flag is left as it was.
        dataset: its held-out part is read.
        length: tokens of a training window.
        packed: whether no state may pass from one document into the next.
        limit: tokens to read, the first of every stream, or of lines of documents evenly spaced; None for all.
        bfloat16: whether matrix products are taken in bfloat16.
    """
    training = model.training
    model.eval()
    try:
        read = _read_documents if packed else _read
        nats, text = read(model, dataset, length, limit, bfloat16)
    finally:
        model.train(training)
    return nats / math.log(2) / max(1, text)


def _read(model: LanguageModel, dataset: Dataset, length: int, limit: int | None, bfloat16: bool) -> tuple[float, int]:
    """The cost of the text in nats, and its bytes."""
    ids, device, grows = dataset.held_out, next(model.parameters()).device, _grows(model, length)
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


def _read_documents(
    model: LanguageModel, dataset: Dataset, length: int, limit: int | None, bfloat16: bool
) -> tuple[float, int]:
    """As :func:`_read`, every document by itself."""
    device = next(model.parameters()).device
    most = min(_STREAMS * _SPAN, _LOGITS // model.config.vocab_size)
    sequences = Sequences(dataset.held_out, dataset.held_out_starts, length if _grows(model, length) else most)
    lines = sequences.windows(np.arange(len(sequences.sizes)), max(most, length) + 1)
    if limit is not None:
        lines = lines[:: max(1, len(lines) * most // limit)]
    nats, text = torch.zeros((), dtype=torch.float64), 0
    for chosen in lines:
        tokens, cu_seqlens = sequences.line(chosen)
        after = tokens[0].roll(-1).index_fill(0, cu_seqlens[1:] - 1, IGNORED).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits, _ = model(tokens.to(device), cu_seqlens=cu_seqlens)
        nats += F.cross_entropy(logits[0].float(), after, ignore_index=IGNORED, reduction="sum").cpu()
        predicted = np.delete(sequences.places(chosen), cu_seqlens[:-1].numpy())
        text += int(dataset.nbytes[predicted].sum())
    return nats.item(), text


def _grows(model: LanguageModel, length: int) -> bool:
    """Whether the state of a context grows with it."""
    return nbytes(model.init_state(1, max_len=2 * length)) > nbytes(model.init_state(1, max_len=length))
