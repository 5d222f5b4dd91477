"""The training of one classifier or regressor of whole sequences."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import DualformError
from dualform.series.panel import Panel
from dualform.series.plan import SCORED, Plan
from dualform.series.portable import Model
from dualform.train.optim import build_optimizer, schedule

_AT_ONCE = 2**17  # elements of a batch whose outputs are computed together


class Examples(NamedTuple):
    """Sequences, and what is to be said of them.

    Attributes:
        panel: the sequences.
        y: ``(n,)``, int64, of classes; ``(n, K)``, float, of numbers.
    """

    panel: Panel
    y: Tensor


class Look(NamedTuple):
    """How training stands.

    Attributes:
        step: updates so far.
        loss: the mean over the steps since the look before.
        held_out: the loss of the sequences that are held out; None where there are none.
    """

    step: int
    loss: float
    held_out: float | None


def train(
    model: Model,
    examples: Examples,
    plan: Plan,
    *,
    held_out: Examples | None = None,
    class_weights: Tensor | None = None,
    seed: int = 0,
    tell: Callable[[int, float], None] | None = None,
) -> list[Look]:
    """Train a model; where something is held out, it ends with the weights whose loss on that was lowest.

    Args:
        model: a ``SequenceClassifier`` or ``SequenceRegressor``.
        examples: what it learns.
        plan: for how long, and how.
        held_out: what decides when it has learned enough; it is not learned.
        class_weights: ``(classes,)``, what a sequence of each class counts.
        seed: of the order of the sequences, and of dropout. The global generator is left as it was.
        tell: called with the number of each step and its loss.

    Raises:
        DualformError: where the loss is not finite.
    """
    optimizer = build_optimizer(model, plan.optim)
    order, looks, best = _batches(len(examples.y), plan.batch, seed), [], None
    given, y = examples.panel, examples.y
    x, intervals = given.filled(), given.intervals
    every, losses = max(1, plan.steps // SCORED), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train()
        for step in range(plan.steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(plan.optim, step, step / plan.steps)
            rows = next(order)
            optimizer.zero_grad()
            part = Panel(x[rows], given.lengths[rows], None, None if intervals is None else intervals[rows])
            loss = _loss(model, part, y[rows], plan.label_smoothing, class_weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan.optim.clip)
            optimizer.step()
            losses.append(loss.item())
            _check(losses[-1], step)
            if tell is not None:
                tell(step + 1, losses[-1])
            if (step + 1) % every and step + 1 < plan.steps:
                continue
            found = None if held_out is None else held_out_loss(model, held_out, class_weights)
            looks.append(Look(step + 1, sum(losses) / len(losses), found))
            losses = []
            if found is None:
                continue
            if best is None or found < best[0]:
                best = found, len(looks), {name: t.detach().clone() for name, t in model.state_dict().items()}
            elif len(looks) - best[1] >= plan.patience:
                break
    if best is not None:
        model.load_state_dict(best[2])
    model.eval()
    return looks


def held_out_loss(model: Model, examples: Examples, class_weights: Tensor | None = None) -> float:
    """The loss of examples that are not learned, without dropout and label smoothing; the mode of the model stays."""
    was, total, count = model.training, 0.0, 0
    model.eval()
    with torch.no_grad():
        for rows in pieces(examples.panel):
            part = examples.panel.take(rows)
            part = part._replace(x=part.filled())
            loss = _loss(model, part, examples.y[rows], 0.0, class_weights)
            total, count = total + len(rows) * loss.item(), count + len(rows)
    model.train(was)
    return total / max(count, 1)


def outputs(model: Model, given: Panel, *, rate: float = 1.0) -> Tensor:
    """``(n, ...)``, what a model in float64 says of each sequence, whatever stands beside it in a batch.

    ``rate`` multiplies the step of its layers: 2 for sequences sampled half as often as those it has learned.
    """
    found = []
    with torch.inference_mode():
        for rows in pieces(given):
            part = given.take(rows)
            found.append(model(part.filled(), lengths=part.lengths, intervals=part.intervals, rate=rate)[0])
    return torch.cat(found)


def pieces(given: Panel) -> Iterator[Tensor]:
    """The numbers of the rows, in batches of a bounded size."""
    return iter(torch.arange(len(given.lengths)).split(max(1, _AT_ONCE // given.x.shape[1])))


def _loss(model: Model, given: Panel, y: Tensor, smoothing: float, class_weights: Tensor | None) -> Tensor:
    """The loss of sequences in which padding is filled."""
    lengths, longest = given.lengths, int(given.lengths.max())
    options: dict[str, Any] = {"lengths": None if int(lengths.min()) == longest else lengths}
    if given.intervals is not None:
        options["intervals"] = given.intervals[:, :longest]
    if not y.is_floating_point():
        options |= {"label_smoothing": smoothing, "class_weights": class_weights}
    return model.loss(given.x[:, :longest], y, **options)


def _batches(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Rows in random order, without end; each pass over them in an order of its own."""
    source = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        if len(left) < batch:
            left = torch.cat([left, torch.randperm(count, generator=source)])
        yield left[:batch]
        left = left[batch:]


def _check(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise DualformError(f"training: the loss is {loss} after step {step}", hint="a lower learning rate: lr=1e-3")
