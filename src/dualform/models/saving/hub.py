"""Models of the Hugging Face Hub by their names, ``owner/name``: what is needed of them, in the Hub's own cache."""

import os
import re
from functools import cache
from pathlib import Path

from dualform.core.errors import CheckpointError
from dualform.models.saving.files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
)
from dualform.models.saving.weights import INDEX_FILE, PYTORCH_FILE, PYTORCH_INDEX_FILE

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
BESIDE = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    GENERATION_FILE,
    CHAT_TEMPLATE_FILE,
)
"""Files that say how a model is used."""
_FILES = [CONFIG_FILE, *BESIDE, "manifest.json", WEIGHTS_FILE, INDEX_FILE, "model-*.safetensors"]
_FILES += [ADAPTER_CONFIG_FILE, ADAPTER_FILE]
_PICKLES = [PYTORCH_FILE, PYTORCH_INDEX_FILE, "pytorch_model-*.bin"]
_HINTS = {
    "GatedRepoError": "accept its terms on its page of the Hub, then: hf auth login",
    "RepositoryNotFoundError": "check the spelling on https://huggingface.co; a private one asks for: hf auth login",
}


def hub_name(folder: str | os.PathLike[str]) -> str | None:
    """The name on the Hub that a text can be: ``owner/name``, where this folder has nothing called ``owner``."""
    name = os.fspath(folder)
    if not isinstance(name, str) or not re.fullmatch(f"{_PART}/{_PART}", name):
        return None
    return None if Path(name).parent.exists() else name


@cache
def snapshot(name: str) -> Path:
    """The folder with a model of the Hub: downloaded, or as the cache has it where there is no connection.

    Weights in safetensors come first; PyTorch's own files are downloaded only where there are none.

    Raises:
        CheckpointError: for a name that there is not, one that asks for permission, or no connection.
    """
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
        if not any((folder / file).exists() for file in (WEIGHTS_FILE, INDEX_FILE, ADAPTER_FILE)):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*_FILES, *_PICKLES]))
    except Exception as error:  # of the connection, which has many classes of errors
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        usual = "download it where there is a connection (hf download), and give the folder; or try again"
        raise CheckpointError(
            f"{name}: no such folder here, and not loaded from the Hugging Face Hub: {reason}",
            hint=_HINTS.get(type(error).__name__, usual),
        ) from error
    return folder
