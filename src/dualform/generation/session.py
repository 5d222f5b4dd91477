"""A generation that can be put down: everything its continuation depends on, as one value."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import CheckpointError
from dualform.core.recurrence import State
from dualform.core.tree import clone, named_leaves, nbytes, state_class, tree_map
from dualform.models.lm import LanguageModel
from dualform.models.saving.state import fingerprint, load_meta, load_state, save_state
from dualform.models.saving.undisturbed import undisturbed
from dualform.ops.device import usable_device

WINDOW = 256  # tokens remembered for the repetition penalty, and the longest stop sequence
_FEW = 8  # elements of each weight by which a session knows its model
_MODEL = "session_model"  # the key of the file's metadata that holds the model's fingerprint


@explained
@state_class
class Session(NamedTuple):
    """Where a generation stands. A tree of tensors, batch first in every leaf, as every state of the library.

    It is a value: generating from it leaves it as it was, so it can be resumed any number of times. For a model
    without attention its size does not depend on how many tokens it has seen.

    Attributes:
        state: the model's state after all tokens seen.
        logits: of the next token, float32 ``(1, V)``.
        history: the last ``WINDOW`` tokens seen, int64 ``(1, WINDOW)``; -1 fills the empty places on the left.
        generated: tokens generated since the last prompt, int64 ``(1,)``; stop sequences match only these.
        position: tokens seen in all, int64 ``(1,)``; the place in the random stream.
        seed: of the random stream, int64 ``(1,)``.
        model: what tells its model from others, int64 ``(1, 4)``; see :func:`mark`.
    """

    state: State
    logits: Tensor
    history: Tensor
    generated: Tensor
    position: Tensor
    seed: Tensor
    model: Tensor

    @classmethod
    def start(cls, model: LanguageModel, *, seed: int = 0, max_len: int = 0) -> "Session":
        """The session before the first token, on the model's device; ``max_len`` as for ``model.init_state``."""
        device = next(model.parameters()).device
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        return cls(
            state=model.init_state(1, max_len=max_len),
            logits=torch.zeros(1, model.config.vocab_size, device=device),
            history=torch.full((1, WINDOW), -1, device=device),
            generated=zero,
            position=zero.clone(),
            seed=torch.full_like(zero, seed),
            model=mark(model).to(device),
        )

    @property
    def tokens(self) -> int:
        """Tokens seen, prompts and generated ones together."""
        return int(self.position)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole session; the model's state alone is ``dualform.core.tree.nbytes(session.state)``."""
        return nbytes(self)

    def fork(self, seed: int | None = None) -> "Session":
        """A copy that shares no memory with this one, on another random stream where ``seed`` is given."""
        copy: Session = clone(self)
        return copy if seed is None else copy._replace(seed=torch.full_like(copy.seed, seed))

    def to(self, device: torch.device | str) -> "Session":
        """A copy on a device, this one's or another.

        Raises:
            ArgumentError: for a device that is not there.
        """
        device = usable_device(device, f"Session.to: device {str(device)!r}", numbers=False)
        return tree_map(lambda leaf: leaf.to(device, copy=True), self)

    def save(self, path: str | os.PathLike[str], model: LanguageModel) -> None:
        """Write the session and the fingerprint of its model to one file, all or nothing.

        Raises:
            CheckpointError: when the disk refuses; a file saved there before is unchanged.
        """
        save_state(self._replace(model=()), path, {_MODEL: fingerprint(model)})  # the file has one over more weights

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: LanguageModel) -> "Session":
        """Read a session that :meth:`save` wrote, onto the device of its model; it goes on bit for bit.

        Raises:
            CheckpointError: for a file that is missing, damaged, no session, or made by another model; for numbers that
                contradict one another, such as a cache that says it holds more tokens than were seen.
        """
        return undisturbed(lambda: Path(path), lambda path: cls._load(path, model))

    @classmethod
    def _load(cls, path: Path, model: LanguageModel) -> "Session":
        made_by = load_meta(path).get(_MODEL)
        if made_by is None:
            raise CheckpointError(f"{path}: a state, but not of a generation", hint="Session.save writes one")
        if made_by != (here := fingerprint(model)):
            raise CheckpointError(
                f"{path}: saved with model {made_by[:12]}, and this is model {here[:12]}",
                hint="a state goes on only with the weights and the dtype that made it",
            )
        like = cls.start(model)
        session: Session = load_state(path, like._replace(model=()))._replace(model=like.model)
        if wrong := _contradiction(session, model):
            raise CheckpointError(f"{path}: {wrong}", hint="the file is damaged; save the session again")
        return session


def mark(model: LanguageModel) -> Tensor:
    """What a session in memory knows its model by, int64 ``(1, 4)``: the config, dtypes, and some of each weight.

    It takes a fraction of a step; :func:`~dualform.models.saving.state.fingerprint`, which files hold, reads more.
    """
    digits = bytes.fromhex(fingerprint(model, _FEW))
    return torch.tensor([[int.from_bytes(digits[i : i + 8], "big", signed=True) for i in range(0, 32, 8)]])


def _contradiction(session: Session, model: LanguageModel) -> str:
    """The first number of a session that cannot be, given the others; empty where all can."""
    vocab, history, seen = model.config.vocab_size, session.history, session.position
    if bool((seen < 0).any()):
        return f"position is {int(seen.min())}, expected 0 or more"
    if bool(((session.generated < 0) | (session.generated > seen)).any()):
        return f"generated is {session.generated.tolist()} of {seen.tolist()} tokens seen"
    if bool((session.seed < 0).any()):
        return f"seed is {int(session.seed.min())}, expected 0 or more"
    if bool(((history < -1) | (history >= vocab)).any()):
        low, high = int(history.min()), int(history.max())
        return f"history holds tokens from {low} to {high}; the vocabulary is 0 to {vocab - 1}"
    empty = torch.arange(WINDOW, device=seen.device) < WINDOW - seen[:, None]
    if not torch.equal(empty, history < 0):
        return f"history holds {int((history >= 0).sum())} tokens, after {seen.tolist()} were seen"
    return _overfull(session, model)


def _overfull(session: Session, model: LanguageModel) -> str:
    """What a cache says that it holds, against what was seen and what it has room for."""
    found = dict(named_leaves(session.state))
    caches = [
        (name, found[f"{folder}{dot}length"])
        for name in found
        for folder, dot, last in [name.rpartition(".")]
        if last != "length" and f"{folder}{dot}length" in found and found[name].dim() > 1
    ]
    most = max((found[name].shape[1] for name, _ in caches), default=0)
    grown = dict(named_leaves(model.init_state(1, max_len=most + 1)))  # a cache that can have more room has it here
    for name, length in caches:
        if not torch.equal(length, session.position):
            return f"{name} holds {length.tolist()} tokens, and {session.position.tolist()} were seen"
        capacity, room = found[name].shape[1], grown[name].shape[1]
        if capacity > room or (capacity < room and bool((length > capacity).any())):
            return f"{name} holds {int(length.max())} tokens, and has {capacity} slots"
    return ""
