"""A model in a folder: ``config.json``, ``model.safetensors``, perhaps ``tokenizer.json``, and ``manifest.json``.

``config.json`` holds the format, the library's version, the model's config and, for a classifier or regressor, its
head; ``model.safetensors`` every tensor once, in the dtype it had, under its name in the model. Weights that several
names share are stored under the first.
"""

import os
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError, CheckpointError
from dualform.core.json_file import to_json
from dualform.core.shapes import dtype_of
from dualform.gaussian.built import Built
from dualform.layers.quantized import quantized_within
from dualform.models.adapters import adapter_tensors, stored_name
from dualform.models.backbone import Backbone
from dualform.models.gguf.layout import GGUF
from dualform.models.heads import HEADS
from dualform.models.lm import LanguageModel
from dualform.models.quantized import check_kind
from dualform.models.quantized import quantize as quantized
from dualform.models.saving.adapter import adapter_of, base_digests, base_folder, check_base, merge, write_adapter
from dualform.models.saving.blank import Blank
from dualform.models.saving.described import described, described_as
from dualform.models.saving.files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    current,
    replacing,
)
from dualform.models.saving.folder import model_folder
from dualform.models.saving.gaussian import KINDS, gaussian_of, read_gaussian, write_gaussian
from dualform.models.saving.manifest import MANIFEST_FILE
from dualform.models.saving.one_file import save_gguf, unique_tensors, write_file, written_tensors
from dualform.models.saving.undisturbed import undisturbed
from dualform.models.saving.verify import check_files, manifest_of
from dualform.models.saving.weights import (
    Files,
    Stored,
    each_tensor,
    found_files,
    own_files,
    stored_tensors,
)
from dualform.models.tables.layout import Piece
from dualform.models.tables.registry import Readable
from dualform.models.tables.rwkv7 import RWKV7File
from dualform.ops.device import usable_device

_OF_A_LAYER = (
    "of a layer: safetensors.torch.save_file(layer.state_dict(), 'layer.safetensors'), and into another one "
    "safetensors.torch.load_model(layer, 'layer.safetensors')"
)
_OTHER_MODEL = f"{CONFIG_FILE} beside it describes another model"
Folder = str | os.PathLike[str]
Model = TypeVar("Model", bound=Backbone)


@runtime_checkable
class SavedTokenizer(Protocol):
    """What saving needs of a tokenizer."""

    def to_json(self) -> str | None:
        """The content of ``tokenizer.json``, or None for a tokenizer that needs no file."""
        ...


@explained
def save(model: Any, folder: Folder, tokenizer: SavedTokenizer | None = None, *, layout: str = "dualform") -> None:
    """Write a model to a folder: ``config.json``, ``model.safetensors`` and, if given, ``tokenizer.json``.

    ``manifest.json`` lists their sizes and digests, which :func:`load` compares. The files replace those of the same
    name all at once: a full disk or a kill leaves what was saved there before. Without a tokenizer, one that is there
    stays.

    Args:
        model: a language model, classifier or regressor; or a :class:`~dualform.gaussian.model.LinearGaussian` or
            :class:`~dualform.gaussian.continuous.ContinuousLinearGaussian`, of which the values of its matrices are
            kept. A structural model or a SARIMAX is saved as what it builds, ``save(model.build(), folder)``.
        folder: where to; it need not be there.
        tokenizer: of the model.
        layout: how the files are written: ``"dualform"``, ``"hf"`` for transformers, or ``"mamba_ssm"``. The last two
            take language models that those libraries have; :func:`load` reads all three. With ``"rwkv7"`` ``folder``
            is one file that ends in ``.pth`` or ``.safetensors``, as RWKV's authors have it, without the tokenizer.
            With ``"gguf"`` it is one that ends in ``.gguf``, of a Mamba or a Mamba-2, with the tokenizer where
            llama.cpp has its kind.

    Raises:
        ArgumentError: for what is none of the library's models, such as a layer; says how to save that. Also for a
            layout that is not one of these, or a model with adapters in that of another library.
        ConfigError: for a model that the layout does not have; says what it lacks. Nothing is written.
        CheckpointError: when the disk refuses.
    """
    if isinstance(model, tuple(KINDS.values())):
        if tokenizer is not None or layout != "dualform":
            what = f"layout {layout!r}" if tokenizer is None else "a tokenizer"
            raise ArgumentError(f"save: {what} for a {type(model).__name__}, which has none but its own")
        with replacing(folder) as new:
            write_gaussian(model, new)
        return
    if not isinstance(model, Backbone):
        kinds = ", ".join(kind.__name__ for kind in (LanguageModel, *HEADS.values(), *KINDS.values()))
        hint = "save(model.build(), folder) keeps its matrices" if isinstance(model, Built) else _OF_A_LAYER
        raise ArgumentError(f"save: model is {type(model).__name__}, expected one of {kinds}", hint=hint)
    if layout == "gguf":
        save_gguf(model, Path(folder), tokenizer.to_json() if tokenizer is not None else None)
        return
    _, table = described_as(model, layout)
    if isinstance(table, RWKV7File):
        write_file(model, Path(folder), table)
        return
    with replacing(folder) as new:
        write(model, new, tokenizer, layout)


def write(model: Backbone, folder: Path, tokenizer: SavedTokenizer | None = None, layout: str = "dualform") -> None:
    """Write the files of :func:`save` into a folder that its caller makes complete, such as one by ``replacing``."""
    text = tokenizer.to_json() if tokenizer is not None else None
    if text is not None:
        (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")
    if model.adaptation is not None:
        write_adapter(model, model.adaptation, folder)
        return
    if laid := next(iter(adapter_tensors(model)), None):
        hint = "merge them first: merge_and_unload of PEFT's model"
        raise ArgumentError(f"save: the model has adapters of PEFT, such as {laid!r}", hint=hint)
    about, table = described_as(model, layout)
    (folder / CONFIG_FILE).write_text(to_json(about), encoding="utf-8")
    save_file(written_tensors(model, table), folder / WEIGHTS_FILE, metadata={"format": "pt"})


@overload
def load(
    folder: Folder,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    kind: None = None,
    verify: bool = False,
    quantize: str | None = None,
) -> Any: ...
@overload
def load(
    folder: Folder,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    kind: type[Model],
    verify: bool = False,
    quantize: str | None = None,
) -> Model: ...
@explained
def load(
    folder: Folder,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    kind: type[Any] | None = None,
    verify: bool = False,
    quantize: str | None = None,
) -> Any:
    """Read a model from a folder: whichever :func:`save` wrote there.

    Models of transformers and of mamba-ssm are read, too, as language models: those whose architecture is in the
    tables. Their weights may be in one safetensors file, in several with an index, or in ``pytorch_model.bin``. A name
    of the Hugging Face Hub, ``owner/name``, is downloaded to the Hub's cache. A file of RWKV-7, ``RWKV-x070-....pth``
    or the same tensors as ``.safetensors``, needs no folder.
    The global random generators are left as they are. Where another process saves to the folder meanwhile, what is read
    is of one save.

    Args:
        folder: where it was saved; of a training run, the run's model or else its newest checkpoint. Its
            ``config.json`` says what it is.
        device: where to put it.
        dtype: of its floating tensors, such as ``"bfloat16"``; None keeps what was saved. Each tensor is read, put on
            the device and given its dtype before the next one is read.
        kind: a class it must be of, such as ``LanguageModel``; None takes any.
        verify: whether to read all files once more and compare their digests with those that were saved. Without it
            sizes alone are compared, and a byte that changed inside of a tensor is not noticed.
        quantize: ``"int8"`` gives the model matrices of 8 bits, by :func:`dualform.quantize`, and everything else
            float32, unless ``dtype`` says otherwise. A model that was saved with such matrices is loaded as it is.

    Raises:
        CheckpointError: for a missing folder or file, one of another size than was saved, a model of another kind, an
            architecture that is in no table, a tensor too many, too few or of another shape, or files that
            another process replaces all the time; with ``verify`` also for a damaged file, or a folder without digests;
            names it.
        ConfigError: for a config with an unknown or missing key, or an option that no layer here has; names it.
        ArgumentError: for a device that is not there, a dtype that is not floating, or another ``quantize``.
    """
    device = usable_device(device, f"load: device {str(device)!r}", numbers=False)
    dtype = None if dtype is None else dtype_of("load", dtype)
    if quantize is not None:
        check_kind("load", quantize)
    model = undisturbed(lambda: model_folder(folder), lambda place: _load(place, device, dtype, kind, verify))
    if quantize is None or model.quantization is not None:
        return model
    return quantized(model).to(dtype=dtype)


def _load(folder: Path, device: torch.device, dtype: torch.dtype | None, kind: type[Any] | None, verify: bool) -> Any:
    """:func:`load` of the folder with the weights."""
    if (adapter := adapter_of(folder)) is not None:
        check_files(folder, digests=verify)
        check_base(folder, base := base_folder(adapter), base_digests(base))
        model = load(adapter.base, device=device, dtype=dtype, kind=kind, verify=verify)
        merge(adapter, model)
        return model
    if (about := gaussian_of(folder)) is not None:
        check_files(folder, digests=verify)
        model = read_gaussian(folder, about, device, dtype)
        if kind is not None and not isinstance(model, kind):
            raise CheckpointError(f"{folder}: a {type(model).__name__}, expected a {kind.__name__}")
        return model
    found = described(folder)
    if dtype is None and isinstance(found.layout, GGUF):
        dtype = found.layout.dtype
    if kind is not None and not issubclass(found.kind, kind):
        raise CheckpointError(f"{folder}: a {found.kind.__name__}, expected a {kind.__name__}")
    if verify and manifest_of(folder) is None:
        hint = "load it without verify, or save it again: that writes them"
        raise CheckpointError(f"{folder}: no {MANIFEST_FILE}, so there are no digests to verify", hint=hint)
    with torch.device("meta"):  # where sizes that no file confirms take no memory
        like = found.build()
    tensors = read_tensors(folder, like, layout=found.layout, device=device, dtype=dtype, verify=verify)
    with torch.random.fork_rng(devices=[]), Blank():
        model = found.build()
    model.load_state_dict(tensors, strict=False, assign=True)
    return model.to(device=device, dtype=dtype)


def shape(folder: Folder) -> Backbone:
    """The model of a folder on the meta device, without its weights, whatever its kind; it costs no memory.

    Raises:
        CheckpointError: for a folder without a model that can be read.
        ConfigError: for a config with an unknown or missing key; names it.
    """
    found = undisturbed(lambda: model_folder(folder), described)
    with torch.device("meta"):
        return found.build()


def read_tensors(
    folder: Folder,
    model: nn.Module,
    *,
    layout: Readable | GGUF | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
) -> dict[str, Tensor]:
    """The tensors of a saved model by name, exactly those of ``model``.

    Each is read, put on the device and given its dtype before the next one is read. The sizes of all files of the
    folder are compared with its manifest, and with ``verify`` their digests.

    Args:
        folder: where it was saved.
        model: what the tensors are for; it may be on the meta device.
        layout: of another library; None is this one's.
        device: None is the CPU.
        dtype: of floating tensors; None keeps what was saved.
        verify: whether to compare digests.

    Raises:
        CheckpointError: for a file that is missing, truncated or damaged, or a tensor too many, too few or of another
            shape.
    """
    places = _places(folder, model, layout)
    check_files(folder, digests=verify)
    expected = unique_tensors(model)
    kept = {f"{name}.scales" for name in quantized_within(model)}
    tensors: dict[str, Tensor] = {}
    for there, tensor in each_tensor({there: stored for there, (stored, _, _) in places.items()}):
        _, name, piece = places[there]
        wanted = dtype if tensor.is_floating_point() and name not in kept else None
        if piece.alone:
            found = piece.change.here(tensor)
            tensors[name] = found.to(device, wanted, copy=True).contiguous()  # owned: the file may change
        else:
            if name not in tensors:
                tensors[name] = torch.empty(expected[name].shape, dtype=wanted or tensor.dtype, device=device)
            piece.put(tensor, tensors[name])
        del tensor
    return tensors


def check_tensors(folder: Folder) -> None:
    """Compare the names, shapes and dtypes of the weights of a folder with its config; their values are not read.

    Raises:
        CheckpointError: as :func:`read_tensors`.
        ConfigError: for a config with an unknown or missing key; names it.
    """
    if (about := gaussian_of(Path(folder))) is not None:
        read_gaussian(Path(folder), about)  # whose values its checks need
        return
    found = described(folder)
    with torch.device("meta"):
        model = found.build()
    if (adapter := adapter_of(Path(folder))) is not None:
        merge(adapter, model)
    else:
        _places(folder, model, found.layout)


def _places(folder: Folder, model: nn.Module, layout: Readable | GGUF | None) -> dict[str, tuple[Stored, str, Piece]]:
    """By the names in the files: where a tensor is stored, what it is a piece of, and how; once all is known to fit."""
    if isinstance(model, Backbone) and model.adaptation is not None:
        expected, path = adapter_tensors(model), current(folder, ADAPTER_FILE)
        check_base(folder, model.adaptation.base, model.adaptation.digests)
        names = {stored_name(name): (name, Piece(stored_name(name))) for name in expected}
        return _fitting(path, stored_tensors(Files([path])), expected, names, set())
    expected = unique_tensors(model)
    files = own_files(folder) if layout is None else found_files(folder)
    stored, where = stored_tensors(files), files.listing or files.paths[0]
    if layout is None or not isinstance(model, Backbone):
        return _fitting(where, stored, expected, {name: (name, Piece(name)) for name in expected}, set())
    wrong: CheckpointError | None = None
    again = [name for name in model.state_dict() if name not in expected]  # of modules that stand in several places
    for table in layout.variants():
        found = [(name, piece) for name in expected for piece in table.pieces(model.config, name)]
        spare = table.spare(model.config) | {p.name for name in again for p in table.pieces(model.config, name)}
        try:
            return _fitting(where, stored, expected, {piece.name: (name, piece) for name, piece in found}, spare)
        except CheckpointError as error:
            wrong = wrong or error
    assert wrong is not None
    raise wrong


def _fitting(
    where: Path,
    stored: dict[str, Stored],
    expected: dict[str, Tensor],
    places: dict[str, tuple[str, Piece]],
    spare: set[str],
) -> dict[str, tuple[Stored, str, Piece]]:
    """The places, once their names and shapes are those of the files."""
    _check_names(where, list(places), stored.keys() - (spare - places.keys()))
    for there, (name, piece) in places.items():
        like = piece.of(torch.empty_like(expected[name], device="meta"))
        _check_tensor(there, like, stored[there])
    return {there: (stored[there], name, piece) for there, (name, piece) in places.items()}


def _check_names(path: Path, expected: list[str], found: set[str]) -> None:
    missing, extra = [name for name in expected if name not in found], sorted(found.difference(expected))
    sides = [(missing, "missing"), (extra, "too many")]
    if problems := [f"{len(names)} {what}, first {names[0]!r}" for names, what in sides if names]:
        raise CheckpointError(f"{path}: tensors: {'; '.join(problems)}", hint=_OTHER_MODEL)


def _check_tensor(name: str, expected: Tensor, found: Stored) -> None:
    if found.shape != (shape := tuple(expected.shape)):
        raise CheckpointError(f"{found.path}: {name} has shape {found.shape}, expected {shape}", hint=_OTHER_MODEL)
    whole = expected.dtype == torch.int8 and found.dtype not in ("I8", "torch.int8")
    if whole or (found.floating, found.complex) != (expected.is_floating_point(), expected.is_complex()):
        raise CheckpointError(
            f"{found.path}: {name} is {found.dtype}, expected {expected.dtype} or alike", hint=_OTHER_MODEL
        )
