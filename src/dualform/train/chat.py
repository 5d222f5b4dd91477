"""Conversations as tokens of which the answers alone are learned.

A line of JSON with ``"messages"`` is a document. The template of the model writes it, as it does in generation. What an
assistant says is learned, to the token that ends it, and the rest is only read. In an array of tokens one that is only
read stands as ``~token``, a negative number, so that tokens and what is learned of them stay together.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import DataError, DualformError
from dualform.models.chat import ChatTemplate
from dualform.models.lm import IGNORED
from dualform.models.tokenizer import Tokenizer
from dualform.train.corpus import Document

Encoded = tuple[np.ndarray, np.ndarray]


def conversations(tokenizer: Tokenizer, template: ChatTemplate) -> Callable[[Sequence[Document]], list[Encoded]]:
    """A function from documents with messages to their tokens, and the bytes that each token stands for.

    The bytes of an answer are shared out evenly among its tokens; other tokens stand for none.
    """
    return lambda documents: [_encoded(tokenizer, template, document) for document in documents]


def read_and_targets(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What a model reads, and what it learns at each position: the token after it, or -100 where that is only read.

    Args:
        tokens: ``(B, T)``, those that are only read as ``~token``.

    Returns:
        Both ``(B, T)``; nothing is learned at the last position.
    """
    learned = F.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    return torch.where(tokens < 0, ~tokens, tokens), torch.where(learned < 0, IGNORED, learned)


def _encoded(tokenizer: Tokenizer, template: ChatTemplate, document: Document) -> Encoded:
    messages = json.loads(document.text)
    try:
        pieces = template.encode_answers(tokenizer, messages)
    except DualformError as error:
        raise DataError(f"{document.name}: {error}") from error
    ids, nbytes = list[np.ndarray](), list[np.ndarray]()
    for place, (tokens, number) in enumerate(pieces):
        learned = 0 if number is None else len(tokens) - (place == 0)  # nothing foretells the first token of all
        size = 0 if number is None else len(messages[number]["content"].encode("utf-8", "replace"))
        only_read, row = len(tokens) - learned, np.array(tokens, np.int64)
        ids += [~row[:only_read], row[only_read:]]
        nbytes += [np.zeros(only_read), np.diff(np.arange(learned + 1) * size // max(learned, 1))]
    return np.concatenate(ids), np.concatenate(nbytes).astype(np.uint32)
