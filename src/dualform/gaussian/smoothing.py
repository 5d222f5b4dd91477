"""The states given all data: moments, covariances of neighbours, and draws, in a loop or a scan over time.

From some state on, forward. What the later observations say about a state is ``exp(eta^T h - h^T J h / 2)``; it is
collected from the last step back, and does not depend on any prior. Given all data, a state is then normal given the
one before it, with a kernel that inverts nothing but ``I + C J``, so that singular noise and long forecasts are as good
as any:

    h_t | h_{t-1}, y  ~  N(G h_{t-1} + g, V).

The first of these states has the moments of the filter and its (eta, J) combined, with its diffuse directions as
regressors.

Before that state, back, as Rauch, Tung and Striebel do: the next state is an observation ``A h + c + q`` of this one,
and :func:`condition` takes it one component at a time. This serves the steps whose observations have no noise given the
state before, where J would be infinite: the first one of a model without observation noise, or all where nothing has
any.

References:
    Fraser and Potter (1969), "The optimum linear smoother as a combination of two optimum linear filters"; Rauch, Tung
    and Striebel (1965), "Maximum likelihood estimates of linear dynamic systems"; Sarkka and Garcia-Fernandez (2021),
    arXiv:1905.13002, for the elements and the scans.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.elements import GaussianElement, combine_gaussian
from dualform.core.errors import ArgumentError
from dualform.core.linalg import matvec, symmetric_part
from dualform.core.scan import associative_scan
from dualform.core.tree import concat, tree_map
from dualform.gaussian.belief import Belief, Gaussian
from dualform.gaussian.conditioning import condition
from dualform.gaussian.filtering import Pass, elements_of, is_parallel_faster
from dualform.gaussian.steps import Steps, cut, masked


class Kernel(NamedTuple):
    """A state given its neighbour: ``N(G h + g, V)``."""

    G: Tensor  # (B, T, N, N)
    g: Tensor  # (B, T, N)
    V: Tensor  # (B, T, N, N)


class _States(NamedTuple):
    """What the filter knows of the states 0 .. T."""

    mean: Tensor  # (B, T + 1, N)
    cov: Tensor  # (B, T + 1, N, N)
    diffuse: Tensor  # (B, T + 1, N, K)


class Posterior(NamedTuple):
    """The states 0 .. T given all data, as a chain that starts at one of them and goes both ways."""

    back: Kernel  # (B, K, ...), of the states 0 .. K-1, each given the next one
    middle: Gaussian  # (B, ...), of the state K
    on: Kernel  # (B, T - K, ...), of the states K+1 .. T, each given the one before


def posterior(belief: Belief, found: Pass, steps: Steps, parallel: bool | None) -> Posterior:
    """The chain of the states, from what the filter found; ``parallel`` as in the filter."""
    steps, (batch, length, n) = masked(steps), found.mean.shape
    if parallel is None:
        parallel = is_parallel_faster(batch, length, n, found.mean.device)
    before = _States(
        torch.cat([belief.mean[:, None], found.mean], 1),
        torch.cat([belief.cov[:, None], found.cov], 1),
        torch.cat([belief.diffuse[:, None], found.diffuse], 1),
    )
    elements, first = _regular(found, steps)
    on, eta, J = (_collect_scan if parallel else _collect)(elements, belief.mean)
    middle = _combined(tree_map(lambda z: z[:, first], before), eta, J)
    back = _kernels_back(before, found, cut(steps, slice(first)), first)
    return Posterior(back, middle, on)


def _regular(found: Pass, steps: Steps) -> tuple[GaussianElement, int]:
    """The elements of the steps from ``first`` on: from there each observation has noise given the state before it.

    An observation that is much sharper than its prediction counts as one without noise: with the ratio ``eps^1/2`` of
    the two variances, (eta, J) would lose half of the digits.
    """
    if torch.compiler.is_compiling() or not steps.A.shape[1]:
        return elements_of(steps)[0], 0
    with torch.no_grad():
        _, root, failed = elements_of(steps)
        own = root.diagonal(dim1=-2, dim2=-1).square()
        all_of_it = ((steps.C @ found.predicted_cov) * steps.C).sum(-1) + steps.R.diagonal(dim1=-2, dim2=-1)
        sharp = (failed != 0) | ~(own > torch.finfo(own.dtype).eps ** 0.5 * all_of_it).all(-1)
        at = sharp.any(0).nonzero()
        first = int(at.max()) + 1 if len(at) else 0
    return elements_of(cut(steps, slice(first, None)))[0], first


def _collect(elements: GaussianElement, like: Tensor) -> tuple[Kernel, Tensor, Tensor]:
    """The kernels on, and (eta, J) of the state before all elements, one after the other from the last."""
    J = like.new_zeros(len(like), like.shape[-1], like.shape[-1])
    eta, kernels = J[..., 0], []
    for e in zip(*(z.flip(1).unbind(1) for z in elements), strict=True):
        kernel, eta, J = _before(GaussianElement(*e), eta, J)
        kernels.append(kernel)
    if not kernels:
        return Kernel(elements.A, elements.b, elements.C), eta, J
    return tree_map(lambda *z: torch.stack(z, 1), *kernels[::-1]), eta, J


def _collect_scan(elements: GaussianElement, like: Tensor) -> tuple[Kernel, Tensor, Tensor]:
    """The same by a scan for (eta, J) of every state, and then all kernels at once."""
    if not elements.b.shape[1]:
        return _collect(elements, like)
    later = associative_scan(lambda b, a: combine_gaussian(a, b), elements, reverse=True)
    eta, J = (torch.cat([z[:, 1:], torch.zeros_like(z[:, :1])], 1) for z in (later.eta, later.J))
    kernels, eta, J = _before(elements, eta, J)
    return kernels, eta[:, 0], J[:, 0]


def _before(e: GaussianElement, eta: Tensor, J: Tensor) -> tuple[Kernel, Tensor, Tensor]:
    """The kernel of a state given the one before it, and (eta, J) of that one; sums of squares in both."""
    eye = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device).expand_as(J)
    right = torch.cat([e.A, e.C, (e.b + matvec(e.C, eta)).unsqueeze(-1), eye], -1)
    solved, _ = torch.linalg.solve_ex(eye + e.C @ J, right)
    n = J.shape[-1]
    G, half, g, left = solved.split([n, n, 1, n], -1)
    V = symmetric_part(left @ e.C @ left.mT) + symmetric_part(half @ J @ half.mT)
    JG = J @ G
    before = symmetric_part(G.mT @ JG) + symmetric_part(JG.mT @ e.C @ JG) + e.J
    return Kernel(G, g.squeeze(-1), V), matvec(G.mT, eta - matvec(J, e.b)) + e.eta, before


def _combined(before: _States, eta: Tensor, J: Tensor) -> Gaussian:
    """The moments of a state from what the past and what the future say; its diffuse directions by least squares."""
    mean, P, Z = before
    n = J.shape[-1]
    eye = torch.eye(n, dtype=J.dtype, device=J.device).expand_as(J)
    right = torch.cat([P, Z, (mean + matvec(P, eta)).unsqueeze(-1), eye], -1)
    solved, _ = torch.linalg.solve_ex(eye + P @ J, right)
    half, T, m, left = solved.split([n, Z.shape[-1], 1, n], -1)
    m, cov = m.squeeze(-1), symmetric_part(left @ P @ left.mT) + symmetric_part(half @ J @ half.mT)
    if not Z.shape[-1]:
        return Gaussian(m, cov)
    # Z^T J T is the information on the directions; a column of zeros is none, and stays at zero
    none = (Z.detach() == 0).all(-2)
    information = symmetric_part(Z.mT @ J @ T) + torch.diag_embed(none.to(Z.dtype))
    score = matvec(T.mT, eta - matvec(J, mean)).unsqueeze(-1)
    solved, _ = torch.linalg.solve_ex(information, torch.cat([score, T.mT], -1))
    return Gaussian(m + matvec(T, solved[..., 0]), cov + symmetric_part(T @ solved[..., 1:]))


def _kernels_back(before: _States, found: Pass, steps: Steps, count: int) -> Kernel:
    """Of the first ``count`` states, each given the next one."""
    mean, cov, Z = (z[:, :count] for z in before)
    n = mean.shape[-1]
    eye = torch.eye(n, dtype=mean.dtype, device=mean.device)
    after = condition(torch.zeros_like(cov), cov, Z, steps.A, steps.Q, eye.expand(*steps.Q.shape[:2], n, n))
    V = after.cov
    if Z.shape[-1]:  # what neither the next state nor the data determine
        V = V + torch.diag_embed(torch.where((after.diffuse != 0).any(-1), torch.inf, 0.0).to(V.dtype))
    return Kernel(after.mean, mean - matvec(after.mean, found.predicted_mean[:, :count]), V)


def moments(chain: Posterior, parallel: bool | None) -> tuple[Gaussian, Tensor]:
    """The moments of the states 0 .. T given all data, and ``Cov(h_t, h_{t-1})`` for t = 1 .. T."""
    batch, length, n = chain.on.g.shape
    if parallel is None:
        parallel = is_parallel_faster(batch, length, n, chain.on.g.device)
    run = _scan if parallel else _loop
    back = run(tree_map(lambda z: z.flip(1), chain.back), chain.middle)
    back, on = tree_map(lambda z: z.flip(1), back), run(chain.on, chain.middle)
    lag = torch.cat([back.cov[:, 1:] @ chain.back.G.mT, chain.on.G @ on.cov[:, :-1]], 1)
    return concat([back, tree_map(lambda z: z[:, 1:], on)], 1), lag


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


def _loop(kernels: Kernel, start: Gaussian) -> Gaussian:
    """The moments of a chain, its start included."""
    mean, cov = start
    found = [start]
    for G, g, V in zip(*(z.unbind(1) for z in kernels), strict=True):
        mean, cov = matvec(G, mean) + g, symmetric_part(G @ cov @ G.mT) + V
        found.append(Gaussian(mean, cov))
    return tree_map(lambda *z: torch.stack(z, 1), *found)


def _scan(kernels: Kernel, start: Gaussian) -> Gaussian:
    first = Kernel(torch.zeros_like(start.cov)[:, None], start.mean[:, None], start.cov[:, None])
    out = associative_scan(_chained, concat([first, kernels], 1))
    return Gaussian(out.g, out.V)


def _chained(earlier: Kernel, later: Kernel) -> Kernel:
    V = symmetric_part(later.G @ earlier.V @ later.G.mT) + later.V
    return Kernel(later.G @ earlier.G, matvec(later.G, earlier.g) + later.g, V)


@torch.no_grad()
def draw(chain: Posterior, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` paths of the states 1 .. T from their joint posterior, ``(count, B, T, N)``."""

    def noise(cov: Tensor) -> Tensor:
        values = torch.randn(count, *cov.shape[:-1], generator=generator, dtype=cov.dtype, device=cov.device)
        return matvec(root(cov), values)

    def walk(kernels: Kernel, h: Tensor) -> list[Tensor]:
        path, moved = [], noise(kernels.V)
        for t in range(kernels.g.shape[1]):
            h = matvec(kernels.G[:, t], h) + kernels.g[:, t] + moved[:, :, t]
            path.append(h)
        return path

    middle = chain.middle.mean + noise(chain.middle.cov)
    back = walk(tree_map(lambda z: z.flip(1), chain.back), middle)
    path = [*back[::-1], middle, *walk(chain.on, middle)][1:]
    return torch.stack(path, 2) if path else middle.new_zeros(*middle.shape[:2], 0, middle.shape[-1])


def root(cov: Tensor) -> Tensor:
    """A square root ``L L^T`` of a covariance that may be singular."""
    values, vectors = torch.linalg.eigh(symmetric_part(cov))
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
