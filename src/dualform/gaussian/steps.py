"""A model at each step of each series: what the filter and the smoother compute with."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import matvec, symmetric_part
from dualform.core.shapes import known
from dualform.core.tree import tree_map
from dualform.gaussian.belief import Belief
from dualform.gaussian.parameters import CORES, Parameters, System


class Steps(NamedTuple):
    """The model at each step; what is constant is an expanded view. What does not move is the identity."""

    A: Tensor  # (B, T, N, N)
    c: Tensor  # (B, T, N), with B u
    Q: Tensor  # (B, T, N, N), the covariance of S eta
    C: Tensor  # (B, T, M, N)
    R: Tensor  # (B, T, M, M)
    y: Tensor  # (B, T, M), without d + D u, zero where missing
    seen: Tensor  # (B, T, M), bool


def cut(steps: Any, part: slice) -> Any:
    """The steps of a span of time, of any tree with time on axis 1."""
    return tree_map(lambda z: z[:, part], steps)


class Matrices:
    """The matrices of a model at some steps, one row per series.

    Args:
        where: the first word of an error.
        model: the parameters.
        full: the axes of the batch, whose product is the number of rows.
        start: the step that comes first, for each row; read only where a matrix varies in time.
        length: T.
        dtype: of the results.
        needed: how many of the steps are really there, for each row; None is all.
    """

    def __init__(
        self,
        where: str,
        model: Parameters,
        full: tuple[int, ...],
        start: Tensor,
        length: int,
        dtype: torch.dtype,
        needed: Tensor | None = None,
    ):
        self.where, self.model, self.full, self.length, self.dtype = where, model, full, length, dtype
        self.start, self.needed = start, needed
        self.rows = start.shape[0]

    def get(self, name: str) -> Tensor | None:
        """One of them ``(B, T, ...)``; an expanded view where it is constant."""
        value = self._rows(name)
        return None if value is None else self._expanded(value)

    def _expanded(self, value: Tensor) -> Tensor:
        return value.expand(-1, self.length, *value.shape[2:])

    def _rows(self, name: str) -> Tensor | None:
        """One of them, with a single step where it is constant."""
        value: Tensor | None = getattr(self.model, name)
        if value is None:
            return None
        value = value.to(self.dtype)
        core = value.shape[value.dim() - len(CORES[name].split()) :]
        if name not in self.model.time_varying:
            return value.expand(*self.full, *core).reshape(self.rows, 1, *core)
        longest = value.shape[-len(core) - 1]
        value = value.expand(*self.full, longest, *core).reshape(self.rows, longest, *core)
        if torch.compiler.is_compiling() or value.device.type == "meta":
            return self._gathered(value)
        needed = self.length if self.needed is None else self.needed
        last = int((self.start + needed).max()) if self.rows else 0
        if last > longest:
            raise ArgumentError(
                f"{self.where}: {name} varies in time and has {longest} steps, but step {last} is needed",
                hint=f"give {name} for all steps; more than there are observations for those that are forecast",
            )
        first = int(self.start[0]) if self.rows else 0
        if (self.start == first).all() and first + self.length <= longest:
            return value[:, first : first + self.length]
        return self._gathered(value)

    def reach(self, name: str) -> bool:
        """Whether one of them is given for these steps."""
        value: Tensor | None = getattr(self.model, name)
        if value is None or name not in self.model.time_varying or not self.rows:
            return True
        axis = value.dim() - len(CORES[name].split()) - 1
        return int(self.start.max()) + self.length <= value.shape[axis]

    def there(self, name: str) -> Tensor:
        """One that every model has."""
        found = self.get(name)
        assert found is not None
        return found

    def noise(self) -> Tensor:
        """``S Q S^T``, or Q."""
        S, Q = self._rows("S"), self._covariance("Q")
        return self._expanded(Q if S is None else symmetric_part(S @ Q @ S.mT))

    def noise_of_y(self) -> Tensor:
        """R."""
        return self._expanded(self._covariance("R"))

    def _covariance(self, name: str) -> Tensor:
        value = self._rows(name)
        assert value is not None
        return symmetric_part(value)

    def driven(self, vector: str, matrix: str, u: Tensor | None) -> Tensor | None:
        """``c + B u`` or ``d + D u``; None where there is neither."""
        constant, factor = self.get(vector), self.get(matrix)
        if factor is not None and u is not None:
            moved = matvec(factor, u)
            return moved if constant is None else constant + moved
        return constant

    def _gathered(self, value: Tensor) -> Tensor:
        index = self.start[:, None] + torch.arange(self.length, device=value.device)
        rows = torch.arange(self.rows, device=value.device)[:, None]
        return value[rows, index.clamp(0, value.shape[1] - 1)]


class Transition(NamedTuple):
    """The first half of :class:`Steps`."""

    A: Tensor  # (B, T, N, N)
    c: Tensor  # (B, T, N)
    Q: Tensor  # (B, T, N, N)


def transition(matrices: Matrices, u: Tensor | None, still: Tensor | None) -> Transition:
    """The transitions of some steps; the arguments are those of :func:`steps_of`."""
    A, Q, c = matrices.there("A"), matrices.noise(), matrices.driven("c", "B", u)
    c = A.new_zeros(1).expand(A.shape[:-1]) if c is None else c
    return standing_still(Transition(A, c, Q), still)


def standing_still(moves: Transition, still: Tensor | None) -> Transition:
    """Transitions, but the identity where a mask of their batch axes says that there is none."""
    if still is None:
        return moves
    eye = torch.eye(moves.A.shape[-1], dtype=moves.A.dtype, device=moves.A.device)
    full, line = still[..., None, None], still[..., None]
    return Transition(torch.where(full, eye, moves.A), torch.where(line, 0, moves.c), torch.where(full, 0, moves.Q))


def steps_of(matrices: Matrices, y: Tensor, u: Tensor | None, seen: Tensor, still: Tensor | None) -> Steps:
    """The model at the steps of observations.

    Args:
        matrices: of these steps.
        y: ``(B, T, M)``.
        u: inputs ``(B, T, U)``.
        seen: ``(B, T, M)``, which components are observed.
        still: ``(B, T)``, the steps that make no transition; None is none.
    """
    moved, C, R = transition(matrices, u, still), matrices.there("C"), matrices.noise_of_y()
    y, level = y.to(C.dtype), matrices.driven("d", "D", u)
    y = y if level is None else y - level
    return Steps(*moved, C, R, y if all_present(seen) else torch.where(seen, y, 0), seen)


def present(y: Tensor) -> Tensor:
    """What is not NaN; a view of one number where that can be told in one pass, and nothing is missing."""
    if known(y) and y.detach().sum().isfinite():
        return torch.ones((), dtype=torch.bool).expand(y.shape)
    return ~y.isnan()


def all_present(seen: Tensor) -> bool:
    """Whether it is known that nothing is missing."""
    return known(seen) and seen.numel() > 0 and not any(seen.stride()) and bool(seen.reshape(-1)[0])


def masked(steps: Steps) -> Steps:
    """Missing components made uninformative: zero rows of C, rows and columns of the identity in R.

    The others keep their joint distribution, and a missing one adds nothing to a log-likelihood.
    """
    return steps._replace(C=steps.C * steps.seen.unsqueeze(-1), R=noise_of_seen(steps.R, steps.seen))


def noise_of_seen(R: Tensor, seen: Tensor) -> Tensor:
    """The noise ``(..., M, M)`` of the components that a mask ``(..., M)`` marks, and the identity of the others."""
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return torch.where(seen.unsqueeze(-1) & seen.unsqueeze(-2), R, eye)


def standing(model: System, belief: Belief, length: int, keep: Tensor | None) -> Tensor | None:
    """The steps ``(B, T)`` that make no transition: padding, and under ``prior="first"`` the first of each series."""
    still = None if keep is None else ~keep
    if model.prior == "first" and length:
        fresh = belief.steps == 0
        if torch.compiler.is_compiling() or fresh.device.type == "meta" or bool(fresh.any()):
            first = torch.zeros(len(fresh), length, dtype=torch.bool, device=fresh.device)
            first[:, 0] = fresh
            still = first if still is None else still | first
    return still


def ended(tree: Any, lengths: Tensor) -> Any:
    """Values ``(B, T, ...)`` of series that have ended, as NaN from step ``lengths`` on; a list, or a tree."""

    def end(value: Tensor) -> Tensor:
        gone = torch.arange(value.shape[1], device=value.device) >= lengths[:, None]
        return value.masked_fill(gone.view(*gone.shape, *[1] * (value.dim() - 2)), torch.nan)

    return [end(value) for value in tree] if isinstance(tree, list) else tree_map(end, tree)
