"""A state in a file: any tree of tensors, to put down here and take up there."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dualform.core.errors import CheckpointError
from dualform.core.recurrence import State
from dualform.core.tree import named_leaves, tree_map
from dualform.gaussian.parameters import Parameters
from dualform.models.backbone import Backbone
from dualform.models.readout import Readout
from dualform.models.saving.digest import ALGORITHM, tensors_digest
from dualform.models.saving.files import replacing_file
from dualform.models.saving.gaussian import gaussian_options
from dualform.models.saving.one_file import unique_tensors
from dualform.models.saving.undisturbed import undisturbed

FORMAT, _WITHOUT_DIGEST = "2", "1"
_MARK, _DIGEST = "dualform_state", "dualform_digest"  # keys of the metadata
_SAMPLE = 2**16  # elements of a tensor that its digest reads

StatePath = str | os.PathLike[str]


def save_state(state: State, path: StatePath, meta: dict[str, str] | None = None) -> None:
    """Write a state to one safetensors file, all or nothing; leaves are named by their path in the tree.

    A digest of all that it holds goes with it, and :func:`load_state` compares.

    Args:
        state: any tree of tensors, batch first.
        path: the file.
        meta: words to keep beside it, such as the :func:`fingerprint` of its model; :func:`load_meta` gives them.

    Raises:
        CheckpointError: when the disk refuses; a file saved there before is unchanged.
    """
    tensors = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in _real_leaves(state).items()}
    words = {**(meta or {}), _MARK: FORMAT}
    with replacing_file(path) as new:
        save_file(tensors, new, metadata={**words, _DIGEST: f"{ALGORITHM} {tensors_digest(tensors, words)}"})


def load_state(path: StatePath, like: State) -> State:
    """Read a state of the structure of ``like``, such as ``model.init_state(1)``, onto its devices.

    The number of rows may differ from that of ``like``, and so may axis 1, the capacity, of a cache: of the tensors
    that lie beside a ``length`` in a NamedTuple. Names, other axes and dtypes must be equal.

    Raises:
        CheckpointError: for a file that is missing, damaged or no state, one of another structure, or a ``length``
            below 0; names the leaf.
    """
    found, _, _ = _read(path)
    expected = _real_leaves(like)
    missing, extra = [n for n in expected if n not in found], sorted(found.keys() - expected.keys())
    sides = [(missing, "lacks"), (extra, "has an unexpected")]
    if problems := [f"{what} {names[0]!r}" for names, what in sides if names]:
        raise CheckpointError(f"{path}: the state {' and '.join(problems)}", hint="it is a state of another model")
    rows = {len(leaf) for leaf in found.values() if leaf.dim()}
    if len(rows) > 1:
        raise CheckpointError(f"{path}: its tensors have {' and '.join(map(str, sorted(rows)))} rows", hint="damaged?")
    for name, leaf in expected.items():
        _check_leaf(path, name, found[name], leaf, free=2 if _is_cache(name, expected) else 1)
        if _is_length(name, found) and bool((found[name] < 0).any()):
            raise CheckpointError(f"{path}: {name} is {int(found[name].min())}, expected 0 or more", hint="damaged?")
    taken = iter([found[name].to(leaf.device) for name, leaf in expected.items()])
    return tree_map(lambda leaf: torch.view_as_complex(next(taken)) if leaf.is_complex() else next(taken), like)


def load_meta(path: StatePath) -> dict[str, str]:
    """The words that :func:`save_state` kept. The tensors are not read, so nothing is compared with the digest.

    Raises:
        CheckpointError: for a file that is missing, damaged or no state.
    """
    return _read(path, tensors=False)[1]


def verify_state(path: StatePath) -> bool:
    """Compare a saved state with its digest; whether it has one, as those of the first version had none.

    Raises:
        CheckpointError: for a file that is missing, damaged or no state.
    """
    return _read(path)[2]


def fingerprint(model: nn.Module, most: int = _SAMPLE) -> str:
    """64 hexadecimal digits that tell models apart: SHA-256 over what they are and the weights, wherever they live.

    Of a tensor with more than ``most`` elements, as many at most, evenly spaced, count. The dtype counts too: a state
    goes on bit for bit only with the numbers it came from.
    """
    digest = hashlib.sha256(json.dumps(_about(model), sort_keys=True).encode())
    tensors = unique_tensors(model)
    samples = _brought([_sample(tensor.detach().flatten(), most) for tensor in tensors.values()])
    for (name, tensor), sample in zip(tensors.items(), samples, strict=True):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _about(model: nn.Module) -> dict[str, Any]:
    """What beside its tensors a model is made of."""
    if isinstance(model, Parameters):
        return gaussian_options(model)
    if not isinstance(model, Backbone):
        return {"kind": type(model).__name__}
    about = model.config.to_dict()
    return {**about, "head": model.head_options()} if isinstance(model, Readout) else about


def _sample(flat: Tensor, most: int) -> Tensor:
    return flat[:: -(-len(flat) // most)] if len(flat) > most else flat


def _brought(parts: list[Tensor]) -> list[Tensor]:
    """Vectors on the CPU, those of one dtype and device in one copy: a device is waited for at each."""
    kinds = dict[tuple[torch.dtype, torch.device], list[int]]()
    for i, part in enumerate(parts):
        kinds.setdefault((part.dtype, part.device), []).append(i)
    found = list(parts)
    for places in kinds.values():
        sizes = [len(parts[i]) for i in places]
        for i, part in zip(places, torch.cat([parts[i] for i in places]).cpu().split(sizes), strict=True):
            found[i] = part
    return found


def _read(path: StatePath, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """The leaves, the words beside them, and whether there is a digest, which was compared if the leaves were read."""
    return undisturbed(lambda: Path(path), lambda path: _read_once(path, tensors))


def _read_once(path: Path, tensors: bool) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file", hint="give a file written by save_state")
    try:
        with safe_open(path, framework="pt") as file:
            meta = dict(file.metadata() or {})
            found = {name: file.get_tensor(name).clone() for name in file.keys()} if tensors else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", hint="truncated, or not a saved state") from error
    given, written = meta.pop(_DIGEST, None), meta.get(_MARK)
    if written not in ((FORMAT,) if given else (FORMAT, _WITHOUT_DIGEST)):
        raise CheckpointError(f"{path}: not a state saved by this version of the library")
    if tensors and written == FORMAT and given != (want := f"{ALGORITHM} {tensors_digest(found, meta)}"):
        hint = "copy it again, or save the state again"
        raise CheckpointError(f"{path}: damaged: its digest is {want}, and {given} was saved", hint=hint)
    del meta[_MARK]
    return found, meta, given is not None


def _real_leaves(state: State) -> dict[str, Tensor]:
    """The leaves by name; a complex one as pairs of real numbers, which every reader of the file knows."""
    named = ((name or "state", leaf.detach()) for name, leaf in named_leaves(state))
    return {name: torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for name, leaf in named}


def _is_cache(name: str, names: Any) -> bool:
    folder, _, last = name.rpartition(".")
    return last != "length" and (f"{folder}.length" if folder else "length") in names


def _is_length(name: str, names: Any) -> bool:
    folder, _, last = name.rpartition(".")
    return last == "length" and any(other != name and other.rpartition(".")[0] == folder for other in names)


def _check_leaf(path: StatePath, name: str, found: Tensor, like: Tensor, *, free: int) -> None:
    got, want = tuple(found.shape), tuple(like.shape)
    if len(got) != len(want) or got[free:] != want[free:] or found.dtype != like.dtype:
        shown = ", ".join(["*"] * min(free, len(want)) + [str(n) for n in want[free:]])
        raise CheckpointError(
            f"{path}: {name} is {found.dtype} {got}, expected {like.dtype} ({shown})",
            hint="it is a state of another model",
        )
