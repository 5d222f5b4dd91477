"""The family of linear time-invariant layers: S4, S4D, DSS, S5 and LRU."""

import copy
from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Real
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.system import StateSpace
from dualform.core.tree import clone
from dualform.layers.diagonal import DiagonalSystem
from dualform.layers.mimo import MimoSystem
from dualform.layers.mixer import Mixer, Prepared, check_intervals, check_state
from dualform.layers.poles import check_rate
from dualform.layers.projection import plain
from dualform.layers.stream_step import StreamStep, runs_as_stream_step, size_of, wide_of
from dualform.ops.dispatch import exactly
from dualform.ops.lti_step import LtiStep, lti_step_op


@runtime_checkable
class System(Protocol):
    """The discrete linear system of a layer: a named tuple of tensors with a parallel and a recurrent form.

    Outputs are those of the states alone, without the skip D. ``more`` is nothing, or the intervals of
    :class:`ContinuousLTI`.
    """

    def run(self, u: Tensor, h: Tensor, packing: Packing | None, *more: Tensor) -> tuple[Tensor, Tensor]:
        """``u`` ``(B, T, D)`` from the states ``h`` ``(rows, ...)`` -> outputs ``(B, T, D)`` and the final states."""
        ...

    def step(self, u: Tensor, h: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        """``u`` ``(B, D)`` from the states ``h`` -> outputs ``(B, D)`` and the next states."""
        ...

    def dense(self, D: Tensor) -> list[StateSpace]:
        """The same with real matrices, and with the skip D."""
        ...


class LTI(Mixer):
    """``s_t`` from a linear time-invariant system, plus ``D x_t``; then ``y_t = GLU(W gelu(s_t) + b)``.

    ``d_state`` of a config counts the eigenvalues of the state matrix: of a channel in S4, S4D and DSS, of the whole
    layer in S5 and LRU. Where they come in conjugate pairs, the state holds one complex number for each pair,
    ``N = d_state / 2``; elsewhere (LRU, and S5 without pairs) one for each, ``N = d_state``. The state h is
    ``(B, D, N)`` or ``(B, N)``, complex64 or, with float64 weights, complex128; everything before the output map is
    computed in that precision.

    ``rate`` multiplies the step: 2 for inputs sampled half as often as those the layer was trained on.

    A bidirectional layer has a second output map and adds what it gives of a recurrence that runs from the end. It
    is not causal and has no state.

    Args:
        d_model: D.
        shape: of the state of one row.
        bidirectional: whether there is a second recurrence.
    """

    D: nn.Parameter
    out_proj: nn.Linear
    _stream_map: ClassVar[str | None] = None  # of a diagonal system: the map behind the gelu, a GLU's or its gate's
    _next_first: ClassVar[bool] = True  # the recurrence from the end begins with the next input, not with the current

    def __init__(self, d_model: int, shape: tuple[int, ...], bidirectional: bool = False):
        super().__init__()
        self.d_model, self.causal, self._shape = d_model, not bidirectional, tuple(shape)

    def init_state(self, batch: int, *, max_len: int = 0) -> Complex[Tensor, "B ..."]:
        """Zeros; ``max_len`` is ignored."""
        self._check_causal()
        return self._zeros(batch)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: Complex[Tensor, "rows ..."] | None = None,
        *,
        cu_seqlens: Borders = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        """The parallel form. States are never held for every step."""
        return self._forward(x, state, cu_seqlens, rate)

    def step(
        self, x: Float[Tensor, "B D"], state: Complex[Tensor, "B ..."], *, rate: float = 1.0
    ) -> tuple[Float[Tensor, "B D"], Complex[Tensor, "B ..."]]:
        """The recurrent form."""
        return self._step(self._system(rate), x, state)

    def prepare(self, *, rate: float = 1.0) -> Prepared:
        """Steps that do not discretise anew; see :class:`~dualform.layers.mixer.Prepared`."""
        prepared = Prepared(partial(self._step, clone(self._system(rate))))
        self._check_causal()
        return prepared

    def prepare_residual(self, norm: Any) -> StreamStep | None:
        """By :func:`dualform.ops.lti_step.lti_step` on a CPU, where the system is diagonal."""
        out = None if self._stream_map is None or not self.causal else getattr(self, self._stream_map)
        if out is None or not plain(out) or not runs_as_stream_step(norm, self, out) or not self.D.is_cpu:
            return None
        system = clone(self._system(1.0))
        assert isinstance(system, DiagonalSystem | MimoSystem)
        _, a, b, C = system
        weights = wide_of(norm.weight), a, b, C, wide_of(self.D), out.weight, wide_of(out.bias), norm.eps
        return StreamStep(lti_step_op, lambda x, h: LtiStep(x, h, *weights), None, wide(self.D), size_of(self))

    @torch.no_grad()
    def systems(self) -> list[StateSpace]:
        """The discrete systems before the output map, on the CPU in float64, with ``dt`` 1: time counts in steps.

        S4, S4D and DSS have one for each channel, with one input and one output; in S5 and LRU all channels share
        one, of D inputs and D outputs. States are real: a complex number is two. Of a bidirectional layer these are
        the systems that run forward in time.
        """
        exact: Self = copy.deepcopy(self).to("cpu", torch.float64)
        return exact._system(1.0).dense(exact.D)

    @abstractmethod
    def _systems(self, rate: float) -> list[Any]:
        """The :class:`System` of the layer; of a bidirectional one, two: forward in time, and from the end."""

    def _system(self, rate: float) -> Any:
        check_rate(self._name, rate)
        with exactly(self.D.device.type):
            return self._systems(rate)[0]

    def _forward(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Borders, rate: float, *more: Tensor
    ) -> tuple[Tensor, Any]:
        """The parallel form; ``more`` is what else there is for every step, ``(B, T)``."""
        check_features(self._name, x, self.d_model)
        packing = Packing.of(self._name, cu_seqlens, x)
        check_rate(self._name, rate)
        h = self._start(state, x.shape[0] if packing is None else packing.rows)
        with exactly(x.device.type):
            system, *second = self._systems(rate)
            s, last = system.run(x, h, packing, *more)
            for other in second:
                s = s + self._from_the_end(other, x, h, packing, *more)
        return self._out(self._skip(s, x), x), last if self.causal else ()

    def _from_the_end(self, system: Any, x: Tensor, h: Tensor, packing: Packing | None, *more: Tensor) -> Tensor:
        turned = None if packing is None else packing.reversed()
        s = system.run(x.flip(1), h, turned, *(m.flip(1) for m in more))[0].flip(1)
        if not self._next_first:
            return s
        s = s[:, 1:]
        if packing is not None:
            owner = packing.sequence_ids(x.shape[1])
            s = torch.where((owner[1:] == owner[:-1])[:, None], s, 0)
        return F.pad(s, (0, 0, 0, 1))[:, : x.shape[1]]

    def _step(self, system: Any, x: Tensor, state: Tensor, interval: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check_causal()
        check_features(self._name, x, self.d_model, "B")
        more = self._more(x, interval)
        h, u = self._start(state, x.shape[0]), x.to(wide(self.D))
        s, h = system.step(u, h, *more)
        return self._out(self._skip(s, u), x), h

    def _skip(self, s: Tensor, u: Tensor) -> Tensor:
        """``s + D u``, in the memory of s unless s is a view: fresh memory takes longer than the arithmetic."""
        D = self.D.to(s.dtype)
        return torch.addcmul(s, u, D) if torch.compiler.is_compiling() or s._is_view() else s.addcmul_(u, D)

    def _more(self, x: Tensor, intervals: Tensor | None) -> tuple[Tensor, ...]:
        checked = None if intervals is None else check_intervals(self._name, x, intervals, wide(self.D))
        return () if checked is None else (checked,)

    def _out(self, s: Tensor, x: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(s).to(x.dtype)), -1)

    def _zeros(self, rows: int) -> Tensor:
        dtype = torch.promote_types(self.D.dtype, torch.complex64)
        return torch.zeros(rows, *self._shape, dtype=dtype, device=self.D.device)

    def _start(self, state: Tensor | None, rows: int) -> Tensor:
        if state is None:
            return self._zeros(rows)
        self._check_causal()
        if isinstance(state, Tensor) and state.shape == (rows, *self._shape) and state.device == self.D.device:
            return state.to(torch.promote_types(self.D.dtype, torch.complex64))
        return check_state(self._name, state, self._zeros(rows))  # it says what does not fit

    def _check_causal(self) -> None:
        if not self.causal:
            raise ArgumentError(
                f"{self._name}: a bidirectional layer has no state and no step: its outputs depend on inputs to come",
                hint="call forward on whole sequences, without a state",
            )

    @property
    def _name(self) -> str:
        return type(self).__name__.lower()


class ContinuousLTI(LTI):
    """An :class:`LTI` layer with a diagonal state matrix, which also takes samples at irregular times.

    With ``intervals`` s, see :class:`~dualform.layers.mixer.Mixer`, the parallel form is a scan from step to step:
    Abar is raised to the power s, and the input acts for as long.
    """

    continuous: ClassVar[bool] = True

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: Complex[Tensor, "rows ..."] | None = None,
        *,
        cu_seqlens: Borders = None,
        intervals: Real[Tensor, "B T"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        """The parallel form. States are never held for every step."""
        return self._forward(x, state, cu_seqlens, rate, *self._more(x, intervals))

    def step(
        self,
        x: Float[Tensor, "B D"],
        state: Complex[Tensor, "B ..."],
        interval: Real[Tensor, " B"] | None = None,
        *,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B D"], Complex[Tensor, "B ..."]]:
        """The recurrent form."""
        return self._step(self._system(rate), x, state, interval)
