"""Where a filter begins: a known distribution, the stationary one of the model, and diffuse directions."""

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import symmetric_part
from dualform.gaussian.belief import Belief
from dualform.gaussian.parameters import Parameters, System

_DOUBLINGS = 60


def initial(where: str, model: System, full: tuple[int, ...]) -> Belief:
    """The belief before any observation, of each of the series with the batch axes ``full``, laid out as rows.

    Raises:
        ArgumentError: for a stationary start of a model that is not stationary.
    """
    n, m0, P0 = model.d_state, model.m0, model.P0
    if isinstance(model, Parameters) and (model.stationary or P0 is None):
        m0, P0 = stationary(where, model)
    assert P0 is not None
    Z = m0.new_zeros(n, 0) if model.diffuse is None else model.diffuse.to(m0.dtype)

    def rows(value: Tensor, *core: int) -> Tensor:
        return value.expand(*full, *core).reshape(-1, *core).clone()

    mean = rows(m0, n)
    steps = torch.zeros(len(mean), dtype=torch.int64, device=mean.device)
    return Belief(mean, rows(symmetric_part(P0), n, n), steps, Z.expand(len(mean), *Z.shape).clone())


def stationary(where: str, model: Parameters, name: str = "A") -> tuple[Tensor, Tensor]:
    """The distribution that a transition leaves as it is, of the states that are not diffuse; errors call it ``name``.

    Raises:
        ArgumentError: where there is none.
    """
    A, c = model.A, model.c
    Q = model.Q if model.S is None else model.S @ model.Q @ model.S.mT
    n, keep = model.d_state, None
    if model.diffuse is not None:
        Z = model.diffuse
        keep = (Z == 0).all(-1).nonzero()[:, 0]
        others = (Z != 0).any(-1).nonzero()[:, 0]
        if A.detach()[..., keep[:, None], others].any():
            raise ArgumentError(
                f"{where}: P0='stationary' with diffuse states that move the others, which have no stationary "
                "distribution then",
                hint="make the states diffuse that are driven by diffuse ones, or give P0",
            )
        A, Q = A[..., keep[:, None], keep], Q[..., keep[:, None], keep]
        c = None if c is None else c[..., keep]
    P = discrete_lyapunov(where, A, Q, name)
    m = P.new_zeros(P.shape[:-1])
    if c is not None:
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        m = torch.linalg.solve(eye - A, c.expand(m.shape).unsqueeze(-1)).squeeze(-1)
    if keep is not None:
        place = torch.nn.functional.one_hot(keep, n).to(P.dtype)
        m, P = m @ place, place.mT @ P @ place
    return m, P


def discrete_lyapunov(where: str, A: Tensor, Q: Tensor, name: str = "A") -> Tensor:
    """The covariance ``P = A P A^T + Q`` of a stable system, in batches, with gradients: the sum of ``A^k Q (A^k)^T``.

    The number of terms is doubled until the power of A is below rounding.

    Args:
        where: the first word of an error.
        A: ``(..., N, N)``.
        Q: ``(..., N, N)``.
        name: what an error calls A.

    Raises:
        ArgumentError: where A has an eigenvalue outside of the unit circle, on it, or too close to it; names the row.

    References:
        Smith (1968), "Matrix equation XA + BX = C".
    """
    eps, power, P = torch.finfo(A.dtype).eps, A, symmetric_part(Q)
    # Derivatives of a product vanish later than itself: where A^2 is 0, the second ones of A^4 are not.
    more = 2 if A.requires_grad and torch.is_grad_enabled() else 0
    for _ in range(_DOUBLINGS):
        P = P + symmetric_part(power @ P @ power.mT)
        power = power @ power
        if not torch.compiler.is_compiling() and A.device.type != "meta":
            left = power.detach().abs().amax((-2, -1)) if A.shape[-1] else power.new_zeros(())
            if (left <= eps).all() or not left.isfinite().all():
                if not more or not left.isfinite().all():
                    break
                more -= 1
    if not torch.compiler.is_compiling() and A.device.type != "meta" and A.numel():
        bad = ~(power.detach().abs().amax((-2, -1)) <= eps)
        if bad.any():
            place = tuple(bad.nonzero()[0].tolist())
            radius = torch.linalg.eigvals(A.detach()[place]).abs().max().item()
            row = f" of row {place[0] if len(place) == 1 else place}" if place else ""
            raise ArgumentError(
                f"{where}: P0='stationary', but the model{row} is not stationary: {name} has an eigenvalue of absolute "
                f"value {radius:.6g}, expected less than 1",
                hint="give P0, or diffuse=(True, ...) for the states without a stationary distribution",
            )
    return P
