"""The state space model of S4 per channel: a discrete state matrix that is diagonal plus low rank."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.dplr import DiscreteDPLR, Powers, as_complex, as_real
from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.shapes import check_floating, check_real, check_tensors, wide
from dualform.ops.chunks import CHUNK, Chunks, chunk_size, toeplitz
from dualform.ops.op import Op
from dualform.ops.spans import Spanned, Tables
from dualform.ops.state import check_dtype, check_state, initial

_WHERE = "dplr_ssm"
_IN_TURN = 16  # states up to which a loop is quicker than squaring the matrix once more


def dplr_ssm(
    u: Tensor,
    system: DiscreteDPLR,
    C: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Borders = None,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = Abar h_{t-1} + Bbar u_t``, ``y_t = 2 Re sum_n C_n h_{t,n}``, with ``Abar = I + diag(e) - a b^*``.

    e, a, b and Bbar are those of a :class:`~dualform.core.dplr.DiscreteDPLR`; h, they and C stand for themselves and
    their conjugates. Chunks of time are matrix products, with dense powers of Abar made by squaring between them:
    diagonalising Abar would make the scan of states cheaper, but the eigenvectors of HiPPO matrices are exponentially
    ill-conditioned in N. A value that is not finite may reach earlier outputs of its own sequence within a chunk.

    Args:
        u: ``(B, T, D)``, input.
        system: of D channels.
        C: ``(D, N)``, complex.
        initial_state: ``(B, D, N)``, complex, zero by default; with ``cu_seqlens`` one row per sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.

    Returns:
        y ``(B, T, D)`` and the final state ``(B, D, N)``, in the precision of the state: complex64 or wider.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Gu, Goel and Re (2022), arXiv:2111.00396, section 3.
    """
    _check_inputs(u, *system, C)
    packing = Packing.of(_WHERE, cu_seqlens, u)
    dtype = torch.promote_types(wide(u, *system, C, initial_state), torch.complex64)
    h0 = initial(_WHERE, initial_state, packing, u, tuple(C.shape), dtype)
    e, a, b, B, C = (m.to(dtype) for m in (*system, C))
    y, final = dplr_ssm_op(DplrSSM(u.to(h0.real.dtype), e, a, b, B, C, h0, packing))
    return y, final


class DplrSSM(NamedTuple):
    """The arguments of the operator, as in :func:`dplr_ssm`; all in the precision of the state."""

    u: Tensor  # (B, T, D)
    e: Tensor  # (D, N)
    a: Tensor  # (rank, D, N)
    b: Tensor  # (rank, D, N)
    B: Tensor  # (D, N)
    C: Tensor  # (D, N)
    h0: Tensor  # (rows, D, N)
    packing: Packing | None

    @property
    def system(self) -> DiscreteDPLR:
        """Without C."""
        return DiscreteDPLR(self.e, self.a, self.b, self.B)


def _check_inputs(u: Tensor, e: Tensor, a: Tensor, b: Tensor, B: Tensor, C: Tensor) -> None:
    pairs = {"e": e, "B": B, "C": C}
    check_tensors(
        _WHERE, u=(u, "B T D"), **{name: (m, "D N") for name, m in pairs.items()}, a=(a, "R D N"), b=(b, "R D N")
    )
    check_real(_WHERE, u=u)
    check_floating(_WHERE, a=a, b=b, **pairs)


def _check(a: DplrSSM) -> None:
    _check_inputs(a.u, a.e, a.a, a.b, a.B, a.C)
    check_state(_WHERE, "the initial state", a.h0, a.packing, a.u, tuple(a.C.shape))
    check_dtype(_WHERE, a.h0.dtype, e=a.e, a=a.a, b=a.b, B=a.B, C=a.C)
    check_dtype(_WHERE, a.h0.real.dtype, u=a.u)
    if not a.h0.is_complex():
        raise ArgumentError(f"{_WHERE}: the state is {a.h0.dtype}, expected a complex dtype")


def _reference(a: DplrSSM) -> tuple[Tensor, Tensor]:
    def run(u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        ys = [u[:, :0]]
        for u_t in u.unbind(1):
            h = a.system.step(u_t, h)
            ys.append(2 * (a.C * h).sum(-1).real[:, None])
        return torch.cat(ys, 1), h.clone()

    return each_alone(run, a.packing, a.h0, a.u)


def _tables(a: DplrSSM, most: int) -> Tables:
    """What a chunk of K steps needs, per channel with S = 2 N, then the powers of Abar that lead from chunk to chunk.

    within ``(D, K, K)`` from K inputs to K outputs, after ``(D, S, K)`` from the state before them to K outputs, into
    ``(D, K, S)`` from K inputs to what they add to the state after them.
    """
    size, powers = _chunk(a), a.system.powers()
    column, row = as_real(a.B)[:, None], as_real(2 * a.C.conj())[:, None]
    after = powers.orbit(powers.moved(row, 0, adjoint=True), size, adjoint=True)
    kernel = torch.cat([row, after[:, :-1]], 1) @ column.mT
    level, count = size.bit_length() - 1, -(-most // size)
    powers.change(level + max(0, (count - 1).bit_length() - _IN_TURN.bit_length() + 1))
    return toeplitz(kernel[..., 0]), after.mT, powers.orbit(column, size).flip(1), *powers.changes


def _chunk(a: DplrSSM) -> int:
    return chunk_size(a.u, a.packing, CHUNK)


def _run(a: DplrSSM, tables: Tables) -> tuple[Tensor, Tensor]:
    within, after, into, *changes = tables
    if a.u.numel() == 0:
        return a.u.clone(), a.h0.clone()
    size, h = within.shape[-1], as_real(a.h0).transpose(0, 1)  # (D, rows, S)
    scan, chunks = _Scan(Powers(list(changes)), size.bit_length() - 1), Chunks.of(a.u, a.packing, size)
    left, right = chunks.both(a.u)
    added = torch.bmm(right, into)
    before = scan.prefix(chunks, chunks.before(added, h, 1))
    y = torch.baddbmm(torch.bmm(left, within), before, after)
    last = scan.advance(before.index_select(1, chunks.last), chunks.count[chunks.last])
    h = h.index_copy(1, chunks.filled, last + added.index_select(1, chunks.last))
    return chunks.tokens(y), as_complex(h.transpose(0, 1).contiguous())


class _Scan(NamedTuple):
    """States from chunk to chunk of ``2^level`` steps."""

    powers: Powers
    level: int

    def advance(self, h: Tensor, count: Tensor) -> Tensor:
        """``Abar^count h`` of ``(D, rows, S)``; counts ``(rows,)``, at most ``2^level``."""
        for bit in range(self.level + 1):
            h = torch.where((count >> bit & 1)[:, None] > 0, self.powers.moved(h, bit), h)
        return h

    def prefix(self, chunks: Chunks, v: Tensor) -> Tensor:
        """The states before every chunk, ``(D, M, S)``, from what enters each by itself."""
        if not chunks.packed:
            return self._sums(v.unflatten(1, (chunks.shape[0], -1)), self.level, None).flatten(1, 2)
        return self._sums(v[:, None], self.level, chunks.index)[:, 0]

    def _sums(self, v: Tensor, level: int, since: Tensor | None) -> Tensor:
        """``h_i = v_i + Abar^(2^level) h_{i-1}``, ``(D, R, L, S)``.

        Pairs are added up, whose transition is the square, until few are left.

        Args:
            v: what is added.
            level: see the formula.
            since: ``(L,)``, elements since the first one of a sequence; None for one sequence.
        """
        length = v.shape[2]

        def carried(h: Tensor, to: slice) -> Tensor:
            h = self.powers.moved(h.flatten(1, 2), level).view_as(h)
            return h if since is None else torch.where((since[to] > 0)[:, None], h, 0)

        if length <= _IN_TURN:
            states = [v[:, :, :1]]
            for i in range(1, length):
                states.append(v[:, :, i : i + 1] + carried(states[-1], slice(i, i + 1)))
            return torch.cat(states, 2)
        even, odd = v[:, :, 0::2], v[:, :, 1::2]
        pairs = odd + carried(even[:, :, : length // 2], slice(1, None, 2))
        odd = self._sums(pairs, level + 1, None if since is None else since[1::2] // 2)
        even = torch.cat([v[:, :, :1], even[:, :, 1:] + carried(odd[:, :, : (length - 1) // 2], slice(2, None, 2))], 2)
        both = torch.stack([even[:, :, : length // 2], odd], 3).flatten(2, 3)
        return both if length % 2 == 0 else torch.cat([both, even[:, :, -1:]], 2)


def _fake(a: DplrSSM) -> list[Tensor]:
    return [a.u.new_empty(a.u.shape), a.h0.new_empty(a.h0.shape)]


dplr_ssm_op = Op(_WHERE, DplrSSM, _reference, fake=_fake, check=_check)
dplr_ssm_op.add(Spanned(dplr_ssm_op, _run, _tables, ("u",), lambda a: 1 + a.C.shape[0] // 8, CHUNK).backend())
