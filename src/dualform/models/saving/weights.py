"""Weights in files: one of safetensors, several with an index, or PyTorch's own; read one tensor at a time.

A file is mapped into memory and opened anew after a share of its bytes was read, so that what was read does not stay
in memory beside its copy. A file of PyTorch is a pickle: it is read only where there is no other, and with
``weights_only=True``, which builds tensors and nothing else.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dualform.core.errors import CheckpointError
from dualform.core.json_file import entry, read_table
from dualform.core.options import brief
from dualform.models.gguf.file import SUFFIX, GGUFTensors
from dualform.models.saving.files import ADAPTER_FILE, WEIGHTS_FILE, current

INDEX_FILE = "model.safetensors.index.json"
PYTORCH_FILE = "pytorch_model.bin"
PYTORCH_INDEX_FILE = "pytorch_model.bin.index.json"
SPAN = 2**22
"""The fewest bytes that are read before a file is opened anew; of a large file it is this share:"""
SHARE = 1 / 32
_COPY = "the files do not belong together; copy the folder again"
_AGAIN = "the file is truncated or no {} file; copy or save it again"


class Stored(NamedTuple):
    """A tensor that lies in a file: where, and what it is."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    floating: bool
    complex: bool


class Files(NamedTuple):
    """The files with the weights of a folder, and the index that names them, if there is one."""

    paths: list[Path]
    listing: Path | None = None


FILES = (".safetensors", ".pth", ".pt", ".bin", SUFFIX)
"""How the names of files of weights end."""


def weight_paths(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of :func:`weight_names`; a file of weights is its own.

    Raises:
        CheckpointError: for an index that is damaged.
    """
    path = Path(folder)
    return [path] if path.is_file() else [current(folder, name) for name in weight_names(folder)]


def weight_names(folder: str | os.PathLike[str]) -> list[str]:
    """The names of the files that the weights of a folder of any library are in, whether they are there or not.

    Raises:
        CheckpointError: for an index that is damaged.
    """
    for name in (ADAPTER_FILE, WEIGHTS_FILE, INDEX_FILE, PYTORCH_FILE, PYTORCH_INDEX_FILE):
        path = current(folder, name)
        if path.exists():
            return sorted({name, *_weight_map(path).values()}) if path.suffix == ".json" else [name]
    return [WEIGHTS_FILE]


def own_files(folder: str | os.PathLike[str]) -> Files:
    """The file with the weights of a folder that this library wrote.

    Raises:
        CheckpointError: where it is missing.
    """
    path = current(folder, WEIGHTS_FILE)
    if not path.exists():
        raise CheckpointError(f"{folder}: no {WEIGHTS_FILE}", hint="config.json is there; copy the weights too")
    return Files([path])


def found_files(folder: str | os.PathLike[str]) -> Files:
    """The files with the weights of a folder of any library: safetensors before PyTorch's own, one before several.

    A file of weights is its own.

    Raises:
        CheckpointError: where there are none, or an index is damaged or names a file that is missing.
    """
    if Path(folder).is_file():
        return Files([Path(folder)])
    for name in (WEIGHTS_FILE, INDEX_FILE, PYTORCH_FILE, PYTORCH_INDEX_FILE):
        path = current(folder, name)
        if path.exists():
            return Files(_listed(path), path) if path.suffix == ".json" else Files([path])
    raise CheckpointError(
        f"{folder}: no weights: no {WEIGHTS_FILE}, {INDEX_FILE} or {PYTORCH_FILE}",
        hint="config.json is there; copy the weights too",
    )


def stored_tensors(files: Files) -> dict[str, Stored]:
    """What lies in files, by the name of each tensor; no values are read.

    Raises:
        CheckpointError: for a file that cannot be read, a tensor that lies in two files, or one that the index lists
            and its file does not have.
    """
    found: dict[str, Stored] = {}
    for path in files.paths:
        with _opened(path) as file:
            for name in list(file.keys()):
                if name in found:
                    raise CheckpointError(f"{path}: has {name!r}, and so has {found[name].path.name}", hint=_COPY)
                found[name] = _stored(path, file, name)
    for name, place in ({} if files.listing is None else _weight_map(files.listing)).items():
        if name not in found or found[name].path.name != place:
            raise CheckpointError(f"{files.listing}: lists {name!r} in {place}, which does not have it", hint=_COPY)
    return found


def each_tensor(places: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of files, file by file, each a view of a file that may be closed after it.

    A caller copies a tensor and lets go of it before the next.

    Raises:
        CheckpointError: for a file that cannot be read.
    """
    waiting = sorted(places.items(), key=lambda item: item[1].path)
    while waiting:
        path, size = waiting[0][1].path, 0
        with _opened(path) as file:
            span = max(SPAN, int(SHARE * path.stat().st_size))
            while waiting and waiting[0][1].path == path and size < span:
                name = waiting.pop(0)[0]
                tensor = file.get_tensor(name)
                size += tensor.nbytes
                yield name, tensor
                del tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, pickled: bool) -> None:
    """Write tensors by their names: in safetensors, or as PyTorch does, for programs that read nothing else.

    Raises:
        OSError: from the operating system.
        SafetensorError: likewise.
    """
    if pickled:
        torch.save(dict(tensors), path)
    else:
        save_file(dict(tensors), path, metadata={"format": "pt"})


def _listed(index: Path) -> list[Path]:
    """The files that an index names, in their order."""
    names = sorted(set(_weight_map(index).values()))
    paths = [index.with_name(name) for name in names]
    if missing := [path for path in paths if not path.exists()]:
        raise CheckpointError(
            f"{missing[0]}: missing, but {index.name} names it", hint=f"copy all {len(names)} files of weights"
        )
    return paths


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor."""
    places = entry(read_table(index, hint="copy the folder again"), "weight_map", dict, index)
    for name, place in places.items():
        plain = isinstance(place, str) and Path(place).name == place and "\\" not in place and "\0" not in place
        if not plain or Path(place).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(
                f"{index}: weight_map has {brief(place)} for {brief(name)}, expected a file beside it"
            )
    return places


class _Pickled:
    """A file of PyTorch with the interface of an open file of safetensors."""

    def __init__(self, path: Path):
        self._tensors: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        wrong = self._tensors
        if isinstance(wrong, dict):
            wrong = next((v for k, v in wrong.items() if not isinstance(k, str) or not isinstance(v, Tensor)), None)
        if wrong is not None:
            raise ValueError(f"holds {brief(type(wrong).__name__)}, expected tensors by their names")

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of weights, and a sentence where it cannot be read."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}", hint=_AGAIN.format("safetensors")) from error
        return
    if path.suffix == SUFFIX:
        yield GGUFTensors(path)
        return
    try:
        file = _Pickled(path)
    except Exception as error:  # of unpickling, which has no class of errors of its own
        reason, hint = str(error).split("\n")[0], _AGAIN.format("PyTorch")
        if "weights only" in reason.lower():
            reason = "it holds more than tensors, which could run code when it is read"
            hint = "where you trust its source, write its tensors with safetensors.torch.save_file"
        raise CheckpointError(f"{path}: cannot be read: {reason}", hint=hint) from error
    yield file


def _stored(path: Path, file: Any, name: str) -> Stored:
    if isinstance(file, _Pickled):
        t = file.get_tensor(name)
        return Stored(path, tuple(t.shape), str(t.dtype), t.is_floating_point(), t.is_complex())
    if isinstance(file, GGUFTensors):
        shape, of = file.stored(name)
        return Stored(path, shape, str(of), of.is_floating_point, False)
    there = file.get_slice(name)
    dtype = there.get_dtype()
    return Stored(path, tuple(there.get_shape()), dtype, dtype.startswith(("F", "BF")), dtype.startswith("C"))
