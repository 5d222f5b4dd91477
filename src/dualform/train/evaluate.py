"""How well a model predicts held-out text, in bits per byte: comparable across tokenizers, and with compressors."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dualform.core.tree import nbytes
from dualform.models.lm import IGNORED, LanguageModel
from dualform.train.chat import read_and_targets
from dualform.train.data import Dataset
from dualform.train.packed import Sequences

_STREAMS, _TOGETHER = 16, 4096  # rows, and tokens of all of them, that go through the model together
_LOGITS = 2**26  # at most


class Score(NamedTuple):
    """How well a text was predicted.

    Attributes:
        nats: ``-sum_t log p(x_t | x_<t)``.
        tokens: how many were predicted.
        bytes: of the text that they stand for.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The cost of a byte, in bits."""
        return self.nats / math.log(2) / max(1, self.bytes)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean cost of a token; it depends on the tokenizer."""
        try:
            return math.exp(self.nats / max(1, self.tokens))
        except OverflowError:
            return math.inf


def bits_per_byte(model: LanguageModel, dataset: Dataset, **options: Any) -> float:
    """The bits per byte of :func:`score`, whose arguments these are."""
    return score(model, dataset, **options).bits_per_byte


@torch.inference_mode()
def score(
    model: LanguageModel,
    dataset: Dataset,
    *,
    length: int,
    packed: bool = False,
    limit: int | None = None,
    bfloat16: bool = False,
    streams: int | None = None,
    tell: Callable[[int, int], None] = lambda done, whole: None,
) -> Score:
    """The cost of the held-out tokens, ``-log p(x_t | x_<t)`` each, and the bytes of their text.

    The text is cut into some streams, read side by side. Within a stream the state is carried from the first token to
    the last, as far as the text goes; only a state that would grow without bound (attention without a window) restarts
    after every ``length`` tokens. Separators between documents are predicted, too, but are no bytes.

    With ``packed``, as in training, every document is read by itself, from a fresh state; one of more than 4096 tokens
    (of ``length`` where the state grows) is cut into several.

    Args:
        model: evaluated on its own device; its training flag is left as it was.
        dataset: its held-out part is read.
        length: tokens of a training window.
        packed: whether no state may pass from one document into the next.
        limit: tokens to read, the first of every stream, or of lines of documents evenly spaced; None for all.
        bfloat16: whether matrix products are taken in bfloat16.
        streams: into how many the text is cut at most, without ``packed``; 16 where nothing else is said.
        tell: called with the tokens that were read, and all that are to be read.
    """
    training = model.training
    model.eval()
    try:
        if packed:
            return _read_documents(model, dataset, length, limit, bfloat16, tell)
        return _read(model, dataset, length, limit, bfloat16, streams or _STREAMS, tell)
    finally:
        model.train(training)


def _read(
    model: LanguageModel,
    dataset: Dataset,
    length: int,
    limit: int | None,
    bfloat16: bool,
    streams: int,
    tell: Callable[[int, int], None],
) -> Score:
    ids, device, grows = dataset.held_out, next(model.parameters()).device, _grows(model, length)
    together = max(1, min(_TOGETHER, _LOGITS // model.config.vocab_size))
    span, targets = length if grows else max(1, together // streams), len(ids) - 1
    streams = max(1, min(streams, targets // span, _LOGITS // (span * model.config.vocab_size)))
    borders = np.arange(streams + 1) * targets // streams
    longest = int(np.diff(borders).max())
    columns = longest if limit is None else min(longest, -(-limit // streams))
    nats, text, read, state = torch.zeros((), dtype=torch.float64), 0, 0, None
    for at in range(0, columns, span):
        places = borders[:-1, None] + np.arange(at, min(at + span, columns))
        inside = places < borders[1:, None]
        text, read = text + int(dataset.nbytes[places[inside] + 1].sum()), read + int(inside.sum())
        places = np.minimum(places, targets - 1)
        tokens, after = (torch.from_numpy(ids[places + i].astype(np.int64)).to(device) for i in (0, 1))
        after = after.masked_fill(~torch.from_numpy(inside).to(device), IGNORED)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits, state = model(tokens, None if grows else state)
        nats += F.cross_entropy(
            logits.flatten(0, 1).float(), after.flatten(), ignore_index=IGNORED, reduction="sum"
        ).cpu()
        tell(read, min(targets, columns * streams))
    return Score(nats.item(), read, text)


def _read_documents(
    model: LanguageModel,
    dataset: Dataset,
    length: int,
    limit: int | None,
    bfloat16: bool,
    tell: Callable[[int, int], None],
) -> Score:
    """As :func:`_read`, every document by itself."""
    device = next(model.parameters()).device
    most = min(_TOGETHER, _LOGITS // model.config.vocab_size)
    sequences = Sequences(dataset.held_out, dataset.held_out_starts, length if _grows(model, length) else most)
    lines = sequences.windows(np.arange(len(sequences.sizes)), max(most, length) + 1)
    if limit is not None:
        lines = lines[:: max(1, len(lines) * most // limit)]
    nats, text, read = torch.zeros((), dtype=torch.float64), 0, 0
    for number, chosen in enumerate(lines, 1):
        line, cu_seqlens = sequences.line(chosen)
        tokens, targets = read_and_targets(line)
        after = targets[0].index_fill(0, cu_seqlens[1:] - 1, IGNORED)
        count = int((after != IGNORED).sum())
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits, _ = model(tokens.to(device), cu_seqlens=cu_seqlens)
        nats += F.cross_entropy(logits[0].float(), after.to(device), ignore_index=IGNORED, reduction="sum").cpu()
        predicted = np.delete(sequences.places(chosen), cu_seqlens[:-1].numpy())
        text, read = text + int(dataset.nbytes[predicted].sum()), read + count
        tell(read, round(read * len(lines) / number))
    return Score(nats.item(), read, text)


def _grows(model: LanguageModel, length: int) -> bool:
    """Whether the state of a context grows with it."""
    return nbytes(model.init_state(1, max_len=2 * length)) > nbytes(model.init_state(1, max_len=length))
