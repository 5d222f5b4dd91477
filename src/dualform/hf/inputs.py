"""What transformers passes beside tokens: read, known to change nothing, or refused."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.options import brief, suggestion
from dualform.core.packing import readable
from dualform.core.shapes import check_tensors
from dualform.hf.cache import StateCache

_READ = ("cache", "past_key_values", "num_items_in_batch", "position_ids")
_KNOWN = ("input_ids", "attention_mask", "labels", "use_cache", "output_hidden_states", "logits_to_keep", *_READ)
_WITHOUT_EFFECT = ("cache_position", "token_type_ids")  # on a model without absolute positions and types of tokens
_MISSING = ("output_attentions", "output_router_logits")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_ROWS = "give each sequence a row of its own, with an attention_mask where rows differ in length"


def check_options(options: Mapping[str, Any]) -> None:
    """That every keyword beside the named ones of ``forward`` is read, or changes nothing; None is as if not given.

    Raises:
        ArgumentError: names the keyword.
    """
    for name, value in options.items():
        if value is None or name in _READ or name in _WITHOUT_EFFECT:
            continue
        if name in _MISSING:
            if value:
                raise ArgumentError(f"forward: {name} is {brief(value)}, and a model of this library returns none")
        elif name == "is_causal":
            if not value:
                raise ArgumentError(f"forward: is_causal is {brief(value)}, and a language model of this library is")
        elif name in _PACKED:
            raise ArgumentError(f"forward: {name} is given, and packed rows are not read here", hint=_ROWS)
        else:
            raise ArgumentError(f"forward: unknown keyword {brief(name)}", hint=suggestion(name, _KNOWN))


def cache_of(options: Mapping[str, Any]) -> StateCache | None:
    """The state that an earlier call has left.

    Raises:
        ArgumentError: for a cache of another kind.
    """
    given = options.get("cache")
    cache = options.get("past_key_values") if given is None else given
    if cache is None or isinstance(cache, StateCache):
        return cache
    hint = "leave it out at first: the output has the cache that the next call takes"
    raise ArgumentError(f"forward: the cache is a {type(cache).__name__}, expected a StateCache", hint=hint)


def check_positions(positions: Tensor | None, tokens: Tensor, mask: Tensor | None, seen: int) -> None:
    """That ``position_ids`` are those that follow from the order of the tokens, where their values can be read.

    A model of this library knows tokens by their order alone. Either convention is right: the number of tokens before
    each, padding left out, or the column in which it stands.

    Args:
        positions: ``(B, T)``, ``(1, T)`` or ``(T,)``; None is right.
        tokens: ``(B, T)``.
        mask: ``(B, T)``, or ``(B, seen + T)``; None shows all.
        seen: columns in earlier calls.

    Raises:
        ArgumentError: for another shape, and for positions that begin again, leave some out, or come in another order.
    """
    if positions is None:
        return
    rows, length = tokens.shape
    if not isinstance(positions, Tensor) or positions.shape not in ((rows, length), (1, length), (length,)):
        came = f"shape {tuple(positions.shape)}" if isinstance(positions, Tensor) else type(positions).__name__
        raise ArgumentError(f"forward: position_ids has {came}, expected (B, T) = ({rows}, {length})")
    if not length or not readable(positions) or not (mask is None or readable(mask)):
        return
    came = positions.cpu().expand(rows, length)
    every = torch.ones(rows, length, dtype=torch.bool) if mask is None else mask.cpu() != 0
    shown, whole = every[:, -length:], every.shape[1] == seen + length
    inside = shown.cumsum(1) - 1
    first = came.gather(1, shown.int().argmax(1, keepdim=True))
    column = seen + shown.int().argmax(1, keepdim=True)
    right = first == column
    if whole:
        right |= first == every[:, :-length].sum(1, keepdim=True)
    else:  # how much of what came before was padding is not told
        right |= (first > 0) & (first < column)
    begin = torch.where(right, first, column)
    wrong = shown & (came != begin + inside)
    if wrong.any():
        row, at = wrong.nonzero()[0].tolist()
        raise ArgumentError(
            f"forward: position_ids[{row}, {at}] is {came[row, at]}, expected {(begin + inside)[row, at]}: "
            "positions follow from the order of the tokens",
            hint=f"leave position_ids out; of sequences in one row, {_ROWS}",
        )


def check_mask(mask: Tensor | None, tokens: Tensor, seen: int) -> Tensor | None:
    """The columns of a mask that stand over the tokens.

    Args:
        mask: ``(B, T)``, or with the columns of earlier calls before them, ``(B, seen + T)``.
        tokens: ``(B, T)``.
        seen: columns in earlier calls.

    Raises:
        ArgumentError: for another shape; for a mask of numbers to add, 0 for a token, as attention takes.
    """
    if mask is None:
        return None
    length = tokens.shape[1]
    check_tensors("forward", input_ids=(tokens, "B T"), attention_mask=(mask, "B columns"))
    if mask.shape[1] not in (length, seen + length):
        expected = f"(B, T) = {tuple(tokens.shape)}" + (
            f", or {seen + length} columns with those before" if seen else ""
        )
        raise ArgumentError(f"forward: attention_mask has shape {tuple(mask.shape)}, expected {expected}")
    return mask[:, -length:] if length else mask[:, :0]


def places_to_keep(given: Any, length: int, device: torch.device) -> slice | Tensor:
    """The positions whose logits are wanted.

    Args:
        given: the number of last ones, 0 for all; or indices ``(n,)``, or a mask ``(T,)`` of them.
        length: T.
        device: of the model.

    Raises:
        ArgumentError: for a negative number, indices outside of the sequence, or another kind of thing.
    """
    if isinstance(given, int):
        if given < 0:
            raise ArgumentError(
                f"forward: logits_to_keep is {given}, expected 0 for all or the number of last positions"
            )
        return slice(-given, None)
    hint = "0 for all, the number of last positions, or a tensor of their indices"
    if not isinstance(given, Tensor) or given.dim() != 1 or given.is_floating_point() or given.is_complex():
        came = f"{given.dtype}, {tuple(given.shape)}" if isinstance(given, Tensor) else brief(given)
        raise ArgumentError(f"forward: logits_to_keep is {came}, expected a number or indices", hint=hint)
    if given.dtype == torch.bool:
        check_tensors("forward", logits_to_keep=(given, f"{length}"))
        return given.to(device)
    if readable(given) and ((given < -length) | (given >= length)).any():
        came = f"{int(given.min())} to {int(given.max())}"
        raise ArgumentError(f"forward: logits_to_keep holds {came}, expected indices of {length} positions", hint=hint)
    return given.to(device, torch.int64)
