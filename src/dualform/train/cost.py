"""What a training step and a step of generation cost, against the length of the sequence."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.recurrence import State
from dualform.core.tree import nbytes
from dualform.layers.mixer import Prepared
from dualform.models.lm import LanguageModel

_STEPS = 4  # of generation, timed together


class Cost(NamedTuple):
    """Of one sequence of a length.

    Attributes:
        length: T.
        seconds: of a forward and backward pass.
        kept: bytes that the forward pass keeps for the backward pass, beside parameters and tokens.
        state: bytes of the state after the sequence, which generation holds.
        step: seconds of one more token.
    """

    length: int
    seconds: float
    kept: int
    state: int
    step: float


def costs(model: LanguageModel, lengths: list[int], *, limit: float = 10.0, bfloat16: bool = False) -> Iterator[Cost]:
    """Measure a model on its device, shortest length first.

    Args:
        model: its gradients are left as None.
        lengths: rising.
        limit: seconds; after a pass that took longer, no longer sequence is tried.
        bfloat16: whether matrix products are taken in bfloat16.
    """
    device = next(model.parameters()).device
    for length in lengths:
        tokens = torch.randint(model.config.vocab_size, (1, length), device=device)
        kept = _kept(model, tokens, bfloat16)

        def both(tokens: Tensor = tokens) -> None:
            _loss(model, tokens, bfloat16).backward()
            model.zero_grad(set_to_none=True)

        seconds = _fastest(both, device, limit)
        with torch.inference_mode():
            state = model.init_state(1, max_len=length + 8)
            size = nbytes(state)
            _, state = model.features(tokens, state)
            one = _fastest(partial(_step, model.prepare(), tokens[:, 0], state), device, limit) / _STEPS
        yield Cost(length, seconds, kept, size, one)
        if seconds > limit:
            return


def crossing(lower: list[tuple[int, float]], upper: list[tuple[int, float]]) -> float | None:
    """The length from which on the second of two curves lies above the first, as straight lines in logarithms.

    Args:
        lower: points ``(length, cost)`` at rising lengths.
        upper: likewise, at the same lengths as far as both go.

    Returns:
        The length; the first of all where it always does, None where it does not at the end.
    """
    both = [(n, a, b) for (n, a), (m, b) in zip(lower, upper, strict=False) if n == m]
    if not both or both[-1][2] <= both[-1][1]:
        return None
    for (n, a, b), (m, c, d) in reversed(list(pairwise(both))):
        if b <= a:
            before, after = torch.tensor([b / a, d / c]).log().tolist()
            share = -before / (after - before)
            return n * (m / n) ** share
    return float(both[0][0])


def _step(prepared: Prepared, token: Tensor, state: State) -> None:
    for _ in range(_STEPS):
        _, state = prepared.step(token, state)


def _kept(model: LanguageModel, tokens: Tensor, bfloat16: bool) -> int:
    """Bytes of the storages that autograd saves, each once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {tokens.untyped_storage().data_ptr()}
    found: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _loss(model, tokens, bfloat16)
    return sum(found.values())


def _loss(model: LanguageModel, tokens: Tensor, bfloat16: bool) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16):
        return model.loss(tokens)


def _fastest(run: Callable[[], None], device: torch.device, limit: float, repeats: int = 3) -> float:
    """Seconds of the fastest of some calls after a first one, which is the only one where it exceeds the limit."""
    taken = [_timed(run, device)]
    if taken[0] <= limit:
        taken = [_timed(run, device) for _ in range(repeats)]
    return min(taken)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
