"""From recorded inputs and outputs to a linear system."""

import math
from typing import Any

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, check_finite, orbit
from dualform.core.shapes import check_tensors
from dualform.core.system import StateSpace

_SPAN = 512  # samples that share a free initial state


@explained
def identify(u: Any, y: Any, order: int, *, dt: float = 1.0) -> StateSpace:
    """A discrete system of ``order`` states that turns u into y, by subspace identification.

    The future outputs are projected onto the past inputs and outputs, after what the future inputs explain has been
    removed (by a QR factorisation of block Hankel matrices). The column space of the result is that of the extended
    observability matrix, which gives A and C. B and D then follow by least squares on the whole record, with the
    free responses projected out. Without noise the system is recovered exactly, up to rounding; with noise in the
    outputs that is independent of u, the estimate is consistent.

    Args:
        u: inputs ``(T, inputs)`` or ``(T,)``, exciting at enough frequencies: white noise is, one sinusoid is not.
        y: outputs ``(T, outputs)`` or ``(T,)``.
        order: number of states.
        dt: step size of the result.

    Returns:
        The system in float64, in arbitrary coordinates. The record determines the responses ``D + C B``, ``C A B``,
        ``C A^2 B``, .., and not how the first divides into D and C B. Where A is nearly singular, as after a pure
        delay, the system has ``order + outputs`` states; see
        :meth:`dualform.core.system.StateSpace.from_control_form`.

    Raises:
        ArgumentError: for values that are not finite, a record too short for the order, an input that does not excite
            the system enough, or an order above that of the record.

    References:
        Verhaegen (1994), "Identification of the deterministic part of MIMO state space models given in innovations
        form from input-output data", PO-MOESP; Van Overschee and De Moor (1996), "Subspace identification for
        linear systems", chapter 4.

    Example:
        >>> u = torch.randn(500, dtype=torch.float64)
        >>> y, _ = StateSpace([[0.9, 0.2], [-0.2, 0.9]], [1.0, 0.0], [0.0, 1.0], dt=1.0).simulate(u)
        >>> identify(u, y, order=2).poles().abs()
        tensor([0.9220, 0.9220], dtype=torch.float64)
    """
    given = {name: value.to(torch.float64) for name, value in as_tensors("identify", u=u, y=y).items()}
    u, y = (value[:, None] if value.dim() == 1 else value for value in (given["u"], given["y"]))
    sizes = check_tensors("identify", u=(u, "T inputs"), y=(y, "T outputs"))
    length, inputs = sizes["T"], sizes["inputs"]
    check_finite("identify", {"u": u, "y": y}, hint="no sample may be missing: give a part of the record without gaps")
    if order < 1:
        raise ArgumentError(f"identify: the order is {order}, expected at least 1")
    # Block rows of past and of future: A follows from a shift by one row, which takes more rows than the order; the
    # more there are, the better noise averages out.
    per_row = 2 * (inputs + sizes["outputs"] + 1)
    depth = min(4 * order + 4, (length + 1) // per_row)
    if depth < order + 2:
        need = (order + 2) * per_row - 1
        raise ArgumentError(f"identify: {length} samples are too few for order {order}, expected at least {need}")
    unit_u, unit_y = (signal.square().mean(0).sqrt().clamp_min(1e-300) for signal in (u, y))
    u, y = u / unit_u, y / unit_y
    A, C = _observability(u, y, order, depth, length - 2 * depth + 1)
    B, D = _input_matrices(A, C, u, y)
    C, D = unit_y[:, None] * C, unit_y[:, None] * D / unit_u
    return StateSpace.from_control_form(A, B / unit_u, C, D, dt)


def _observability(u: Tensor, y: Tensor, order: int, depth: int, columns: int) -> tuple[Tensor, Tensor]:
    """A and C in control form, from the column space of the extended observability matrix."""
    past_u, future_u = _hankel(u, 2 * depth, columns).chunk(2)
    past_y, future_y = _hankel(y, 2 * depth, columns).chunk(2)
    R = torch.linalg.qr(torch.cat([future_u, past_u, past_y, future_y]).mT, mode="r")[1].mT  # lower triangular
    first, last = len(future_u), len(R) - len(future_y)
    excitation = torch.linalg.svdvals(R[: 2 * first, : 2 * first])
    if float(excitation[-1]) <= 1e-10 * float(excitation[0]):
        raise ArgumentError(
            f"identify: the input does not excite the system enough for order {order}",
            hint="it needs as many frequencies as the system has states; white noise has all",
        )
    U, strength, _ = torch.linalg.svd(R[last:, first:last], full_matrices=False)
    rank = int((strength > 1e-11 * float(R[last:].norm())).sum())
    if order > rank:
        raise ArgumentError(
            f"identify: the order is {order}, but the record shows only {rank} states", hint=f"take order={rank}"
        )
    outputs = y.shape[1]
    observability = U[:, :order] * strength[:order].sqrt()
    A = torch.linalg.lstsq(observability[:-outputs], observability[outputs:]).solution
    return A, observability[:outputs]


def _hankel(signal: Tensor, rows: int, columns: int) -> Tensor:
    """Block Hankel matrix ``(rows * width, columns)``: sample ``i + j`` in block row i and column j."""
    return signal.unfold(0, columns, 1)[:rows].flatten(0, 1)


def _input_matrices(A: Tensor, C: Tensor, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """B and D in control form, by least squares: the output is linear in them and in the first state of each span.

    Spans are short enough that no free response overflows. The free responses, which are the same functions of time
    in every span, are projected out.
    """
    n, inputs, outputs = len(A), u.shape[1], len(C)
    growth = float(torch.linalg.eigvals(A).abs().max())
    longest = min(_SPAN, int(math.log(1e6) / math.log(growth))) if growth > 1 else _SPAN
    count = -(-len(u) // max(longest, 2 * n + 2))
    length = len(u) // count
    u, y = (signal[: count * length].unflatten(0, (count, length)) for signal in (u, y))
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    state = torch.zeros(count, inputs, n, n, dtype=A.dtype, device=A.device)  # driven by u I, one for each input
    seen = []
    for push in u.unbind(1):
        seen.append(C @ state)
        state = A @ state + push[:, :, None, None] * eye
    driven = torch.stack(seen, 1).transpose(2, 3).flatten(1, 2).flatten(2)  # (count, length outputs, inputs n)
    direct = torch.einsum("jtm,op->jtopm", u, torch.eye(outputs, dtype=A.dtype, device=A.device))
    both = torch.cat([driven, direct.flatten(1, 2).flatten(2), y.flatten(1)[..., None]], -1)
    free = torch.linalg.qr((C @ orbit(A, eye, length)).flatten(0, 1))[0]
    both = (both - free @ (free.mT @ both)).flatten(0, 1)
    solution = torch.linalg.lstsq(both[:, :-1], both[:, -1:]).solution[:, 0]
    return solution[: inputs * n].view(inputs, n).mT, solution[inputs * n :].view(outputs, inputs)
