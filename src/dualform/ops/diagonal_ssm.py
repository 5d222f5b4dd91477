"""A diagonal time-invariant state space model per channel: S4D, DSS and every system brought to diagonal form."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.shapes import check_floating, check_real, check_tensors, once_per_shape, wide
from dualform.ops.chunks import Chunks, chunk_size, toeplitz
from dualform.ops.linear_scan import linear_scan
from dualform.ops.op import Backend, Op
from dualform.ops.state import check_dtype, check_state, initial

_WHERE = "diagonal_ssm"


def diagonal_ssm(
    u: Tensor,
    Abar: Tensor,
    CB: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Borders = None,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = Abar h_{t-1} + u_t``, ``y_t = 2 Re sum_n CB_n h_{t,n}``, per channel.

    One mode of each conjugate pair is given, hence the factor 2. The input vector is part of ``CB``, the product of
    the output and the input map: a system whose state is ``Bbar h`` enters with ``state / Bbar`` and leaves with
    ``Bbar final``.

    Args:
        u: ``(B, T, D)``, input.
        Abar: ``(D, N)``, complex, decays of one step.
        CB: ``(D, N)``, complex, ``C Bbar`` of the paper.
        initial_state: ``(B, D, N)``, complex, zero by default; with ``cu_seqlens`` one row per sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.

    Returns:
        y ``(B, T, D)`` in the dtype of u, and the final state ``(B, D, N)``, complex64 or wider.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Gu, Goel, Gupta and Re (2022), arXiv:2206.11893, equations 2 and 3.
    """
    _check_inputs(u, Abar, CB)
    packing = Packing.of(_WHERE, cu_seqlens, u)
    dtype = torch.promote_types(wide(u, Abar, CB, initial_state), torch.complex64)
    h0 = initial(_WHERE, initial_state, packing, u, tuple(Abar.shape), dtype)
    y, final = diagonal_ssm_op(DiagonalSSM(u, Abar.to(dtype), CB.to(dtype), h0, packing))
    return y, final


class DiagonalSSM(NamedTuple):
    """The arguments of the operator, as in :func:`diagonal_ssm`; Abar, CB and h0 have the dtype of the state."""

    u: Tensor  # (B, T, D)
    Abar: Tensor  # (D, N)
    CB: Tensor  # (D, N)
    h0: Tensor  # (rows, D, N)
    packing: Packing | None


@once_per_shape
def _check_inputs(u: Tensor, Abar: Tensor, CB: Tensor) -> None:
    check_tensors(_WHERE, u=(u, "B T D"), Abar=(Abar, "D N"), CB=(CB, "D N"))
    check_real(_WHERE, u=u)
    check_floating(_WHERE, Abar=Abar, CB=CB)


def _check(a: DiagonalSSM) -> None:
    _check_inputs(a.u, a.Abar, a.CB)
    check_state(_WHERE, "the initial state", a.h0, a.packing, a.u, tuple(a.Abar.shape))
    check_dtype(_WHERE, a.h0.dtype, Abar=a.Abar, CB=a.CB)
    if not a.h0.is_complex():
        raise ArgumentError(f"{_WHERE}: the state is {a.h0.dtype}, expected a complex dtype")


def _reference(a: DiagonalSSM) -> tuple[Tensor, Tensor]:
    def run(u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        ys = []
        for t in range(u.shape[1]):
            h = a.Abar * h + u[:, t, :, None]
            ys.append(2 * (a.CB * h).sum(-1).real)
        return torch.stack(ys, 1) if ys else u * a.CB.real.sum(-1), h.clone()

    y, final = each_alone(run, a.packing, a.h0, a.u)
    return y.to(a.u.dtype), final


class _Tables(NamedTuple):
    """What a chunk of K tokens needs, per channel; a complex number is two real ones, the real parts first."""

    powers: Tensor  # (D, N, K + 1), complex, Abar^0 .. Abar^K
    within: Tensor  # (D, K, K), from K tokens to K outputs
    after: Tensor  # (D, 2 N, K), from the state before them to K outputs
    into: Tensor  # (D, K, 2 N), from K tokens to what they add to the state after them

    @classmethod
    def of(cls, Abar: Tensor, CB: Tensor, size: int) -> "_Tables":
        powers = _powers(Abar, size)
        z = 2 * CB[..., None] * powers
        kernel = z[..., :size].real.sum(1)
        after = torch.cat([z[..., 1:].real, -z[..., 1:].imag], 1)
        return cls(powers, toeplitz(kernel), after, _real(powers[..., :-1].flip(-1).mT))


def _powers(a: Tensor, last: int) -> Tensor:
    """``a^0 .. a^last`` on a new last axis, by doubling, so that rounding grows with the logarithm."""
    p = torch.stack([torch.ones_like(a), a], -1)
    while p.shape[-1] <= last:
        p = torch.cat([p, p[..., 1:] * p[..., -1:]], -1)
    return p[..., : last + 1]


def _diagonals(m: Tensor) -> Tensor:
    """The sums of ``m_{i, i + l}`` over i, ``(D, K, K)`` -> ``(D, K)``: the gradient of a kernel's taps."""
    size = m.shape[-1]
    shifted = F.pad(F.pad(m, (0, size)).flatten(1), (0, size))
    return shifted.unflatten(1, (size, 2 * size + 1))[..., :size].sum(1)


def _real(z: Tensor) -> Tensor:
    """``(..., N)`` complex -> ``(..., 2 N)``."""
    return torch.cat([z.real, z.imag], -1)


def _complex(x: Tensor) -> Tensor:
    """The inverse of :func:`_real`."""
    return torch.complex(*x.chunk(2, -1))


def _states(chunks: Chunks, right: Tensor, tables: _Tables, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states before every chunk ``(M, D, N)``, the final ones, and the decay of every chunk ``(1, M, D, N)``."""
    decay = tables.powers.permute(2, 0, 1)[chunks.count][None]
    added = _complex(torch.bmm(right, tables.into)).transpose(0, 1)[None]
    after, final = linear_scan(decay, added, h0, cu_seqlens=chunks.line)
    return chunks.before(after[0], h0), final, decay


def _causal(x: Tensor, table: Tensor, *, reverse: bool = False) -> Tensor:
    """``x @ table`` for a triangular table, ``(D, M, K)``; what is not finite reaches no step before it.

    A product multiplies it by the zeros of the triangle, which gives NaN. So it is left out, and added to the steps
    from there on. With ``reverse`` time runs from the last step to the first.
    """
    finite = torch.where(x.isfinite(), x, 0)
    lost = x - finite
    later = lost.flip(-1).cumsum(-1).flip(-1) if reverse else lost.cumsum(-1)
    return torch.bmm(finite, table).add_(later)


def _forward(a: DiagonalSSM) -> list[Tensor]:
    """Within a chunk one product maps the steps and the state before them to outputs; between chunks states scan."""
    u, Abar, CB, h0, packing = a
    if u.numel() == 0 or h0.numel() == 0:
        return [torch.zeros_like(u, memory_format=torch.contiguous_format), h0.clone()]
    chunks, x = Chunks.of(u, packing, chunk_size(u, packing)), u.to(h0.real.dtype)
    tables = _Tables.of(Abar, CB, chunks.size)
    left, right = chunks.both(x)
    before, final, _ = _states(chunks, right, tables, h0)
    y = torch.baddbmm(_causal(left, tables.within), _real(before).transpose(0, 1), tables.after)
    return [chunks.tokens(y).to(u.dtype).contiguous(), final]


def _backward(grads: list[Tensor], kept: list[Tensor], a: DiagonalSSM) -> dict[str, Tensor]:
    """With ``g`` the gradient of the states before chunks, ``g_m = dbefore_m + conj(decay_m) g_{m+1}``: a scan back."""
    u, Abar, CB, h0, packing = a
    if u.numel() == 0 or h0.numel() == 0:
        zeros = {name: torch.zeros_like(m) for name, m in (("u", u), ("Abar", Abar), ("CB", CB))}
        return {**zeros, "h0": grads[1].clone()}
    chunks, dtype = Chunks.of(u, packing, chunk_size(u, packing)), h0.real.dtype
    x, dy = u.to(dtype), grads[0].to(dtype)
    tables = _Tables.of(Abar, CB, chunks.size)
    powers, size = tables.powers, chunks.size
    (left, right), out = chunks.both(x), chunks.left(dy)
    before, _, decay = _states(chunks, right, tables, h0)
    dbefore = _complex(torch.bmm(out, tables.after.mT)).transpose(0, 1)[None]
    g, dh0 = linear_scan(decay.conj(), dbefore, grads[1], cu_seqlens=chunks.line, reverse=True)
    g = chunks.after(g[0], grads[1])
    carried = _real(g).transpose(0, 1)
    du = chunks.tokens(_causal(out, tables.within.mT, reverse=True), torch.bmm(carried, tables.into.mT))

    re, im = torch.bmm(_real(before).permute(1, 2, 0), out).chunk(2, 1)
    dz = 2 * F.pad(torch.complex(re, -im), (1, 0))
    dz[..., :size] += 2 * _diagonals(torch.bmm(left.mT, out))[:, None]
    dpowers = dz * CB.conj()[..., None]
    dpowers[..., :size] += _complex(torch.bmm(right.mT, carried)).mT.flip(-1)
    dpowers.index_add_(2, chunks.count, (g * before.conj()).permute(1, 2, 0))
    steps = torch.arange(1, size + 1, device=u.device)
    dAbar = (dpowers[..., 1:] * (steps * powers[..., :-1]).conj()).sum(-1)
    return {"u": du, "Abar": dAbar, "CB": (dz * powers.conj()).sum(-1), "h0": dh0}


def _fake(a: DiagonalSSM) -> list[Tensor]:
    return [a.u.new_empty(a.u.shape), a.h0.new_empty(a.h0.shape)]


diagonal_ssm_op = Op(_WHERE, DiagonalSSM, _reference, fake=_fake, check=_check)
diagonal_ssm_op.add(Backend("torch", _forward, _backward))
