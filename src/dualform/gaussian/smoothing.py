"""The Rauch-Tung-Striebel smoother, and draws from the posterior: from the last state back, by one kernel per step.

Given the next state, a state is normal and does not depend on later data:

    h_t | h_{t+1}, y_1 .. y_t  ~  N(m_t + G_t (h_{t+1} - A m_t - c), V_t).

The next state is an observation ``A h + c + q`` of this one, so G and V come from :func:`condition`, one component of
the next state at a time. A component that says nothing new, as where Q is singular, is left out; no covariance is
inverted, and a diffuse direction is determined by the next state as it would be by data.

References:
    Rauch, Tung and Striebel (1965), "Maximum likelihood estimates of linear dynamic systems"; Sarkka and
    Garcia-Fernandez (2021), arXiv:1905.13002, section IV.C, for the scan.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import matvec, symmetric_part
from dualform.core.scan import associative_scan
from dualform.core.tree import concat, tree_map
from dualform.gaussian.belief import Belief, Gaussian
from dualform.gaussian.conditioning import condition
from dualform.gaussian.filtering import Pass, is_parallel_faster
from dualform.gaussian.steps import Steps


class Kernel(NamedTuple):
    """A state given the next one: ``N(G h + g, V)``."""

    G: Tensor  # (B, T, N, N)
    g: Tensor  # (B, T, N)
    V: Tensor  # (B, T, N, N)


def combine_kernels(later: Kernel, earlier: Kernel) -> Kernel:
    """First back by ``later``, then by ``earlier``."""
    return Kernel(
        earlier.G @ later.G,
        matvec(earlier.G, later.g) + earlier.g,
        symmetric_part(earlier.G @ later.V @ earlier.G.mT) + earlier.V,
    )


def kernels(belief: Belief, found: Pass, steps: Steps) -> Kernel:
    """Of the states before each step, given the states at it: T kernels, the first for the belief before all data."""
    mean, cov, Z = (
        torch.cat([first[:, None], rest], 1)[:, :-1]
        for first, rest in ((belief.mean, found.mean), (belief.cov, found.cov), (belief.diffuse, found.diffuse))
    )
    n = mean.shape[-1]
    eye = torch.eye(n, dtype=mean.dtype, device=mean.device)
    Q, A = (z[:, :1] if z.shape[1] and z.stride(1) == 0 else z for z in (steps.Q, steps.A))
    after = condition(torch.zeros_like(cov), cov, Z, A, Q, eye.expand(*Q.shape[:2], n, n))
    V = after.cov
    if Z.shape[-1]:  # what neither the next state nor the data determine
        V = V + torch.diag_embed(torch.where((after.diffuse != 0).any(-1), torch.inf, 0.0).to(V.dtype))
    return Kernel(after.mean, mean - matvec(after.mean, found.predicted_mean), V)


def smooth_back(back: Kernel, found: Pass, last: Belief, parallel: bool | None) -> tuple[Gaussian, Tensor]:
    """The moments of the states 0 .. T given all data, and ``Cov(h_t, h_{t-1})`` for t = 1 .. T."""
    batch, length, n = back.g.shape
    end = Gaussian(found.mean[:, -1], found.cov[:, -1]) if length else Gaussian(last.mean, last.cov)
    if parallel is None:
        parallel = is_parallel_faster(batch, length, n, back.g.device)
    out = _scan(back, end) if parallel else _loop(back, end)
    return out, out.cov[:, 1:] @ back.G.mT


def check_determined(where: str, last: Belief) -> None:
    """Raise where the data leave a direction diffuse."""
    if torch.compiler.is_compiling() or not last.diffuse.any():
        return
    row = int((last.diffuse != 0).flatten(1).any(1).nonzero()[0])
    left = int((last.diffuse[row] != 0).any(0).sum())
    raise ArgumentError(
        f"{where}: the observations of row {row} leave {left} diffuse directions of the state undetermined",
        hint="a diffuse start needs at least as many observed numbers as diffuse states; or give P0 a covariance",
    )


def _loop(back: Kernel, last: Gaussian) -> Gaussian:
    mean, cov = last.mean, last.cov
    found = [Gaussian(mean, cov)]
    for G, g, V in zip(*(z.flip(1).unbind(1) for z in back), strict=True):
        mean, cov = matvec(G, mean) + g, symmetric_part(G @ cov @ G.mT) + V
        found.append(Gaussian(mean, cov))
    return tree_map(lambda *z: torch.stack(z, 1), *found[::-1])


def _scan(back: Kernel, last: Gaussian) -> Gaussian:
    end = Kernel(torch.zeros_like(last.cov)[:, None], last.mean[:, None], last.cov[:, None])
    out = associative_scan(combine_kernels, concat([back, end], 1), reverse=True)
    return Gaussian(out.g, out.V)


@torch.no_grad()
def draw(back: Kernel, found: Pass, last: Belief, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` paths of the states 1 .. T from their joint posterior, ``(count, B, T, N)``.

    Args:
        back: of :func:`kernels`.
        found: by the filter.
        last: the belief after all data.
        count: how many.
        generator: of the randomness.
    """
    rows, length, n = back.g.shape

    def noise(cov: Tensor) -> Tensor:
        values = torch.randn(count, rows, n, generator=generator, dtype=cov.dtype, device=cov.device)
        return matvec(root(cov), values)

    end = Gaussian(found.mean[:, -1], found.cov[:, -1]) if length else last
    h, path = end.mean + noise(end.cov), []
    for t in range(length - 1, -1, -1):
        path.append(h)
        if t:
            h = matvec(back.G[:, t], h) + back.g[:, t] + noise(back.V[:, t])
    return torch.stack(path[::-1], 2) if path else h.new_zeros(count, rows, 0, n)


def root(cov: Tensor) -> Tensor:
    """A square root ``L L^T`` of a covariance that may be singular."""
    values, vectors = torch.linalg.eigh(symmetric_part(cov))
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
