"""A step in a CUDA graph."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dualform.core.tree import clone, tree_map
from dualform.ops.op import SlowBackendWarning


def captured(step: Callable[[], None], moving: Any) -> Any:
    """A graph that does what ``step`` does, or None where that cannot be captured, which is told.

    Args:
        step: reads and writes memory that stays where it is; it runs once before, so that what is compiled or chosen
            once is so by then.
        moving: a tree of all tensors that it changes; they are left as they were.
    """
    before, graph = clone(moving), torch.cuda.CUDAGraph()
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
            # What other threads do, or a collection of garbage would free, does not belong to it.
            with _without_collection(), torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                step()
        torch.cuda.current_stream().wait_stream(aside)
    except Exception as error:
        torch.cuda.synchronize()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"generation runs slower: a step could not be captured in a CUDA graph ({reason})",
            SlowBackendWarning,
            stacklevel=2,
        )
        graph = None
    tree_map(lambda now, then: now.copy_(then), moving, before)
    return graph


@contextmanager
def _without_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
