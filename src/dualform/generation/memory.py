"""Whether a batch fits into memory, before it starts: what its rows take, and what is left."""

from pathlib import Path

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.tree import leaves
from dualform.generation.request import prefill_tokens
from dualform.models.lm import LanguageModel

_TWICE = 2  # a step may make states beside the old ones, and so do rows that join or leave and caches that grow
_OF_A_DRAW = 6  # float64 numbers for each token of the vocabulary: sorted, summed, and what is in between
_OF_A_PIECE = 16  # float32 numbers for each feature of a piece of a prompt
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def row_bytes(model: LanguageModel, tokens: int, state_dtype: torch.dtype | None = None) -> int:
    """Bytes of one row at its largest: its state, twice, with room for so many tokens, its logits and its draw.

    States of float32 are held in ``state_dtype``, if that is given. Caches that grow have room for a power of two of
    tokens; see :class:`~dualform.generation.decoder.Decoder`.
    """
    small, large = (sum(_held(leaf, state_dtype) for leaf in leaves(model.init_state(1, max_len=n))) for n in (1, 2))
    room = 2 ** max(0, tokens - 1).bit_length()
    state = small + (large - small) * (room - 1)
    return _TWICE * state + model.config.vocab_size * (4 + 8 * _OF_A_DRAW)


def _held(leaf: Tensor, dtype: torch.dtype | None) -> int:
    return leaf.nbytes if dtype is None or leaf.dtype != torch.float32 else leaf.numel() * dtype.itemsize


def shared_bytes(model: LanguageModel) -> int:
    """Bytes that all rows need once, beside the weights: those of reading a piece of a prompt."""
    return prefill_tokens(model) * model.config.d_model * 4 * _OF_A_PIECE


def available_bytes(device: torch.device) -> int | None:
    """Memory that is left on a device, with what PyTorch holds there and does not use; None where nobody knows."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = [left for left in (_left_in_machine(), _left_in_group()) if left is not None]
    return min(found) if found else None


def check_memory(
    where: str, model: LanguageModel, rows: int, tokens: int, held: int = 0, state_dtype: torch.dtype | None = None
) -> None:
    """That rows of up to so many tokens fit into the memory of the model's device.

    Args:
        where: who is asked for them.
        model: whose rows they are.
        rows: how many there are at a time.
        tokens: the most that one of them sees, prompt and continuation together.
        held: bytes of the rows that are there already.
        state_dtype: that states of float32 are held in, if another one.

    Raises:
        ArgumentError: says what they need, what is left, and how many rows fit.
    """
    device = next(model.parameters()).device
    left = available_bytes(device)
    if left is None:
        return
    each, once = row_bytes(model, tokens, state_dtype), shared_bytes(model)
    left += held
    if rows * each + once <= left:
        return
    fit = max(0, (left - once) // each)
    fits = f"{fit} row{'s fit' if fit != 1 else ' fits'}" if fit else "not even one row fits"
    hint = f"rows={fit}: more requests wait for a row" if fit else "fewer tokens, or a smaller model"
    raise ArgumentError(
        f"{where}: {rows} row{'s' * (rows != 1)} of up to {tokens:,} tokens need {_mib(rows * each + once)}, and "
        f"{_mib(left)} of memory are left on {device}: {fits}",
        hint=hint,
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _left_in_machine() -> int | None:
    """What Linux says is available without swapping."""
    try:
        found = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _left_in_group() -> int | None:
    """What is left of the limit of a container; files that were read, and may be dropped, do not count."""
    try:
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return limit - used + int(stat["inactive_file"])
    except (OSError, KeyError, ValueError):  # such as "max", no limit
        return None
