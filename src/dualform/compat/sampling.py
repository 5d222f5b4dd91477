"""``sample`` of ``mamba_ssm.utils.generation``, and its filters of logits, which write in place."""

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors
from dualform.generation.sampling import keep_min_p, keep_top_k, keep_top_p, penalize


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """One token of each row, by PyTorch's random numbers; the logits stay as they are.

    Args:
        logits: ``(B, V)``.
        top_k: draw from the k most likely tokens; 1 takes the most likely, 0 draws from all.
        top_p: draw from the fewest tokens that together are so likely; 0 or 1 for all.
        min_p: with a ``top_k`` of 0, draw from tokens at least so likely as a share of the most likely one.
        temperature: divides logits.

    Returns:
        ``(B,)``.

    Raises:
        ArgumentError: for logits of another shape, or an option out of range.
    """
    check_tensors("sample", logits=(logits, "B V"))
    check_options("sample", top_k, top_p, min_p, temperature)
    if top_k == 1:
        return logits.argmax(-1)
    logits = logits.float()
    if top_k:
        logits = keep_top_k(logits, top_k)
    elif min_p:
        return torch.multinomial((keep_min_p(logits, min_p) / temperature).softmax(-1), 1)[:, 0]
    logits = logits / temperature
    if 0 < top_p < 1:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def check_options(where: str, top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    """That the options of a draw are in their ranges.

    Raises:
        ArgumentError: names the option.
    """
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if not 0 <= value <= 1:
            raise ArgumentError(f"{where}: {name} is {value}, expected 0 to 1")
    if top_k < 0 or temperature <= 0:
        raise ArgumentError(
            f"{where}: top_k is {top_k} and temperature {temperature}, expected at least 0 and above 0",
            hint="top_k=1 takes the most likely token",
        )


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Write -inf over all logits ``(B, V)`` but the k greatest of each row, and those equal to the k-th."""
    logits.copy_(keep_top_k(logits, top_k))


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Write -inf over all logits ``(B, V)`` but those of the fewest tokens that together are so likely.

    Outside of (0, 1) nothing is written.
    """
    if 0 < top_p < 1:
        logits.copy_(keep_top_p(logits, top_p))


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Write -inf over the logits ``(B, V)`` below ``min_p``, which is itself a logit; outside of (0, 1) over none."""
    if 0 < min_p < 1:
        logits.masked_fill_(logits < min_p, -torch.inf)


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Make the tokens ``prev_output_tokens`` ``(B, L)`` less likely in place, and return the logits ``(B, V)``.

    A positive logit is divided by the penalty, a negative one multiplied.
    """
    return logits if repetition_penalty == 1 else logits.copy_(penalize(logits, prev_output_tokens, repetition_penalty))
