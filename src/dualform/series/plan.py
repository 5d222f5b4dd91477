"""How long a model of sequences is trained, and how, from what there is to train on."""

from dataclasses import dataclass

from dualform.core.errors import ArgumentError
from dualform.layers.s4d import S4DConfig
from dualform.models.config import ModelConfig
from dualform.train.recipe import Optim

BATCH = 32
LEAST_STEPS, MOST_STEPS, PASSES = 400, 20_000, 20
AUTO_SHARE, AUTO_FROM = 0.15, 400
"""What ``validation="auto"`` holds out, and from how many sequences on."""
SCORED = 20
"""How often a run looks at what is held out."""


@dataclass(frozen=True)
class Plan:
    """A run of training.

    Args:
        steps: updates of the weights.
        batch: sequences in each.
        optim: AdamW and its schedule.
        label_smoothing: of classifiers.
        patience: a run ends when the held-out loss has not fallen for this many of its :data:`SCORED` looks.
    """

    steps: int
    batch: int
    optim: Optim
    label_smoothing: float = 0.1
    patience: int = 6


def plan(sequences: int, *, steps: int | None = None, lr: float | None = None) -> Plan:
    """The plan for a number of sequences.

    A step reads 32 sequences, or all where there are fewer; 20 passes over them, at least 400 steps and at most 20,000.

    Args:
        sequences: to train on.
        steps: instead of what is chosen.
        lr: instead of 4e-3, the peak; the poles and step sizes of state space layers have lower ones of their own.
    """
    batch = min(BATCH, sequences)
    chosen = min(MOST_STEPS, max(LEAST_STEPS, PASSES * sequences // batch))
    return Plan(steps or chosen, batch, Optim(lr=lr or 4e-3, weight_decay=0.05))


def onward(sequences: int, lr: float | None) -> Plan:
    """One pass of at least ten steps over sequences that came later, at a learning rate that does not change."""
    batch = min(BATCH, sequences)
    optim = Optim(lr=(lr or 4e-3) / 4, weight_decay=0.05, warmup=0, floor=1.0)
    return Plan(max(10, -(-sequences // batch)), batch, optim)


def held_out_share(where: str, validation: float | str | None, sequences: int) -> float:
    """The share of the sequences that is held out while a model is trained.

    Raises:
        ArgumentError: for what is no share, or one of so few sequences that it is none of them.
    """
    if validation is None or validation == "auto":
        return AUTO_SHARE if validation and sequences >= AUTO_FROM else 0.0
    if isinstance(validation, str) or not 0 <= validation < 1:
        raise ArgumentError(f"{where}: validation is {validation!r}, expected a share below 1, 'auto' or None")
    if validation and not 0 < round(validation * sequences) < sequences:
        hint = "more sequences, or validation=None"
        raise ArgumentError(f"{where}: {sequences} sequences are too few to hold out {validation:g} of them", hint=hint)
    return float(validation)


def model_config(*, causal: bool) -> ModelConfig:
    """The blocks of an estimator that is given none."""
    mixer = S4DConfig(d_state=32, bidirectional=not causal)
    return ModelConfig(0, 64, {"S": (mixer,)}, "SSS", dropout=0.1)
