"""What S4, S4D and DSS share: a linear time-invariant model per channel between GELU and a gated output map."""

import math
from abc import abstractmethod
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.packing import check_cu_seqlens
from dualform.core.shapes import check_tensors, wide
from dualform.layers.mixer import Hint, Mixer, exactly


@runtime_checkable
class Sizes(Protocol):
    """What the config of a structured layer has."""

    @property
    def d_state(self) -> int: ...
    @property
    def dt_min(self) -> float: ...
    @property
    def dt_max(self) -> float: ...
    @property
    def bidirectional(self) -> bool: ...


@runtime_checkable
class System(Protocol):
    """The discrete models of all channels, without C and D."""

    def run(self, u: Tensor, h: Tensor, cu_seqlens: Tensor | None, C: Tensor) -> tuple[Tensor, Tensor]:
        """The parallel form: ``2 Re(C h)`` ``(B, T, D)`` and the final states ``(rows, D, N)``; C ``(D, N)``."""
        ...

    def step(self, u: Tensor, h: Tensor) -> Tensor:
        """The next states: ``u`` ``(B, D)``, ``h`` ``(B, D, N)``."""
        ...

    def kernel(self, C: Tensor, length: int) -> Tensor:
        """``2 Re(C Abar^l Bbar)`` for ``l < length``, ``(D, length)``."""
        ...


class Structured(Mixer):
    """``h_t = Abar h_{t-1} + Bbar x_t``, ``s_t = 2 Re(C h_t) + D x_t``, ``y_t = GLU(W gelu(s_t) + b)``.

    Each of D channels has N = ``d_state / 2`` poles ``A = -exp(log_A_re) + i A_im``, one of each conjugate pair, and
    a step ``dt = exp(log_dt)``: whatever training does, A stays in the stable half plane and dt positive. The state
    is h, ``(B, D, N)``, complex64 or, with float64 weights, complex128; everything before the output map is computed
    in that precision. ``rate`` multiplies dt: 2 for inputs sampled half as often as those the layer was trained on.

    A bidirectional layer has a second output vector C' and adds ``sum_{i > t} 2 Re(C' Abar^(i - t - 1) Bbar) x_i``
    to ``s_t``; C then holds both, ``(2, D, N, 2)``, that of the past first.

    Args:
        config: sizes.
        d_model: D.
        A: ``(N,)`` or ``(D, N)``, the poles at the start; real parts above -1e-4 are moved there.

    Raises:
        ConfigError: for an odd ``d_state``, or step sizes that are not positive.
    """

    hints: ClassVar[dict[str, Hint]] = {
        "log_dt": Hint(decay=False, max_lr=1e-3),
        "log_A_re": Hint(decay=False, max_lr=1e-3),
        "A_im": Hint(decay=False, max_lr=1e-3),
        "D": Hint(decay=False),
    }

    def __init__(self, config: Sizes, d_model: int, A: Tensor):
        super().__init__()
        c, dtype = config, torch.get_default_dtype()
        self.d_model, self.causal = d_model, not c.bidirectional
        if not 0 < c.dt_min <= c.dt_max:
            raise ConfigError(f"{self._name}: dt_min {c.dt_min} and dt_max {c.dt_max}, expected 0 < dt_min <= dt_max")
        A, ways = A.expand(d_model, -1), () if self.causal else (2,)
        self.log_dt = nn.Parameter(math.log(c.dt_min) + torch.rand(d_model) * math.log(c.dt_max / c.dt_min))
        self.log_A_re = nn.Parameter((-A.real).clamp_min(1e-4).log().to(dtype))
        self.A_im = nn.Parameter(A.imag.to(dtype, copy=True, memory_format=torch.contiguous_format))
        self.C = nn.Parameter(torch.randn(*ways, *A.shape, 2) * math.sqrt(0.5))  # (real, imaginary)
        self.D = nn.Parameter(torch.randn(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def init_state(self, batch: int, *, max_len: int = 0) -> Complex[Tensor, "B D N"]:
        """Zeros."""
        self._check_causal()
        return self._zeros(batch)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: Complex[Tensor, "rows D N"] | None = None,
        *,
        cu_seqlens: Int[Tensor, " n"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        """The parallel form. States are never held for every token."""
        return self._forward(x, state, cu_seqlens, rate)

    def step(
        self, x: Float[Tensor, "B D"], state: Complex[Tensor, "B D N"], *, rate: float = 1.0
    ) -> tuple[Float[Tensor, "B D"], Complex[Tensor, "B D N"]]:
        """The recurrent form."""
        h, u = self._begin_step(x, state)
        with exactly(x.device.type):
            h = self._system(self._dt(rate)).step(u, h)
        return self._end_step(x, u, h)

    def kernel(self, length: int, *, rate: float = 1.0) -> Float[Tensor, "... D K"]:
        """The response of the models to an impulse, ``2 Re(C Abar^l Bbar)``, without the skip D.

        From the zero state s is the causal convolution of x with it, plus ``D x``. Of a bidirectional layer
        ``(2, D, K)``, the second for the inputs to come, from the next one on.
        """
        with exactly(self.log_dt.device.type):
            system, C = self._system(self._dt(rate)), self._C()
            kernels = [system.kernel(way, length) for way in ((C,) if self.causal else C)]
        return kernels[0] if self.causal else torch.stack(kernels)

    @abstractmethod
    def _system(self, dt: Tensor) -> Any:
        """The :class:`System` for step sizes ``(D, 1)``."""

    def _forward(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, rate: float, *more: Tensor
    ) -> tuple[Tensor, Any]:
        """The parallel form; ``more`` is what else there is for every token, ``(B, T)``."""
        check_tensors(self._name, x=(x, f"B T {self.d_model}"))
        rows = x.shape[0] if cu_seqlens is None else check_cu_seqlens(self._name, cu_seqlens, *x.shape[:2])
        h, dt = self._state(x, state, rows), self._dt(rate)
        if x.numel() == 0:
            return x, h if self.causal else ()
        borders = None if cu_seqlens is None else cu_seqlens.to(x.device, torch.int64)
        with exactly(x.device.type):
            system, C = self._system(dt), self._C()
        if self.causal:
            s, h = system.run(x, h, borders, C, *more)
            return self._out(self._skip(s, x), x), h
        past, _ = system.run(x, h, borders, C[0], *more)
        turned = None if borders is None else x.shape[1] - borders.flip(0)
        future, _ = system.run(x.flip(1), h, turned, C[1], *(m.flip(1) for m in more))
        first = torch.zeros(1, dtype=torch.int64, device=x.device) if borders is None else borders[:-1]
        future = future.flip(1).index_fill(1, first[first < x.shape[1]], 0).roll(-1, 1)
        return self._out(self._skip(past + future, x), x), ()

    def _begin_step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self._check_causal()
        check_tensors(self._name, x=(x, f"B {self.d_model}"))
        return self._state(x, state, len(x)), x.to(wide(self.log_dt))

    def _end_step(self, x: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self._out(self._skip(2 * (self._C() * h).sum(-1).real, u), x), h

    def _skip(self, s: Tensor, u: Tensor) -> Tensor:
        """``s + D u``, in the memory of s where it is its own."""
        if torch.compiler.is_compiling() or s._is_view():
            return torch.addcmul(s, u, self.D.to(s.dtype))
        return s.addcmul_(u, self.D.to(s.dtype))

    def _out(self, s: Tensor, x: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(s).to(x.dtype)), -1)

    def _dt(self, rate: float) -> Tensor:
        if not 0 < rate < math.inf:
            raise ArgumentError(
                f"{self._name}: rate is {rate}, expected a positive number",
                hint="2 for inputs sampled half as often as in training, 0.5 for twice as often",
            )
        return self.log_dt.to(wide(self.log_dt)).exp()[:, None] * rate

    def _poles(self) -> Tensor:
        dtype = wide(self.log_dt)
        return torch.complex(-self.log_A_re.to(dtype).exp(), self.A_im.to(dtype))

    def _C(self) -> Tensor:
        return torch.view_as_complex(self.C.to(wide(self.log_dt)))

    def _zeros(self, rows: int) -> Tensor:
        dtype = torch.promote_types(wide(self.log_dt), torch.complex64)
        return torch.zeros(rows, *self.A_im.shape, dtype=dtype, device=self.A_im.device)

    def _state(self, x: Tensor, state: Tensor | None, rows: int) -> Tensor:
        zeros = self._zeros(rows)
        if state is None:
            return zeros
        self._check_causal()
        width, poles = self.A_im.shape
        check_tensors(self._name, x=(x, "* ..."), state=(state, f"{rows} {width} {poles}"))
        return state.to(zeros.dtype)

    def _check_causal(self) -> None:
        if not self.causal:
            raise ArgumentError(
                f"{self._name}: a bidirectional layer has no state and no step: its outputs depend on inputs to come",
                hint="call forward on whole sequences, without a state",
            )

    @property
    def _name(self) -> str:
        return type(self).__name__.lower()


def check_choice(where: str, name: str, value: str, known: tuple[str, ...]) -> None:
    """That a word of a config is one of those that exist.

    Raises:
        ConfigError: lists them.
    """
    if value not in known:
        raise ConfigError(f"{where}: {name} {value!r} is unknown", hint=f"one of {', '.join(known)}")


def check_pairs(where: str, d_state: int) -> None:
    """That a state is made of conjugate pairs.

    Raises:
        ConfigError: for a size that is odd or below 2.
    """
    if d_state < 2 or d_state % 2:
        raise ConfigError(f"{where}: d_state is {d_state}, expected an even number: poles come in conjugate pairs")
