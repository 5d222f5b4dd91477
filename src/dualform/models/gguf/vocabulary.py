"""The vocabulary in a file of GGUF, as the content of a ``tokenizer.json``; which tokens end a text; a template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dualform.core.errors import CheckpointError
from dualform.core.options import brief
from dualform.models.gguf.file import Header

_BEFORE = "tokenizer.ggml."
_NORMAL, _CONTROL, _WRITTEN, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # types of tokens
_BESIDE = "put the model's tokenizer.json beside the file"
_SPACE = "\u2581"
_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|" r"\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _bytes(pattern: bool) -> dict[str, Any]:
    """A pre-tokenizer: bytes as letters, once a text is cut by GPT-2's pattern, if it is."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_DIGITS = [{"type": "Digits", "individual_digits": True}, _bytes(True)]
_THREES = [_split(f"{_ENGLISH}|{_WORDS % '{1,3}'}"), _bytes(False)]
_ONES = [_split(f"{_ENGLISH}|{_WORDS % ''}"), _bytes(False)]
_FALCON = [
    {"type": "Punctuation", "behavior": "Contiguous"},
    _bytes(True),
    {"type": "Digits", "individual_digits": False},
    _split("[0-9][0-9][0-9]"),
]
_SAME: tuple[tuple[str, Sequence[dict[str, Any]]], ...] = (
    ("gpt-2 olmo mpt jais phi-2 granite-docling gigachat mellum", [_bytes(True)]),
    ("refact starcoder command-r smollm codeshell exaone minerva-7b", _DIGITS),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2 dbrx smaug-bpe chatglm-bpe", _THREES),
    ("qwen2 stablelm2 deepseek-r1-qwen", _ONES),
    ("falcon", _FALCON),
)
_CUTS = {name: cut for names, cut in _SAME for name in names.split()}
"""How a text is cut before its pieces are encoded, by the names of ``tokenizer.ggml.pre``."""
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2")
"""Those that take a piece which is a token as it is, and begin with a token."""


def vocabulary(header: Header, where: str) -> str | None:
    """The content of a ``tokenizer.json``; None where the file has no tokens.

    Args:
        header: of the file.
        where: what errors begin with.

    Raises:
        CheckpointError: for a kind of tokenizer that is not known, or one that is damaged; says what can be done.
    """
    kind = header.about.get(f"{_BEFORE}model")
    if kind is None or kind in ("none", "no_vocab"):
        return None
    tokens = _texts(header, "tokens", where)
    if kind == "rwkv":
        return json.dumps({"rwkv_vocab": _world(tokens, where)}, ensure_ascii=False)
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{where}a tokenizer of the kind {brief(kind)}, expected gpt2, llama or rwkv", hint=_BESIDE
        )
    types = header.about.get(f"{_BEFORE}token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(
            f"{where}{_BEFORE}token_type is {brief(types)}, expected one for each token", hint=_BESIDE
        )
    made = {token: i for i, (token, of) in enumerate(zip(tokens, types, strict=True)) if of != _UNUSED}
    table = _pairs(header, made, where) if kind == "gpt2" else _pieces(header, made, types, where)
    added = [
        {
            "id": i,
            "content": tokens[i],
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": of == _CONTROL,
        }
        for i, of in enumerate(types)
        if of in (_CONTROL, _WRITTEN)
    ]
    table |= {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    if (begin := _begin(header, kind, len(tokens))) is not None:
        table["post_processor"] = _opening(begin, tokens[begin])
    return json.dumps(table, ensure_ascii=False)


def ends_of(header: Header, vocab_size: int) -> list[int]:
    """The tokens with which a text or an answer ends."""
    names = ("eos_token_id",) if header.about.get(f"{_BEFORE}model") == "rwkv" else ("eos_token_id", "eot_token_id")
    found = (header.about.get(f"{_BEFORE}{name}") for name in names)
    return list(dict.fromkeys(one for one in found if type(one) is int and 0 <= one < vocab_size))


def template_of(header: Header) -> tuple[str, dict[str, str]] | None:
    """The template of conversations, and the texts of the special tokens that it may name; None where there is none."""
    template = header.about.get("tokenizer.chat_template")
    tokens = header.about.get(f"{_BEFORE}tokens")
    if not isinstance(template, str) or not isinstance(tokens, list):
        return None
    ids = {f"{name}_token": header.about.get(f"{_BEFORE}{key}_token_id") for name, key in _SPECIAL.items()}
    return template, {name: tokens[i] for name, i in ids.items() if type(i) is int and 0 <= i < len(tokens)}


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def _pairs(header: Header, made: Mapping[str, int], where: str) -> dict[str, Any]:
    """A tokenizer of pairs of bytes, as GPT-2's."""
    pre = header.about.get(f"{_BEFORE}pre", "default")
    if pre == "default" and str(header.about.get("general.architecture")).startswith("mamba"):
        pre = "gpt-2"  # GPT-NeoX's, in files from before there was this key
    if pre not in _CUTS:
        raise CheckpointError(f"{where}{_BEFORE}pre is {brief(pre)}, expected one of {', '.join(_CUTS)}", hint=_BESIDE)
    merges = [merge.split(" ") for merge in _texts(header, "merges", where)]
    if wrong := next((merge for merge in merges if len(merge) != 2 or "".join(merge) not in made), None):
        raise CheckpointError(
            f"{where}{_BEFORE}merges has {brief(' '.join(wrong))}, which makes no token", hint=_BESIDE
        )
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _CUTS[pre]},
        "decoder": _bytes(True),
        "model": _model(made, merges, ignore_merges=pre in _WHOLE_WORDS),
    }


def _pieces(header: Header, made: Mapping[str, int], types: Sequence[int], where: str) -> dict[str, Any]:
    """A tokenizer of SentencePiece's pairs: pieces are joined to those of the best scores, and bytes are tokens."""
    scores = header.about.get(f"{_BEFORE}scores")
    if not isinstance(scores, list) or len(scores) != len(types):
        raise CheckpointError(f"{where}{_BEFORE}scores is {brief(scores)}, expected one for each token", hint=_BESIDE)
    normal = {token: i for token, i in made.items() if types[i] == _NORMAL}
    merges: list[tuple[float, int, int, str, str]] = []
    for token, i in normal.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                merges.append((-scores[i], normal[left], normal[right], left, right))
    before = bool(header.about.get(f"{_BEFORE}add_space_prefix", True))
    first = [{"type": "Prepend", "prepend": _SPACE}] if before else []
    last = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if before else []
    swapped = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    unknown = header.about.get(f"{_BEFORE}unknown_token_id")
    name = next((token for token, i in made.items() if i == unknown), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*first, swapped]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *last]},
        "model": _model(
            made, [[a, b] for *_, a, b in sorted(merges)], unk_token=name, byte_fallback=True, fuse_unk=True
        ),
    }


def _model(made: Mapping[str, int], merges: list[list[str]], **more: Any) -> dict[str, Any]:
    absent = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    flags = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    return {"type": "BPE", **absent, **flags, **more, "vocab": dict(made), "merges": merges}


def _begin(header: Header, kind: str, count: int) -> int | None:
    """The token that opens a text."""
    usual = kind == "llama" or header.about.get(f"{_BEFORE}pre") in _WHOLE_WORDS
    token = header.about.get(f"{_BEFORE}bos_token_id")
    wanted = header.about.get(f"{_BEFORE}add_bos_token", usual)
    return token if wanted and type(token) is int and 0 <= token < count else None


def _opening(token: int, name: str) -> dict[str, Any]:
    """What puts a token before a text."""
    first, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [first, text, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {name: {"id": name, "ids": [token], "tokens": [name]}}
    return {"type": "TemplateProcessing", "single": [first, text], "pair": pair, "special_tokens": known}


def _world(tokens: Sequence[str], where: str) -> str:
    """The lines of a vocabulary of RWKV's World models; a token is written as in Python, without its quotes."""
    lines = []
    for number, token in enumerate(tokens):
        if number == 0 or token.startswith(f"[PAD{number}]"):
            continue
        try:
            raw = token.encode("ascii").decode("unicode_escape").encode("latin-1")
        except (UnicodeError, ValueError) as error:
            raise CheckpointError(f"{where}token {number} is {brief(token)}: {error}", hint=_BESIDE) from error
        lines.append(f"{number} {raw!r} {len(raw)}")
    return "\n".join(lines) + "\n"


def _texts(header: Header, name: str, where: str) -> list[str]:
    found = header.about.get(f"{_BEFORE}{name}")
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise CheckpointError(f"{where}{_BEFORE}{name} is {brief(found)}, expected a list of texts", hint=_BESIDE)
    return found


def keys_of(text: str | None, vocab_size: int, ends: Sequence[int]) -> dict[str, Any]:
    """The inverse of :func:`vocabulary`, for what llama.cpp has: pairs of bytes, and the tokenizer of RWKV's World.

    Args:
        text: the content of a ``tokenizer.json``; None for bytes.
        vocab_size: of the model; tokens that the tokenizer lacks are there as unused ones.
        ends: tokens that end a text.

    Returns:
        The keys; those of a model without a tokenizer where it is of another kind.
    """
    table = json.loads(text) if text is not None else _of_bytes(vocab_size)
    model = table.get("model", {})
    pre = next((name for name, cut in _CUTS.items() if _cuts(table) == list(cut)), None)
    if model.get("type") != "BPE" or pre is None or table.get("normalizer") or model.get("unk_token"):
        return {f"{_BEFORE}model": "none"}
    if pre in _WHOLE_WORDS and not model.get("ignore_merges"):
        pre = "dbrx"
    texts, types = [f"[PAD{i}]" for i in range(vocab_size)], [_UNUSED] * vocab_size
    for token, i in model["vocab"].items():
        texts[i], types[i] = token, _NORMAL
    for token in table["added_tokens"]:
        texts[token["id"]], types[token["id"]] = token["content"], _CONTROL if token["special"] else _WRITTEN
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    keys = {"model": "gpt2", "pre": pre, "tokens": texts, "token_type": types, "merges": merges}
    opening = _opened(table)
    keys |= {"add_bos_token": opening is not None, **({} if opening is None else {"bos_token_id": opening})}
    return {f"{_BEFORE}{key}": value for key, value in {**keys, **({"eos_token_id": ends[0]} if ends else {})}.items()}


def _cuts(table: Mapping[str, Any]) -> list[Any]:
    cut = table.get("pre_tokenizer") or {}
    return cut.get("pretokenizers", []) if cut.get("type") == "Sequence" else [cut]


def _opened(table: Mapping[str, Any]) -> int | None:
    """The one token that a tokenizer puts before a text."""
    after = table.get("post_processor") or {}
    first = after.get("single", [{}])[0].get("SpecialToken", {}).get("id")
    ids = after.get("special_tokens", {}).get(first, {}).get("ids", [])
    return ids[0] if len(ids) == 1 else None


def _of_bytes(count: int) -> dict[str, Any]:
    """A tokenizer whose tokens are bytes, or none where there are not as many."""
    if count != 256:
        return {}
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # which stand for themselves
    others = iter(range(256, 512))
    letters = {chr(byte if byte in plain else next(others)): byte for byte in range(256)}
    return {"pre_tokenizer": _bytes(True), "added_tokens": [], "model": {"type": "BPE", "vocab": letters, "merges": []}}
