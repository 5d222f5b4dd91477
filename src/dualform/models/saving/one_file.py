"""Models as one file without a folder: in the layout of RWKV-7's authors, or of llama.cpp; and what lies in a file."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from dualform.core.errors import ArgumentError, ConfigError
from dualform.models.adapters import adapter_tensors
from dualform.models.backbone import Backbone
from dualform.models.gguf.file import SUFFIX
from dualform.models.gguf.write import write_gguf
from dualform.models.lm import LanguageModel
from dualform.models.saving.files import replacing_file
from dualform.models.saving.weights import write_tensors
from dualform.models.tables.layout import Piece
from dualform.models.tables.registry import Readable
from dualform.models.tables.rwkv7 import RWKV7File


def save_gguf(model: Backbone, path: Path, tokenizer: str | None, ends: Sequence[int] = ()) -> None:
    """Write a language model to one file of GGUF, with its tokenizer and the tokens that end a text.

    Raises:
        ArgumentError: for a name that ends otherwise than in ``.gguf``, or a model with adapters.
        ConfigError: for a model that is not written so; says what it lacks.
        CheckpointError: when the disk refuses.
    """
    if path.suffix != SUFFIX:
        raise ArgumentError(f"{path}: a file in the layout 'gguf' ends in {SUFFIX}")
    if model.adaptation is not None or any(adapter_tensors(model)):
        raise ArgumentError(
            "save: a model with adapters as 'gguf'", hint="merge them first: dualform convert FOLDER OUT"
        )
    if not isinstance(model, LanguageModel):
        raise ConfigError(f"save: a {type(model).__name__} as 'gguf', which takes language models")
    with replacing_file(path) as new:
        write_gguf(model, new, tokenizer, ends, path.stem)


def write_file(model: Backbone, path: Path, table: RWKV7File) -> None:
    """Write the tensors of a model to one file, in the layout of a table.

    Raises:
        ArgumentError: for a name that ends otherwise than in ``.pth`` or ``.safetensors``.
        CheckpointError: when the disk refuses.
    """
    if path.suffix not in (".pth", ".safetensors"):
        hint = "RWKV's own programs read .pth, others .safetensors"
        raise ArgumentError(f"{path}: a file in the layout {table.name!r} ends in .pth or .safetensors", hint=hint)
    tensors = written_tensors(model, table)
    with replacing_file(path) as new:
        write_tensors(tensors, new, pickled=path.suffix == ".pth")


def written_tensors(model: Backbone, table: Readable | None) -> dict[str, Tensor]:
    """The tensors of a model by their names in a file."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in unique_tensors(model).items():
        for piece in (Piece(name),) if table is None else table.pieces(model.config, name):
            stored = piece.of(tensor.detach()).cpu()
            tensors[piece.name] = stored.contiguous() if piece.alone else stored.clone()
    return tensors


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once, under the first of its names."""
    seen: set[int] = set()
    tensors = model.state_dict(keep_vars=True).items()
    return {name: t for name, t in tensors if not (id(t) in seen or seen.add(id(t)))}
