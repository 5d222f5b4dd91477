"""``selective_scan_cuda``, the compiled module of mamba-ssm that copies of its Python import, as they call it."""

import torch
from torch import Tensor

from dualform.compat.scan import outputs, selective_scan_fn


@torch.no_grad()
def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """The scan, without a gradient; arguments as :func:`~dualform.compat.scan.selective_scan_fn`.

    Returns:
        What is not gated ``(B, D, T)``; then ``(B, D, 1, 2 N)``, whose every second number, from the second one on, is
        the final state, as callers read it, and whose others are 0; and with z what is gated ``(B, D, T)``.
    """
    y, last = selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus, return_last_state=True)
    states = torch.stack([torch.zeros_like(last), last], -1).flatten(-2)[:, :, None]
    if z is None:
        return [y, states]
    return [y, states, outputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus)]


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """The gradients of the scan, which is run anew.

    Args:
        u: as in :func:`fwd`, and so are all up to ``delta_bias``.
        delta: so.
        A: so.
        B: so.
        C: so.
        D: so.
        z: so.
        delta_bias: so.
        dout: the gradient of what is gated, or without z of the output, ``(B, D, T)``.
        x: what :func:`fwd` returned second; not read.
        out: what it returned first; not read.
        dz: memory for the gradient of z.
        delta_softplus: as in :func:`fwd`.
        recompute_out_z: whether what is gated is returned, too.

    Returns:
        Gradients of u, delta, A, B, C, D and delta_bias, None for what is None; with z that of z; and what is gated.
    """
    given = (u, delta, A, B, C, D, delta_bias, z)
    with torch.enable_grad():
        leaves = [None if m is None else m.detach().requires_grad_() for m in given]
        u_, delta_, A_, B_, C_, D_, bias_, z_ = leaves
        assert u_ is not None and delta_ is not None and A_ is not None and B_ is not None and C_ is not None
        y = outputs(u_, delta_, A_, B_, C_, D_, z_, bias_, delta_softplus)
    there = [m for m in leaves if m is not None]
    made = iter(torch.autograd.grad(y, there, dout))
    *found, last = [None if m is None else next(made) for m in leaves]
    if last is not None:
        found.append(last if dz is None else dz.copy_(last))
        if recompute_out_z:
            found.append(y.detach())
    return found
