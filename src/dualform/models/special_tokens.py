"""Special tokens: text never turns into one by itself, and some open a document.

A tokenizer of the ``tokenizers`` library replaces the name of a special token, such as ``<|endoftext|>``, by that token
wherever the name stands in a text. Whoever writes the text, a user or the author of a document, could then end a
document or forge a turn of a conversation. And telling the library not to look for the names is not enough: Unigram
models, word-level models and BPE models with ``ignore_merges`` find a name in their vocabulary all the same.

An added token that is not special is ordinary text: it is encoded from its characters, and decoded to them.
"""

import json
import secrets
from itertools import chain, islice
from typing import Any

import tokenizers

_PROBES = 256  # texts at most that are tried, to see what a tokenizer puts before one


def text_only(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, with the same tokens, for which the name of a special token is a text like any other.

    In it, special tokens have names that nobody can guess. Nothing is truncated or padded.
    """
    table = json.loads(tokenizer.to_str())
    special = {token["content"] for token in table["added_tokens"] if token["special"]}
    names = {name: f"{name} {secrets.token_hex(16)}" for name in special}
    for token in table["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    _rename(table["model"], names)
    return unlimited(tokenizers.Tokenizer.from_str(json.dumps(table)))


def unlimited(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer without truncation and padding, which files often carry from their training."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def opening(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """The tokens that the post-processor puts before a text, such as ``<s>``; those after a text are not among them.

    Args:
        tokenizer: one that neither truncates nor pads.
    """
    for probe in chain(("a", "0", " "), islice(tokenizer.get_vocab(), _PROBES)):
        try:
            encoded = tokenizer.encode(probe)
        except Exception:  # bare, of the library: a word that the vocabulary lacks
            continue
        if 0 in encoded.special_tokens_mask:  # the text is there, and shows where it begins
            return encoded.ids[: encoded.special_tokens_mask.index(0)]
    return []


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Give tokens of a model other names; a merge that would make one of them is dropped."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # of Unigram
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {names.get(piece, piece): token for piece, token in vocab.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if merges := model.get("merges"):
        prefix = model.get("continuing_subword_prefix") or ""
        parts = ((merge, merge if isinstance(merge, list) else merge.split(" ")) for merge in merges)
        model["merges"] = [merge for merge, (a, b) in parts if not names.keys() & {a, b, a + b.removeprefix(prefix)}]
