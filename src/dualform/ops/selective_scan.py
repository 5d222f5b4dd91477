"""The selective scan of Mamba: a diagonal recurrence whose step, input and output maps depend on the input."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.shapes import check_floating, check_real, check_tensors, once_per_shape, wide
from dualform.ops.layout import empty_like, lay, time_last
from dualform.ops.op import Op
from dualform.ops.rows import blank, check_indices, check_rows, pick
from dualform.ops.state import check_dtype, check_out_state, check_state, give_state, initial, unless_complex

_WHERE, _STEP = "selective_scan", "selective_state_update"


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Borders = None,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t``, ``y_t = C_t h_t + D u_t``, gated by ``silu(z_t)``.

    ``dt = softplus(delta + delta_bias)`` where the flag asks for softplus. With a complex A the state is complex and
    stands for conjugate pairs: ``y_t = 2 Re(C_t h_t) + D u_t``.

    Args:
        u: ``(B, T, D)``, input.
        delta: ``(B, T, D)``, step before bias and softplus.
        A: ``(D, N)``, decay rates, negative (real part) for a stable recurrence; real or complex.
        B: ``(B, T, G, N)``, input map; channel d uses group ``d // (D / G)``. Or ``(D, N)``, constant over time and
            batch.
        C: ``(B, T, G, N)``, output map, whose number of groups may differ from that of B; or ``(D, N)``, likewise.
        D: ``(D,)``, skip.
        z: ``(B, T, D)``, gate.
        delta_bias: ``(D,)``.
        delta_softplus: whether the step passes through softplus.
        initial_state: ``(B, D, N)``, zero by default; with ``cu_seqlens`` one row per sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.

    Returns:
        y ``(B, T, D)`` in the dtype of u, and the final state ``(B, D, N)``, float32 or wider.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Gu & Dao (2023), arXiv:2312.00752, section 3.2 and algorithm 2.
    """
    _check_inputs(u, delta, A, B, C, D, z, delta_bias)
    packing = Packing.of(_WHERE, cu_seqlens, u)
    state = initial_state if A.is_complex() else unless_complex(initial_state)
    dtype = wide(u, delta, A, B, C, D, z, delta_bias, state)
    h0 = initial(_WHERE, initial_state, packing, u, tuple(A.shape), dtype)
    y, final = selective_scan_op(
        SelectiveScan(u, delta, A.to(dtype), B, C, D, z, delta_bias, delta_softplus, h0, packing)
    )
    return y, final


class SelectiveScan(NamedTuple):
    """The arguments of the operator, as in :func:`selective_scan`; A and h0 have the dtype of the state."""

    u: Tensor  # (B, T, D)
    delta: Tensor  # (B, T, D)
    A: Tensor  # (D, N)
    B: Tensor  # (B, T, G, N), or (D, N)
    C: Tensor  # (B, T, J, N), or (D, N)
    D: Tensor | None  # (D,)
    z: Tensor | None  # (B, T, D)
    delta_bias: Tensor | None  # (D,)
    delta_softplus: bool
    h0: Tensor  # (rows, D, N)
    packing: Packing | None

    def over_time(self) -> "SelectiveScan":
        """The same with a group for every channel in place of a constant B or C: a view, the same at all times."""
        batch_and_time = self.u.shape[:2]
        B, C = (m if m.dim() == 4 else m.expand(*batch_and_time, *m.shape) for m in (self.B, self.C))
        return self._replace(B=B, C=C)


@once_per_shape
def _check_inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    sizes = check_tensors(
        _WHERE,
        u=(u, "B T D"),
        delta=(delta, "B T D"),
        A=(A, "D N"),
        B=(B, _axes(B)),
        C=(C, _axes(C)),
        D=(D, "? D"),
        z=(z, "? B T D"),
        delta_bias=(delta_bias, "? D"),
    )
    check_real(_WHERE, u=u, delta=delta, D=D, z=z, delta_bias=delta_bias)
    check_floating(_WHERE, A=A, B=B, C=C)
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dim() == 4 and (tensor.shape[2] == 0 or sizes["D"] % tensor.shape[2]):
            raise ArgumentError(f"{_WHERE}: {name} has {tensor.shape[2]} groups, which do not divide D = {sizes['D']}")
        if tensor.is_complex() and not A.is_complex():
            raise ArgumentError(
                f"{_WHERE}: {name} is {tensor.dtype} but A is {A.dtype}: make A complex, or {name} real"
            )


def _axes(m: Tensor) -> str:
    """Of B or C; two only where it is constant."""
    return "D N" if isinstance(m, Tensor) and m.dim() == 2 else "B T * N"


def _check(a: SelectiveScan) -> None:
    _check_inputs(a.u, a.delta, a.A, a.B, a.C, a.D, a.z, a.delta_bias)
    check_state(_WHERE, "the initial state", a.h0, a.packing, a.u, tuple(a.A.shape))
    check_dtype(_WHERE, a.h0.dtype, A=a.A)


def _reference(a: SelectiveScan) -> tuple[Tensor, Tensor]:
    a = a.over_time()
    width, scale, real = a.u.shape[2], 2 if a.A.is_complex() else 1, a.h0.dtype.to_real()

    def run(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        B, C = (m.to(h.dtype).repeat_interleave(width // m.shape[2], 2) for m in (B, C))
        ys = []
        for t in range(u.shape[1]):
            h = torch.exp(dt[:, t, :, None] * a.A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t]
            ys.append(scale * (C[:, t] * h).sum(-1).real)
        return torch.stack(ys, 1) if ys else dt * u, h.clone()

    dt = a.delta.to(real) if a.delta_bias is None else a.delta.to(real) + a.delta_bias
    dt, x = F.softplus(dt) if a.delta_softplus else dt, a.u.to(real)
    y, final = each_alone(run, a.packing, a.h0, x, dt, a.B, a.C)
    y = y if a.D is None else y + a.D * x
    y = y if a.z is None else y * F.silu(a.z.to(real))
    return lay(y.to(a.u.dtype), time_last(a.u)), final


def _fake(a: SelectiveScan) -> list[Tensor]:
    return [empty_like(a.u), a.h0.new_empty(a.h0.shape)]


selective_scan_op = Op("selective_scan", SelectiveScan, _reference, fake=_fake, check=_check)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    out_state: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the selective recurrence; the streaming form of :func:`selective_scan` and of ``ssd``.

    A state of any floating dtype is read as it is; the step is computed in float32 or wider.

    Args:
        state: ``(B, D, N)``, or ``(B, H, P, N)`` by heads; with ``rows`` a table of states ``(R, ...)``.
        x: ``(B, D)`` or ``(B, H, P)``.
        dt: as x, or broadcastable to it, such as ``(B, H, 1)``; before bias and softplus.
        A: ``(D, N)`` or ``(H, P, N)``, or broadcastable to it, such as ``(H, 1, 1)``; real.
        B: ``(B, G, N)``; channel d (head h) uses group ``d // (D / G)``.
        C: ``(B, G, N)``.
        D: ``(D,)`` or ``(H, P)``, or broadcastable to it, such as ``(H, 1)``.
        z: as x, gate.
        dt_bias: added to dt; broadcastable to it.
        dt_softplus: whether dt passes through softplus.
        out_state: memory for the next state, of the shape of ``state``; it may be ``state`` itself. It is written in
            its own dtype, rounded once, and returned. Refused while gradients are recorded.
        rows: ``(B,)``, int32 or int64, the row of ``state``, and of ``out_state``, for each row of x. A negative one is
            padding: y and the next state are zero there, and ``out_state`` is not written. They are read on the device,
            without a synchronisation. An index beyond the table is refused on a CPU; elsewhere it makes y and the next
            state NaN, and touches no memory. Where an index occurs twice, one of its next states is kept, and which one
            is not defined.

    Returns:
        y in the dtype of x, and the next state: ``out_state``, or one for each row of x, float32 or wider.

    Raises:
        ArgumentError: for shapes, dtypes, devices or rows that do not fit together.

    References:
        Gu & Dao (2023), arXiv:2312.00752, equation 2 with the discretisation of section 3.2.
    """
    _check_step(state, x, dt, A, B, C, D, z, dt_bias, rows)
    if rows is not None:
        check_rows(_STEP, rows, state)
    if out_state is not None:
        check_out_state(_STEP, out_state, state, x, dt, A, B, C, D, z, dt_bias)
    dtype = wide(state, x, dt, A, B, C, D, z, dt_bias)
    y, after = selective_update_op(
        SelectiveUpdate(
            state, x, dt, A if A.dtype is dtype else A.to(dtype), B, C, D, z, dt_bias, dt_softplus, out_state, rows
        )
    )
    return y, after if out_state is None else give_state(after, out_state, rows)


class SelectiveUpdate(NamedTuple):
    """The arguments of one step, as in :func:`selective_state_update`; A has the dtype that is computed in."""

    state: Tensor  # (R, D, N) or (R, H, P, N), of any floating dtype
    x: Tensor  # (B, D) or (B, H, P)
    dt: Tensor  # as x, or broadcastable to it
    A: Tensor  # (D, N) or (H, P, N), or broadcastable to it
    B: Tensor  # (B, G, N)
    C: Tensor  # (B, J, N)
    D: Tensor | None
    z: Tensor | None  # as x
    dt_bias: Tensor | None
    dt_softplus: bool
    out_state: Tensor | None
    rows: Tensor | None  # (B,); without it R is B

    @property
    def by_head(self) -> bool | None:
        """How kernels find rates and step sizes: one of each a head (True), or a rate for every state (False).

        None for other shapes, which broadcasting allows and no kernel was written for.
        """
        shape, inner = self.state.shape, self.x.shape
        if self.A.shape == shape[1:] and self.dt.shape == inner:
            return False
        if len(shape) == 4 and self.A.shape == (shape[1], 1, 1) and self.dt.shape == (*inner[:2], 1):
            return True
        return None

    @property
    def broadcast(self) -> str | None:
        """What is broadcast in a way that no kernel was written for; None where kernels can run the step."""
        A, dt, bias = self.A, self.dt, self.dt_bias
        if self.by_head is None:
            return (
                f"A is {tuple(A.shape)} and dt {tuple(dt.shape)}; expected a rate for every state and a step for every "
                "channel, or one of each for every head"
            )
        if bias is not None and not _expands(bias.shape, dt.shape[1:]):
            return f"dt is {tuple(dt.shape)} but dt_bias {tuple(bias.shape)}; expected one of each for every head"
        return None


@once_per_shape
def _check_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    rows: Tensor | None,
) -> None:
    inner = "D" if isinstance(state, Tensor) and state.dim() == 3 else "H P"
    table, inner = f"{'B' if rows is None else 'R'} {inner} N", f"B {inner}"
    sizes = check_tensors(
        _STEP,
        state=(state, table),
        x=(x, inner),
        dt=(dt, "* ..."),
        A=(A, "* ..."),
        B=(B, "B * N"),
        C=(C, "B * N"),
        D=(D, "? * ..."),
        z=(z, f"? {inner}"),
        dt_bias=(dt_bias, "? * ..."),
        rows=(rows, "? B"),
    )
    check_indices(_STEP, rows=rows)
    check_real(_STEP, state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    heads = sizes["D" if inner == "B D" else "H"]
    for name, m in (("B", B), ("C", C)):
        if m.shape[1] == 0 or heads % m.shape[1]:
            raise ArgumentError(f"{_STEP}: {name} has {m.shape[1]} groups, which do not divide {heads}")
    fitting = {"dt": (dt, x.shape), "A": (A, state.shape[1:]), "D": (D, x.shape[1:]), "dt_bias": (dt_bias, x.shape[1:])}
    for name, (m, shape) in fitting.items():
        if m is not None and not _expands(m.shape, shape):
            raise ArgumentError(
                f"{_STEP}: {name} has shape {tuple(m.shape)}, expected {tuple(shape)} or what broadcasts to it"
            )


def _expands(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a shape broadcasts to another one, axis by axis from the last."""
    return len(shape) <= len(to) and all(
        [a == 1 or a == b for a, b in zip(reversed(shape), reversed(to), strict=False)]
    )


def _check_update(a: SelectiveUpdate) -> None:
    _check_step(a.state, a.x, a.dt, a.A, a.B, a.C, a.D, a.z, a.dt_bias, a.rows)
    check_rows(_STEP, a.rows, a.state)
    expected = wide(*(m for m in a if isinstance(m, Tensor) and m.is_floating_point()))
    if a.A.dtype != expected:
        raise ArgumentError(f"{_STEP}: A is {a.A.dtype}, expected {expected}, the dtype of what is computed")


def _update(a: SelectiveUpdate) -> tuple[Tensor, Tensor]:
    state, dtype = pick(a.state, a.rows), a.A.dtype
    x = a.x.to(dtype)
    dt = a.dt.to(dtype) if a.dt_bias is None else a.dt.to(dtype) + a.dt_bias
    dt = F.softplus(dt) if a.dt_softplus else dt
    heads, by_head = state.shape[1], state.dim() == 4
    B, C = (m.to(dtype).repeat_interleave(heads // m.shape[1], 1) for m in (a.B, a.C))
    B, C = (m[:, :, None] if by_head else m for m in (B, C))
    state = torch.exp(dt[..., None] * a.A) * state + (dt * x)[..., None] * B
    y = (state * C).sum(-1)
    y = y if a.D is None else y + a.D * x
    y = y if a.z is None else y * F.silu(a.z.to(dtype))
    return blank(y.to(a.x.dtype), a.rows, a.state), blank(state, a.rows, a.state)


def _fake_update(a: SelectiveUpdate) -> list[Tensor]:
    return [a.x.new_empty(a.x.shape), a.A.new_empty((a.x.shape[0], *a.state.shape[1:]))]


selective_update_op = Op(
    "selective_state_update", SelectiveUpdate, _update, fake=_fake_update, check=_check_update, stepwise=True
)
