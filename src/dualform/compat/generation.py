"""``mamba_ssm.utils.generation``: tokens one by one, from a model whose layers keep their states."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualform.compat.cache import InferenceParams
from dualform.compat.sampling import check_options, sample
from dualform.core.shapes import check_tensors
from dualform.generation.sampling import penalize

__all__ = ["GenerationMixin", "GenerationOutput", "InferenceParams", "decode"]


@dataclass
class GenerationOutput:
    """What a generation made.

    Args:
        sequences: ``(B, L)``, the prompt and what follows it.
        scores: for each new token the logits ``(B, V)`` that it was drawn from.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> GenerationOutput:
    """Continue ``input_ids`` up to ``max_length`` tokens, or until every row has drawn ``eos_token_id``.

    Args:
        input_ids: ``(B, T)``.
        model: called as :class:`~dualform.compat.mixer_seq.MambaLMHeadModel`.
        max_length: tokens, prompt included.
        top_k: draw from the k most likely tokens; 1 takes the most likely, 0 draws from all.
        top_p: draw from the fewest tokens that together are so likely; 0 or 1 for all.
        min_p: with a ``top_k`` of 0, draw from tokens at least so likely as a share of the most likely one.
        temperature: divides logits.
        repetition_penalty: makes tokens of the sequence less likely, above 1.
        eos_token_id: the token that ends a sequence.
        teacher_outputs: ``(B, L)``; tokens that are taken instead of those that would be drawn, as far as they go.
        vocab_size: only the first so many tokens are drawn.
        cg: of no effect here; nothing is captured, and the tokens are the same.
        enable_timing: whether the time is printed.
        output_scores: whether logits are kept.
        streamer: its ``put`` gets the prompt and each new token, and ``end`` is called.

    Raises:
        ArgumentError: for a ``max_length`` that leaves no room, or an option out of range.
    """
    check_tensors("decode", input_ids=(input_ids, "B T"))
    check_options("decode", top_k, top_p, min_p, temperature)
    batch, length = input_ids.shape
    forced = 0 if teacher_outputs is None else teacher_outputs.shape[1]
    begun = _now(input_ids, enable_timing)
    memory = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    sequence, new, scores = input_ids, input_ids, []
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while sequence.shape[1] < max_length and length > 0:
        positions = None
        if memory.seqlen_offset:
            positions = torch.full((batch, 1), memory.seqlen_offset, dtype=torch.long, device=input_ids.device)
        logits = model(new, position_ids=positions, inference_params=memory, num_last_tokens=1).logits[:, -1]
        logits = logits if vocab_size is None else logits[..., :vocab_size]
        memory.seqlen_offset += new.shape[1]
        if repetition_penalty != 1.0:
            logits = penalize(logits, sequence, repetition_penalty)
        if output_scores:
            scores.append(logits.clone())
        if teacher_outputs is not None and sequence.shape[1] < forced:
            new = teacher_outputs[:, sequence.shape[1] : sequence.shape[1] + 1]
        else:
            new = sample(logits, top_k, top_p, min_p, temperature)[:, None]
        sequence = torch.cat([sequence, new], 1)
        if streamer is not None:
            streamer.put(new.cpu())
        if eos_token_id is not None and bool((new == eos_token_id).all()):
            break
    if streamer is not None:
        streamer.end()
    if enable_timing:
        took = 1000 * (_now(input_ids, True) - begun)
        print(f"Prompt processing + decoding time: {took:.0f}ms")
    return GenerationOutput(sequence, tuple(scores) if output_scores else None)


class GenerationMixin:
    """``generate`` for a model that is called as :class:`~dualform.compat.mixer_seq.MambaLMHeadModel`."""

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Any:
        """The states of all layers, by index."""
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        teacher_outputs: Tensor | None = None,
        vocab_size: int | None = None,
        cg: bool = False,
        enable_timing: bool = False,
        streamer: Any = None,
    ) -> Tensor | GenerationOutput:
        """The sequences ``(B, L)`` of :func:`decode`; all of its output with ``return_dict_in_generate``."""
        found = decode(
            input_ids,
            self,
            max_length,
            top_k,
            top_p,
            min_p,
            temperature,
            repetition_penalty,
            eos_token_id,
            teacher_outputs,
            vocab_size,
            cg,
            enable_timing,
            output_scores,
            streamer,
        )
        return found if return_dict_in_generate else found.sequences


def _now(like: Tensor, wanted: bool) -> float:
    if wanted and like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
