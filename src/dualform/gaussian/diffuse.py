"""The steps of a Kalman filter while a direction of its state is diffuse."""

import math

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.tree import concat, tree_map
from dualform.gaussian.augmented import augmented, is_lost
from dualform.gaussian.belief import Belief
from dualform.gaussian.conditioning import condition
from dualform.gaussian.passes import Blame, Found, Pass, check_steps, directions, predict
from dualform.gaussian.steps import Steps, cut, masked


def opened(steps: Steps, belief: Belief, counted: bool, blame: Blame) -> tuple[list[Pass], Steps, Belief]:
    """The steps while a direction is diffuse in any row, those that are left, and the belief between them.

    Where their covariances become too large for the digits, more steps are taken, with a regression on the directions
    (:mod:`dualform.gaussian.augmented`).
    """
    compiling = torch.compiler.is_compiling()
    head, rest, state = [], steps, belief
    for regress in (False,) if compiling else (True, False):
        head, rest, state, lost = [], steps, belief, False
        while rest.A.shape[1] and belief.diffuse.shape[-1]:
            now = masked(cut(rest, slice(1)))
            before = predict(state, tree_map(lambda z: z[:, 0], now))
            if not compiling:
                open_rows = state.diffuse.flatten(1).any(1)
                lost = lost or (regress and not open_rows.all() and is_lost(before, now))
                if not open_rows.any():
                    break
            try:
                out, state = update_diffuse(before, now, counted, blame, len(head), check=not lost)
            except ArgumentError:
                if not regress:
                    raise
                lost = True
                out, state = update_diffuse(before, now, counted, blame, len(head), check=False)
            head.append(out)
            rest = cut(rest, slice(1, None))
        if not lost:
            break
        if (found := _regressed(steps, belief, counted, head)) is not None:
            head, rest, state = found
            break
    if rest.A.shape[1]:
        state = state._replace(diffuse=directions(state.diffuse))
    return head, rest, state


def _regressed(
    steps: Steps, belief: Belief, counted: bool, head: list[Pass]
) -> tuple[list[Pass], Steps, Belief] | None:
    """The same from a regression, after the last step without noise; a row that is diffuse at a step keeps what it had.

    None where the regression cannot determine all directions.
    """
    found, first, blocked = None, 0, 1
    while blocked and first < len(head):
        at = head[first - 1] if first else None
        start = belief if at is None else Belief(at.mean[:, 0], at.cov[:, 0], belief.steps, at.diffuse[:, 0])
        found, blocked = augmented(cut(steps, slice(first, None)), start, counted)
        first += blocked
    count = 0 if found is None else first + found.total.shape[1]
    if found is None or count < len(head) or head[-1].diffuse.any():
        return None
    old = concat(head, 1)
    later = count - len(head)
    known, before = (~(z != 0).flatten(2).any(-1)[:, first:] for z in (old.diffuse, old.predicted_diffuse))
    known, before = (torch.cat([z, z.new_ones(len(z), later)], 1) for z in (known, before))

    def joined(earlier: Tensor, new: Tensor, where: Tensor) -> Tensor:
        """Of both, the new one where it is known."""
        there = earlier[:, first:]
        there = torch.cat([there, there.new_zeros(len(there), later, *there.shape[2:])], 1)
        return torch.cat(
            [earlier[:, :first], torch.where(where.view(*where.shape, *[1] * (new.dim() - 2)), new, there)], 1
        )

    sums = old.loglik.cumsum(1)
    base = sums[:, first - 1 : first] if first else sums.new_zeros(len(sums), 1)
    none = old.diffuse.new_zeros(len(sums), count, *old.diffuse.shape[2:])
    made = Pass(
        joined(old.mean, found.mean, known),
        joined(old.cov, found.cov, known),
        joined(old.diffuse, none[:, first:], known),
        joined(old.predicted_mean, found.predicted_mean, before),
        joined(old.predicted_cov, found.predicted_cov, before),
        joined(old.predicted_diffuse, none[:, first:], before),
        joined(sums, base + found.total, known).diff(dim=1, prepend=torch.zeros_like(base)),
    )
    last = Belief(made.mean[:, -1], made.cov[:, -1], belief.steps, none[:, 0])
    return [cut(made, slice(t, t + 1)) for t in range(count)], cut(steps, slice(count, None)), last


def update_diffuse(
    before: Belief, steps: Steps, counted: bool, blame: Blame, start: int | None, check: bool = True
) -> tuple[Pass, Belief]:
    """The update of one step, which has a time axis of length 1, by the exact diffuse filter."""
    mean, cov, Z = (z[:, None] for z in (before.mean, before.cov, before.diffuse))
    after = condition(mean.unsqueeze(-1), cov, Z, steps.C, steps.R, steps.y.unsqueeze(-1))
    numbers = steps.seen.to(cov.dtype).sum(-1) - (0 if counted else after.resolved)
    loglik = -(after.distance + after.log_det + numbers * math.log(2 * math.pi)) / 2
    now = after.mean.squeeze(-1)
    if check:
        check_steps(Found(now, after.cov, loglik, mean, cov), after.failed, steps, blame, start)
    out = Pass(now, after.cov, after.diffuse, mean, cov, Z, loglik)
    return out, before._replace(mean=now[:, 0], cov=after.cov[:, 0], diffuse=after.diffuse[:, 0])
