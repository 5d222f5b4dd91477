r"""The tokenizer of RWKV's World models: of the tokens that a text goes on with, the one with the most bytes.

Its vocabulary is a text file, a line for each token: its number, the token as Python writes it, and its bytes::

    33 ' ' 1
    267 b'\xe0\xa4' 2

Token 0 has no line. It stands between documents, so it opens a text and ends one.
"""

import ast
import json
from collections.abc import Sequence
from pathlib import Path

from dualform.core.errors import CheckpointError
from dualform.core.json_file import entry, read_table, read_text
from dualform.core.options import brief
from dualform.models.text_bytes import ByteStream, utf8

VOCABULARY_FILE = "rwkv_vocab_v20230424.txt"
"""The vocabulary as RWKV's authors give it; it lies beside the weights."""
BETWEEN = 0
"""The token between documents."""
_NAME, _KEY, _START = "<|endoftext|>", "rwkv_vocab", b'{"rwkv_vocab"'
_AGAIN = "copy the folder again, or save the model again with its tokenizer"
_LARGEST = 2**24  # bytes of a vocabulary; that of the World models has a million
_MOST = 2**20  # tokens


class WorldTokenizer:
    """Greedy: at each place the longest token that the text begins with there.

    Args:
        text: the lines of the vocabulary.
        where: what errors begin with.

    Raises:
        CheckpointError: for a line that is no token, a number that comes twice, or a byte that no token has alone.
    """

    begin: Sequence[int] = (BETWEEN,)

    def __init__(self, text: str, where: str = VOCABULARY_FILE):
        self._text = text
        self._bytes = _tokens(text, where)
        self._ids = {token: number for number, token in self._bytes.items()}
        if lacking := [byte for byte in range(256) if bytes([byte]) not in self._ids]:
            raise CheckpointError(f"{where}: no token for the byte {lacking[0]}", hint=_HINT)
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}

    @classmethod
    def from_file(cls, path: str | Path) -> "WorldTokenizer":
        """Read a vocabulary.

        Raises:
            CheckpointError: where it is missing or damaged.
        """
        try:
            return cls(read_text(Path(path), _LARGEST), str(path))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: no vocabulary: {error}", hint=_HINT) from error

    @classmethod
    def from_json(cls, path: str | Path) -> "WorldTokenizer | None":
        """Read what :meth:`to_json` gave; None for a file that does not begin so.

        Raises:
            CheckpointError: for a damaged one.
        """
        try:
            with open(path, "rb") as file:
                if not file.read(len(_START)).startswith(_START):
                    return None
        except OSError:
            return None
        table = read_table(path, hint=_AGAIN)
        return cls(entry(table, _KEY, str, path), str(path))

    @classmethod
    def from_text(cls, text: str, where: str) -> "WorldTokenizer | None":
        """The tokenizer of what :meth:`to_json` gave; None for a text that does not begin so.

        Raises:
            CheckpointError: for a damaged one.
        """
        return cls(json.loads(text)[_KEY], where) if text.startswith(_START.decode()) else None

    @property
    def vocab_size(self) -> int:
        """The largest token plus one."""
        return max(self._bytes) + 1

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text; with ``special`` its ``<|endoftext|>`` stand for token 0.

        Raises:
            ArgumentError: for a lone surrogate, which is not text.
        """
        if special:
            first, *rest = (self.encode(piece) for piece in text.split(_NAME))
            return first + [token for piece in rest for token in (BETWEEN, *piece)]
        return self.encode_bytes(utf8(text))

    def encode_bytes(self, data: bytes) -> list[int]:
        """The tokens of bytes."""
        ids, found, at = self._ids, list[int](), 0
        while at < len(data):
            for length in (*self._lengths.get(data[at : at + 2], ()), 1):
                token = ids.get(data[at : at + length])
                if token is not None:
                    found.append(token)
                    at += length
                    break
        return found

    def sizes(self, ids: Sequence[int]) -> list[int]:
        """The bytes of each token."""
        return [len(self._bytes.get(token, b"")) for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens. Bytes that are not UTF-8 become U+FFFD; what has no line is left out."""
        return self._joined(ids).decode("utf-8", "replace")

    def stream(self) -> ByteStream:
        """A decoder of one token at a time."""
        return ByteStream(self._joined)

    def to_json(self) -> str:
        """The content of ``tokenizer.json``: the vocabulary under a key of its own."""
        return json.dumps({_KEY: self._text}, ensure_ascii=False)  # begins with _START

    def _joined(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._bytes.get(token, b"") for token in ids)


_HINT = "download it again: it is in the package rwkv, and in RWKV-LM beside its demos"


def _tokens(text: str, where: str) -> dict[int, bytes]:
    """The tokens of a vocabulary by their numbers."""
    found: dict[int, bytes] = {}
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        head, _, rest = line.rstrip("\r").partition(" ")
        shown, _, size = rest.rpartition(" ")
        try:
            index, value, length = int(head), ast.literal_eval(shown), int(size)
            token = value.encode() if isinstance(value, str) else value
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            index, token, length = -1, b"", 0
        if not isinstance(token, bytes) or not 0 < index < _MOST or not token or len(token) != length or index in found:
            said = "expected a new number, a token and its bytes"
            raise CheckpointError(f"{where}: line {number} is {brief(line)}, {said}", hint=_HINT)
        found[index] = token
    if not found:
        raise CheckpointError(f"{where}: no tokens", hint=_HINT)
    return found
