"""The states given all data: moments, covariances of neighbours, and draws, in a loop or a scan over time.

From some state on, forward. What the later observations say about a state is ``exp(eta^T h - h^T J h / 2)``; it is
collected from the last step back, and does not depend on any prior. Given all data, a state is then normal given the
one before it, with a kernel that inverts nothing but ``I + C J``, so that singular noise and long forecasts are as good
as any:

    h_t | h_{t-1}, y  ~  N(G h_{t-1} + g, V).

The first of these states has the moments of the filter and its (eta, J) combined, with its diffuse directions as
regressors.

Up to the last step whose observation has next to no noise given the state before, J would be infinite, or errors of the
chain would grow: that is the first one of an autoregression, all of a moving average that is not invertible, or all
where nothing has noise. There the innovations of the filter are carried back (Bryson and Frazier), which divides by
their covariance alone; and the states that are diffuse still follow from the next one, which is an observation ``A h +
c + q`` of them (Rauch, Tung and Striebel).

Where no gradient is wanted, the moments come from a compiled loop, :mod:`dualform.ops.kalman_smoother`, which on a GPU
is not the faster form of few and long series.

References:
    Fraser and Potter (1969), "The optimum linear smoother as a combination of two optimum linear filters"; Bryson and
    Frazier (1963), "Smoothing for linear and nonlinear dynamic systems"; Durbin and Koopman (2002), "A simple and
    efficient simulation smoother for state space time series analysis"; Rauch, Tung and Striebel (1965), "Maximum
    likelihood estimates of linear dynamic systems"; Sarkka and Garcia-Fernandez (2021), arXiv:1905.13002, for the
    elements and the scans.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.elements import GaussianElement, combine_gaussian, sharpened
from dualform.core.errors import ArgumentError
from dualform.core.linalg import covariance_root, matvec, root_solve, symmetric_part
from dualform.core.scan import associative_scan
from dualform.core.tree import concat, tree_map
from dualform.gaussian.belief import Belief, Gaussian
from dualform.gaussian.conditioning import condition
from dualform.gaussian.diffuse import opened
from dualform.gaussian.filtering import elements_of, is_kernel_faster, is_parallel_faster, own_root
from dualform.gaussian.passes import Pass
from dualform.gaussian.steps import Steps, cut, masked
from dualform.ops.kalman_smoother import KalmanSmoother, has_kernel, kalman_smoother_op


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
    """The states 0 .. T given all data: the moments of some, and chains from there in both directions."""

    back: Kernel  # (B, K, ...), of the states 0 .. K-1, each given the next one
    middle: Gaussian  # (B, L, ...), of the states K .. K+L-1
    lag: Tensor  # (B, L - 1, N, N), the covariances of neighbours among these
    on: Kernel  # (B, T - K - L + 1, ...), of the states K+L .. T, each given the one before


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
    collect = _collect_scan if parallel else _collect
    on, eta, J = collect(elements, belief.mean)
    more = 0 if torch.compiler.is_compiling() else _last(sharpened(J, before.cov[:, first:]))
    if more:  # once more, so that no gradient passes through numbers without meaning
        first += more
        on, eta, J = collect(elements_of(cut(steps, slice(first, None))), belief.mean)
    eta, J = eta[:, 0], J[:, 0]
    reached = tree_map(lambda z: z[:, first], before)
    middle, lag = tree_map(lambda z: z[:, None], _combined(reached, eta, J)), J[:, None][:, :0]
    diffuse = 0 if not first else int((before.diffuse[:, :first] != 0).flatten(2).any(-1).any(0).sum())
    if diffuse < first:
        sharp = slice(diffuse, first)
        run = _scan if parallel else _loop
        end = _adjoint(reached, eta, J)
        earlier, lag = _carried(cut(before, sharp), cut(found, sharp), cut(steps, sharp), end, run)
        middle = concat([earlier, middle], 1)
    back = _kernels_back(before, found, cut(steps, slice(diffuse)), diffuse)
    return Posterior(back, middle, lag, on)


def _regular(found: Pass, steps: Steps) -> tuple[GaussianElement, int]:
    """The elements of the steps from ``first`` on: from there each observation has noise given the state before it.

    An observation that is much sharper than any prediction of it counts as one without noise: with the ratio
    ``eps^1/2`` of the two variances, (eta, J) would lose half of the digits.
    """
    if torch.compiler.is_compiling() or not steps.A.shape[1]:
        return elements_of(steps), 0
    with torch.no_grad():
        root, failed = own_root(steps)
        own = root.diagonal(dim1=-2, dim2=-1).square()
        all_of_it = ((steps.C @ found.predicted_cov) * steps.C).sum(-1) + steps.R.diagonal(dim1=-2, dim2=-1)
        least = torch.where(steps.seen, all_of_it, torch.inf).amin(1, keepdim=True)
        noisy = (own > torch.finfo(own.dtype).eps ** 0.5 * least) | ~steps.seen
        sharp = (failed != 0) | ~noisy.all(-1)
        first = _last(sharp)
    return elements_of(cut(steps, slice(first, None))), first


def _last(mask: Tensor) -> int:
    """How many steps there are up to the last one of any row that a mask ``(B, T)`` holds."""
    at = mask.any(0).nonzero()
    return int(at.max()) + 1 if len(at) else 0


def _collect(elements: GaussianElement, like: Tensor) -> tuple[Kernel, Tensor, Tensor]:
    """The kernels on, and (eta, J) of the states before, between and after the elements, from the last one back."""
    J = like.new_zeros(len(like), like.shape[-1], like.shape[-1])
    eta, kernels = J[..., 0], []
    etas, Js = [eta], [J]
    for e in zip(*(z.flip(1).unbind(1) for z in elements), strict=True):
        kernel, eta, J = _before(GaussianElement(*e), eta, J)
        kernels.append(kernel)
        etas.append(eta)
        Js.append(J)
    on = Kernel(elements.A, elements.b, elements.C)
    if kernels:
        on = tree_map(lambda *z: torch.stack(z, 1), *kernels[::-1])
    return on, torch.stack(etas[::-1], 1), torch.stack(Js[::-1], 1)


def _collect_scan(elements: GaussianElement, like: Tensor) -> tuple[Kernel, Tensor, Tensor]:
    """The same by a scan for (eta, J) of every state, and then all kernels at once."""
    if not elements.b.shape[1]:
        return _collect(elements, like)
    later = associative_scan(lambda b, a: combine_gaussian(a, b), elements, reverse=True)
    eta, J = (torch.cat([z[:, 1:], torch.zeros_like(z[:, :1])], 1) for z in (later.eta, later.J))
    on, first_eta, first_J = _before(elements, eta, J)
    return on, torch.cat([first_eta[:, :1], eta], 1), torch.cat([first_J[:, :1], J], 1)


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


def _adjoint(reached: _States, eta: Tensor, J: Tensor) -> Gaussian:
    """(eta, J) seen from the moments of the filter: r and N with the smoothed moments ``m + P r`` and ``P - P N P``."""
    eye = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device).expand_as(J)
    left, _ = torch.linalg.solve_ex(eye + reached.cov @ J, eye)
    return Gaussian(matvec(left.mT, eta - matvec(J, reached.mean)), symmetric_part(J @ left))


def _carried(
    before: _States, found: Pass, steps: Steps, end: Gaussian, run: Callable[[Kernel, Gaussian], Gaussian]
) -> tuple[Gaussian, Tensor]:
    """The moments of the states before some steps, and the covariances of neighbours, from r and N after these."""
    A, C, P = steps.A, steps.C, found.predicted_cov
    CP, CA = C @ P, C @ A
    root, _ = covariance_root(symmetric_part(CP @ C.mT) + steps.R)
    left = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) - root_solve(CP, root).mT @ C
    v = (steps.y - matvec(C, found.predicted_mean)).unsqueeze(-1)
    kernels = Kernel(
        (left @ A).mT,
        (CA.mT @ root_solve(v, root)).squeeze(-1),
        symmetric_part(CA.mT @ root_solve(CA, root)),
    )
    r, N = tree_map(lambda z: z.flip(1), run(tree_map(lambda z: z.flip(1), kernels), end))
    mean = before.mean + matvec(before.cov, r[:, :-1])
    cov = before.cov - symmetric_part(before.cov @ N[:, :-1] @ before.cov)
    seen = C.mT @ root_solve(C, root) + left.mT @ N[:, 1:] @ left
    moved = A @ before.cov
    return Gaussian(mean, cov), moved - P @ symmetric_part(seen) @ moved


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


def by_kernel(
    belief: Belief, steps: Steps, counted: bool, parallel: bool | None
) -> tuple[Gaussian, Tensor, Tensor] | None:
    """The moments of the states 0 .. T, covariances of neighbours, and terms of the likelihood, from a compiled loop.

    The states that are diffuse in any row follow from the first that is in none. None where no kernel runs the call,
    where the scan is faster (for ``parallel=None``), where a gradient is wanted, where a step fails, or where a
    direction is diffuse to the end: other forms say why.
    """
    batch, length, n = steps.A.shape[:3]
    if parallel or (parallel is None and not is_kernel_faster(batch, length, n, steps.A.device, True)):
        return None
    head, rest, state = opened(steps, belief, counted, lambda: None)
    a = KalmanSmoother(*rest, state.mean, state.cov)
    regressed = bool(head) and not head[-1].predicted_diffuse.any()  # states before it cannot follow from later ones
    if not rest.A.shape[1] or regressed or not has_kernel(a):
        return None
    loglik, mean, cov, lag, *first = kalman_smoother_op(a)
    if not loglik.sum().isfinite():
        return None
    middle = Gaussian(*(torch.cat([z[:, None], more], 1) for z, more in zip(first, (mean, cov), strict=True)))
    if not head:
        return middle, lag, loglik
    found = concat(head, 1)
    parts = zip((belief.mean, belief.cov, belief.diffuse), (found.mean, found.cov, found.diffuse), strict=True)
    before = _States(*(torch.cat([z[:, None], more], 1) for z, more in parts))
    back = _kernels_back(before, found, cut(steps, slice(len(head))), len(head))
    none = tree_map(lambda z: z[:, :0], back)
    states, lag = moments(Posterior(back, middle, lag, none), parallel=False)
    return states, lag, torch.cat([found.loglik, loglik], 1)


def moments(chain: Posterior, parallel: bool | None) -> tuple[Gaussian, Tensor]:
    """The moments of the states 0 .. T given all data, and ``Cov(h_t, h_{t-1})`` for t = 1 .. T."""
    batch, length, n = chain.on.g.shape
    if parallel is None:
        parallel = is_parallel_faster(batch, length, n, chain.on.g.device)
    run = _scan if parallel else _loop
    first, last = (tree_map(lambda z, i=i: z[:, i], chain.middle) for i in (0, -1))
    back = tree_map(lambda z: z.flip(1), run(tree_map(lambda z: z.flip(1), chain.back), first))
    on = run(chain.on, last)
    lag = torch.cat([back.cov[:, 1:] @ chain.back.G.mT, chain.lag, chain.on.G @ on.cov[:, :-1]], 1)
    return concat([cut(back, slice(-1)), chain.middle, cut(on, slice(1, None))], 1), lag


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


def is_chain(chain: Posterior) -> bool:
    """Whether the states 1 .. T are a chain from one of them; else :func:`draw` cannot draw them."""
    return chain.middle.mean.shape[1] - (not chain.back.g.shape[1]) <= 1


@torch.no_grad()
def draw(chain: Posterior, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` paths of the states 1 .. T from their joint posterior, ``(count, B, T, N)``."""

    def noise(cov: Tensor) -> Tensor:
        return normal(cov, (count, *cov.shape[:-1]), generator)

    def walk(kernels: Kernel, h: Tensor) -> list[Tensor]:
        path, moved = [], noise(kernels.V)
        for t in range(kernels.g.shape[1]):
            h = matvec(kernels.G[:, t], h) + kernels.g[:, t] + moved[:, :, t]
            path.append(h)
        return path

    start = tree_map(lambda z: z[:, -1], chain.middle)
    middle = start.mean + noise(start.cov)
    back = walk(tree_map(lambda z: z.flip(1), chain.back), middle)
    path = [*back[::-1], middle, *walk(chain.on, middle)]
    path = path if chain.middle.mean.shape[1] > 1 else path[1:]  # without the state 0
    return torch.stack(path, 2) if path else middle.new_zeros(*middle.shape[:2], 0, middle.shape[-1])


@torch.no_grad()
def simulate(belief: Belief, steps: Steps, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """States 1 .. T ``(count B, T, N)`` and observations of them, with diffuse directions at 0; no gradients."""
    rows = len(belief.mean)
    h, states = belief.mean + normal(belief.cov, (count, rows, belief.mean.shape[-1]), generator), []
    q, e = (normal(z, (count, *z.shape[:-1]), generator) for z in (steps.Q, steps.R))
    for t in range(steps.A.shape[1]):
        h = matvec(steps.A[:, t], h) + steps.c[:, t] + q[:, :, t]
        states.append(h)
    path = torch.stack(states, 2)
    return path.flatten(0, 1), (matvec(steps.C, path) + e).flatten(0, 1)


def normal(cov: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Draws from ``N(0, cov)``; the shape ends in that of cov without its last axis."""
    constant = cov.dim() == 4 and cov.shape[1] > 1 and cov.stride(1) == 0
    values = torch.randn(shape, generator=generator, dtype=cov.dtype, device=cov.device)
    return matvec(root(cov[:, :1] if constant else cov), values)


def root(cov: Tensor) -> Tensor:
    """A square root ``L L^T`` of a covariance that may be singular."""
    values, vectors = torch.linalg.eigh(symmetric_part(cov))
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
