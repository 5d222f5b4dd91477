"""What compiled loops over time of the Kalman filter share: memory for what they find, and what gradients read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.ops.derivatives import outline
from dualform.ops.kalman_filter import KalmanFilter, Moments

MOMENTS = ("mean", "cov", "predicted_mean", "predicted_cov")
_DIFFERENTIABLE = ("A", "c", "Q", "C", "R", "y", "mean", "cov")


class Loops(NamedTuple):
    """The loop of a backend, and its gradient; each fills the memory that it is given.

    Args:
        forward: ``(a, found)``; there are no moments in ``found`` where they are not wanted.
        backward: ``(a, moments, grads, found)``: moments are those of all steps, by name; so are the gradients of the
            outputs, without those of the moments where these are no outputs, and contiguous; ``found`` has the
            gradients that are wanted, whole.
    """

    forward: Callable[[KalmanFilter, Moments], None]
    backward: Callable[[KalmanFilter, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]], None]

    def filtered(self, a: KalmanFilter) -> list[Tensor]:
        """The outputs."""
        rows, length, _ = a.y.shape
        n, steps = a.mean.shape[-1], length if a.moments else 0
        shapes = [(rows, length), *[(rows, steps, n), (rows, steps, n, n)] * 2]
        last = (m.clone(memory_format=torch.contiguous_format) for m in (a.mean, a.cov))
        found = Moments(*(a.mean.new_empty(shape) for shape in shapes), *last)
        if a.y.numel() > 0 and n > 0:
            self.forward(a, found)
        return [*found]

    def saved(self, a: KalmanFilter) -> list[Tensor]:
        """The moments of all steps, empty, where they are not among the outputs."""
        rows, length, n = *a.y.shape[:2], a.mean.shape[-1]
        return [] if a.moments else [a.mean.new_empty(shape) for shape in [(rows, length, n), (rows, length, n, n)] * 2]

    def filtered_and_saved(self, a: KalmanFilter) -> list[Tensor]:
        """The outputs, and the moments where they are not among these."""
        if a.moments:
            return self.filtered(a)
        loglik, *moments, mean, cov = self.filtered(a._replace(moments=True))
        return [loglik, *(m[:, :0].contiguous() for m in moments), mean, cov, *moments]

    def gradients(self, grads: list[Tensor], kept: list[Tensor], a: KalmanFilter) -> dict[str, Tensor]:
        """Of an eager call, only the gradients that are wanted; the others are no numbers."""
        moments = kept[:4] if a.moments else kept[4:]
        came, expected = (
            [tuple(m.shape) for m in tensors] for tensors in (moments, self.saved(a._replace(moments=False)))
        )
        if came != expected or any(m.dtype != a.mean.dtype for m in moments):
            raise ArgumentError(f"kalman_filter_backward: the saved moments are {came}, expected {expected}")
        given = {name: getattr(a, name) for name in _DIFFERENTIABLE}
        back = {name: g.contiguous() for name, g in zip(Moments._fields, grads, strict=True)}
        if a.y.numel() == 0 or not a.mean.shape[-1]:
            zeros = {name: torch.zeros_like(m) for name, m in given.items()}
            return zeros | {"mean": back["last_mean"], "cov": back["last_cov"]}
        if not a.moments:
            back = {name: g for name, g in back.items() if name not in MOMENTS}
        wanted = [name for name, m in given.items() if m.requires_grad] or list(given)
        found = {name: given[name].new_empty(given[name].shape) for name in wanted}
        self.backward(a, {name: m.contiguous() for name, m in zip(MOMENTS, moments, strict=True)}, back, found)
        return {name: found.get(name, outline(m)) for name, m in given.items()}

    def functions(self) -> dict[str, Any]:
        """The functions of a ``Backend``."""
        return {
            "forward": self.filtered_and_saved,
            "backward": self.gradients,
            "infer": self.filtered,
            "saved": self.saved,
        }


def why_none(a: Any, most: int) -> str | None:
    """Why a loop for at most so many states does not run a call, or None."""
    if not a.y.shape[-1] or not a.mean.shape[-1]:
        return "there are no observations, or no states"
    return f"it takes {most} states" if a.mean.shape[-1] > most else None
