"""A training step without launch overhead: blocks compiled, forward and backward captured in CUDA graphs."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from dualform.models.lm import LanguageModel
from dualform.ops.op import SlowBackendWarning


def capture(
    objective: nn.Module, model: LanguageModel, sample: Tensor, bfloat16: bool, portions: int = 1
) -> tuple[Callable[[Tensor], Tensor], bool]:
    """The objective as two CUDA graphs, for inputs of one shape; where that fails, unchanged and with a warning.

    The blocks are compiled first, all that are alike at once. Outside of a captured call, run the model under
    :func:`as_written`, so that another shape does not compile it again.

    Args:
        objective: ``windows -> loss``; what the backward reaches are its parameters.
        model: the one inside.
        sample: windows of the shape of all to come.
        bfloat16: whether to run under autocast.
        portions: calls whose gradients are to add up.

    Returns:
        What to call, and whether it was captured.
    """
    try:
        for block in model.blocks:
            block.compile()
        with torch.autocast("cuda", torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            graphed = torch.cuda.make_graphed_callables(objective, (sample,), allow_unused_input=True)
        _expect_gradients_from_graphs()
        if portions > 1:
            for parameter in model.parameters():
                _own_gradient(parameter)
        return cast("Callable[[Tensor], Tensor]", graphed), True
    except Exception as error:
        torch.cuda.synchronize()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"training runs slower: a step could not be captured in a CUDA graph ({reason}); "
            "graphs=false skips the attempt",
            SlowBackendWarning,
            stacklevel=2,
        )
        for block in model.blocks:
            block._compiled_call_impl = None
        return objective, False


def _own_gradient(parameter: nn.Parameter) -> None:
    """Keep the memory of a graph out of ``parameter.grad``.

    A replay returns its gradients in the same memory every time, and PyTorch takes a first gradient as it is: the next
    portion of a step would write over it, and then be added to itself.
    """
    if parameter.requires_grad:
        parameter.register_hook(lambda gradient: gradient.clone() if parameter.grad is None else None)


def _expect_gradients_from_graphs() -> None:
    """Do without PyTorch's warning that gradients are accumulated on the stream of the capture.

    The captured outputs keep the nodes that accumulate, made on that stream; a replay waits for it, so the gradients
    are right.
    """
    if warn := getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None):
        warn(False)


def as_written(captured: bool) -> AbstractContextManager[None]:
    """Compiled blocks run uncompiled here."""
    return torch.compiler.set_stance("force_eager") if captured else nullcontext()
