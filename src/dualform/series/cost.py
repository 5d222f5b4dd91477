"""What one more element of a stream costs, or one more sequence of a model that reads whole ones."""

import time
from collections.abc import Callable
from typing import Any

import torch

from dualform.core.tree import nbytes
from dualform.series.portable import Model

STREAMS = 1_000
_TURNS = 7
_STEPS = {1: 50, STREAMS: 2}  # in a turn, by the number of streams


def cost(model: Model, length: int) -> dict[str, Any]:
    """Measured on this machine, the fastest of some turns.

    Args:
        model: in evaluation.
        length: of the sequences that a bidirectional model reads.

    Returns:
        ``parameters``; of a causal model ``step_us`` and ``step_us_1000``, microseconds of one more element of one
        stream and of 1,000 in a batch, with what depends on the weights alone computed before, and ``state_bytes`` of
        one stream; of a bidirectional one ``sequence_us``, microseconds of one sequence, and its ``length``.
    """
    found: dict[str, Any] = {"parameters": model.parameter_count()}
    inputs = model.inputs or 1
    with torch.inference_mode():
        if not model.causal:
            x = torch.zeros(1, length, inputs)
            return {**found, "length": length, "sequence_us": _fastest(lambda: model(x), 1)}
        prepared, keys = model.prepare(), {1: "step_us", STREAMS: "step_us_1000"}
        found["state_bytes"] = nbytes(model.init_state(1))
        for streams, key in keys.items():
            x, held = torch.zeros(streams, inputs), [model.init_state(streams)]

            def step(x: torch.Tensor = x, held: list[Any] = held) -> None:
                held[0] = prepared.step(x, held[0])[1]

            found[key] = _fastest(step, _STEPS[streams])
    return found


def _fastest(run: Callable[[], Any], times: int) -> float:
    """Microseconds of a call: the fastest of some turns of ``times`` calls, after a first one."""
    run()
    taken = []
    for _ in range(_TURNS):
        begin = time.perf_counter()
        for _ in range(times):
            run()
        taken.append((time.perf_counter() - begin) / times)
    return 1e6 * min(taken)
