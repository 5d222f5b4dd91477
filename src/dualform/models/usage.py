"""How a model is used, as files beside its weights say: which tokens end a text, how a conversation is written."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dualform.core.errors import CheckpointError
from dualform.core.json_file import read_table, read_text, to_json
from dualform.core.options import brief
from dualform.models.chat import ChatTemplate
from dualform.models.gguf.file import SUFFIX, read_header
from dualform.models.gguf.vocabulary import ends_of, template_of, vocabulary
from dualform.models.saving.files import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    current,
)
from dualform.models.saving.folder import model_folder
from dualform.models.saving.hub import BESIDE
from dualform.models.saving.undisturbed import undisturbed
from dualform.models.tokenizer import Tokenizer
from dualform.models.world_tokenizer import BETWEEN, VOCABULARY_FILE, WorldTokenizer

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_TEMPLATE, _END = "chat_template", "eos_token_id"
_HINT = "correct it, or remove the file: the model works without it"


class Usage(NamedTuple):
    """What the files beside a model's weights say on its use.

    Attributes:
        ends: tokens with which the model ends a text or an answer.
        template: of conversations; None for a model that was not trained on any.
    """

    ends: tuple[int, ...]
    template: ChatTemplate | None


def read_usage(folder: str | os.PathLike[str], tokenizer: Tokenizer, vocab_size: int) -> Usage:
    """The usage of the model in a folder, by the files that the Hugging Face Hub has.

    What ends a text is ``eos_token_id`` of ``generation_config.json``, else of ``config.json``, and ``eos_token`` of
    ``tokenizer_config.json``. A template is ``chat_template.jinja``, else ``chat_template`` of the latter.

    Raises:
        CheckpointError: for a file that cannot be read, a token outside of the vocabulary, or what is no template;
            names the file and the key.
    """
    if _of_gguf(folder):
        header = read_header(folder)
        found = template_of(header)
        template = None if found is None else ChatTemplate(*found, f"{folder}: tokenizer.chat_template")
        return Usage(tuple(ends_of(header, vocab_size)), template)
    about = _table(folder, TOKENIZER_CONFIG_FILE)
    special = {name: text for name in _SPECIAL if (text := _text(about, name)) is not None}
    ends = dict.fromkeys(read_ends(folder, vocab_size))
    if (name := special.get("eos_token")) and len(found := tokenizer.encode(name, special=True)) == 1:
        ends[found[0]] = None
    return Usage(tuple(ends), _template(folder, about, special))


def usage_of(model: str | os.PathLike[str], tokenizer: Tokenizer, vocab_size: int) -> Usage:
    """:func:`read_usage` of a saved model, a training run or a name of the Hub, while another process may save it.

    Raises:
        CheckpointError: where there is no model; otherwise as :func:`read_usage`.
    """
    return undisturbed(lambda: model_folder(model), lambda folder: read_usage(folder, tokenizer, vocab_size))


def usage_files(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """The files beside a model's weights that say how it is used, by their names; they are copied as they are.

    Beside a file of weights that is the vocabulary of RWKV's World models, given as the files of a folder; so is what a
    file of GGUF says.

    Raises:
        CheckpointError: for a vocabulary that is damaged.
    """
    if _of_gguf(folder):
        return _within(Path(folder))
    if Path(folder).is_file():
        path = Path(folder).with_name(VOCABULARY_FILE)
        if not path.exists():
            return {}
        tokenizer = WorldTokenizer.from_file(path)
        return {TOKENIZER_FILE: tokenizer.to_json().encode(), GENERATION_FILE: to_json({_END: [BETWEEN]}).encode()}
    return {name: path.read_bytes() for name in BESIDE if (path := current(folder, name)).is_file()}


def read_ends(folder: str | os.PathLike[str], vocab_size: int) -> list[int]:
    """The tokens that end a text by their numbers, of ``generation_config.json`` or else ``config.json``.

    Raises:
        CheckpointError: for a file that cannot be read, or a token outside of the vocabulary; names the file and key.
    """
    if _of_gguf(folder):
        return ends_of(read_header(folder), vocab_size)
    if Path(folder).is_file():
        return [BETWEEN] if Path(folder).with_name(VOCABULARY_FILE).exists() else []
    for file in (GENERATION_FILE, CONFIG_FILE):
        found = _table(folder, file).get(_END)
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                told = f"{current(folder, file)}: {_END} is {brief(found)}, expected tokens from 0 to {vocab_size - 1}"
                raise CheckpointError(told, hint=_HINT)
        return ids
    return []


def _of_gguf(folder: str | os.PathLike[str]) -> bool:
    return Path(folder).suffix == SUFFIX and Path(folder).is_file()


def _within(file: Path) -> dict[str, bytes]:
    """What a file of GGUF says on its use, as the files of a folder."""
    header = read_header(file)
    found: dict[str, bytes] = {}
    try:
        if (tokenizer := vocabulary(header, f"{file}: ")) is not None:
            found[TOKENIZER_FILE] = tokenizer.encode()
    except CheckpointError:
        if not (beside := file.with_name(TOKENIZER_FILE)).exists():
            raise
        found[TOKENIZER_FILE] = beside.read_bytes()
    if (template := template_of(header)) is not None:
        found[CHAT_TEMPLATE_FILE] = template[0].encode()
        found[TOKENIZER_CONFIG_FILE] = to_json(template[1]).encode()
    return found


def _template(folder: str | os.PathLike[str], about: Mapping[str, Any], special: dict[str, str]) -> ChatTemplate | None:
    path = current(folder, CHAT_TEMPLATE_FILE)
    if path.exists():
        try:
            return ChatTemplate(read_text(path), special, str(path))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}", hint=_HINT) from error
    found, where = about.get(_TEMPLATE), f"{current(folder, TOKENIZER_CONFIG_FILE)}: {_TEMPLATE}"
    if isinstance(found, list):  # several by their names
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if found is None:
        return None
    if not isinstance(found, str):
        raise CheckpointError(f"{where} is {brief(found)}, expected a text", hint=_HINT)
    return ChatTemplate(found, special, where)


def _table(folder: str | os.PathLike[str], file: str) -> dict[str, Any]:
    path: Path = current(folder, file)
    return read_table(path, hint=_HINT) if path.exists() else {}


def _text(about: Mapping[str, Any], name: str) -> str | None:
    found = about.get(name)
    found = found.get("content") if isinstance(found, dict) else found
    return found if isinstance(found, str) else None
