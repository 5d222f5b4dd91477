"""The models of an estimator: made, trained one beside the other, and read together."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.models.heads import SequenceClassifier
from dualform.series.calibration import calibrate
from dualform.series.panel import Panel
from dualform.series.plan import Plan
from dualform.series.portable import Model, build, from_arrays, to_arrays
from dualform.series.split import held_out_rows
from dualform.series.training import Examples, Look, outputs, train


class Task(NamedTuple):
    """What the members of an estimator have in common.

    Attributes:
        config: of the blocks, as JSON values.
        head: options of the model, as JSON values.
        examples: to learn from.
        share: of these which each member holds out, another part for each.
        plan: of its training.
        class_weights: of the loss; None for none.
    """

    config: dict[str, Any]
    head: dict[str, Any]
    examples: Examples
    share: float
    plan: Plan
    class_weights: Tensor | None


class Member(NamedTuple):
    """A trained model and how it came about."""

    model: dict[str, Any]  # as dualform.series.portable has it: it may come from another process
    looks: list[Look]


def train_member(task: Task, seed: int, tell: Callable[[int, float], None] | None = None) -> Member:
    """Make a model and train it; what a classifier holds out says, too, how sure it may be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(task.config, task.head)
    learned, held = split(task.examples, task.share, seed)
    scale(model, learned.panel)
    options = {"held_out": held, "class_weights": task.class_weights, "seed": seed, "tell": tell}
    looks = train(model, learned, task.plan, **options)
    if held is not None and isinstance(model, SequenceClassifier):
        calibrate(model, outputs(exact([model])[0], held.panel), held.y)
    return Member(to_arrays(model), looks)


def scale(model: Model, given: Panel) -> None:
    """Set the scales of a model's inputs to those of some sequences."""
    model.fit_inputs(given.filled(), lengths=given.lengths, intervals=given.intervals)


def split(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples | None]:
    """What is learned and what is held out."""
    held = held_out_rows(examples.y, share, seed)
    if not len(held):
        return examples, None
    keep = torch.ones(len(examples.y), dtype=torch.bool)
    keep[held] = False
    learned = keep.nonzero()[:, 0]
    first, second = (Examples(examples.panel.take(rows), examples.y[rows]) for rows in (learned, held))
    return first, second


def train_members(task: Task, seeds: list[int], jobs: int | None, tell: Callable[[float], None]) -> list[Member]:
    """Train a member for each seed, in processes where ``jobs`` is not 1.

    Args:
        task: theirs.
        seeds: one for each.
        jobs: how many at once, as scikit-learn counts them.
        tell: called with the share of all the work that is done.
    """

    def telling(done: int) -> Callable[[int, float], None]:
        return lambda step, _: tell((done + step / task.plan.steps) / len(seeds))

    if jobs in (None, 1) or len(seeds) == 1:
        return [train_member(task, seed, telling(done)) for done, seed in enumerate(seeds)]
    from sklearn.utils.parallel import Parallel, delayed

    found: Any = Parallel(n_jobs=jobs, return_as="generator")(delayed(train_member)(task, seed) for seed in seeds)
    members = []
    for member in found:
        members.append(member)
        tell(len(members) / len(seeds))
    return members


def exact(models: list[Model]) -> list[Model]:
    """Copies in float64: what they say of a sequence does not depend on what stands beside it."""
    return [copy.deepcopy(model).double() for model in models]


def mean_outputs(models: list[Model], given: Panel, rate: float, of: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over models of a function of their outputs, in float64."""
    return torch.stack([of(outputs(model, given, rate=rate)) for model in exact(models)]).mean(0)


def loaded(members: list[dict[str, Any]]) -> list[Model]:
    """The models of several members."""
    return [from_arrays(member) for member in members]
