"""LRU: the linear recurrent unit, a diagonal recurrence that is discrete from the start, then GELU and a gated map."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int, Real
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import check_cu_seqlens
from dualform.core.shapes import check_tensors, wide
from dualform.layers.mimo import Mimo
from dualform.layers.mixer import Hint, Mixer, check_intervals, exactly


@options
class LRUConfig:
    """Sizes and initialisation of an :class:`LRU`.

    Args:
        d_state: N, complex states of the layer.
        r_min: smallest modulus of the eigenvalues at the start; they are spread evenly over the ring's area.
        r_max: largest modulus at the start.
        max_phase: largest phase at the start, in radians; small phases help with long memories.
    """

    d_state: int = 64
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 2 * math.pi

    def build(self, d_model: int) -> "LRU":
        """The layer, freshly initialised."""
        return LRU(self, d_model)


class LRU(Mixer):
    """``h_t = lambda h_{t-1} + gamma B x_t``, ``s_t = Re(C h_t) + D x_t``, ``y_t = GLU(W gelu(s_t) + b)``.

    The N eigenvalues ``lambda = exp(-exp(nu_log) + i exp(theta_log))`` lie in the unit disc whatever the parameters;
    ``gamma = exp(gamma_log)`` starts at ``sqrt(1 - |lambda|^2)``, with which white noise keeps its variance. The
    state is h, ``(B, N)``, complex64 or, with float64 weights, complex128; everything before the output map is
    computed in that precision.

    With ``intervals`` s, the eigenvalues are raised to the power s, ``lambda^s = exp(s log lambda)``.

    Raises:
        ConfigError: for sizes below 1, or a ring or phase that does not fit the unit disc.

    References:
        Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu and De (2023), "Resurrecting recurrent neural networks for
        long sequences", arXiv:2303.06349: lemma 3.2 (ring), section 3.3 (exponential parametrisation), section 3.4
        (normalisation), appendix A (code).
    """

    continuous: ClassVar[bool] = True
    hints: ClassVar[dict[str, Hint]] = {
        "nu_log": Hint(decay=False, max_lr=1e-3),
        "theta_log": Hint(decay=False, max_lr=1e-3),
        "gamma_log": Hint(decay=False, max_lr=1e-3),
        "B": Hint(decay=False, max_lr=1e-3),
        "D": Hint(decay=False),
    }

    def __init__(self, config: LRUConfig, d_model: int):
        super().__init__()
        c, self.config, self.d_model, dtype = config, config, d_model, torch.get_default_dtype()
        if min(c.d_state, d_model) < 1:
            raise ConfigError(f"lru: d_state is {c.d_state} and d_model {d_model}, expected at least 1")
        if not 0 <= c.r_min <= c.r_max <= 1 or c.r_max == 0:
            raise ConfigError(f"lru: r_min {c.r_min} and r_max {c.r_max}, expected 0 <= r_min <= r_max <= 1, r_max > 0")
        if not c.max_phase > 0:
            raise ConfigError(f"lru: max_phase is {c.max_phase}, expected a positive angle in radians")
        even = (torch.rand(2, c.d_state, dtype=torch.float64) + 1e-9) / (1 + 2e-9)  # neither 0 nor 1
        squared = c.r_min**2 + even[0] * (c.r_max**2 - c.r_min**2)
        squared = squared.clamp(max=1 - 1e-9)
        self.nu_log = nn.Parameter((-0.5 * squared.log()).log().to(dtype))
        self.theta_log = nn.Parameter((c.max_phase * even[1]).log().to(dtype))
        self.gamma_log = nn.Parameter((0.5 * torch.log1p(-squared)).to(dtype))
        self.B = nn.Parameter(torch.randn(c.d_state, d_model, 2) / math.sqrt(2 * d_model))  # (real, imaginary)
        self.C = nn.Parameter(torch.randn(d_model, c.d_state, 2) / math.sqrt(c.d_state))
        self.D = nn.Parameter(torch.randn(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def init_state(self, batch: int, *, max_len: int = 0) -> Complex[Tensor, "B N"]:
        """Zeros."""
        dtype = torch.promote_types(wide(self.nu_log), torch.complex64)
        return torch.zeros(batch, len(self.nu_log), dtype=dtype, device=self.nu_log.device)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: Complex[Tensor, "rows N"] | None = None,
        *,
        cu_seqlens: Int[Tensor, " n"] | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Complex[Tensor, "rows N"]]:
        """The parallel form. Of a long sequence the states are held for one span at a time."""
        check_tensors("lru", x=(x, f"B T {self.d_model}"))
        rows = x.shape[0] if cu_seqlens is None else check_cu_seqlens("lru", cu_seqlens, *x.shape[:2])
        intervals = check_intervals("lru", x, intervals, wide(self.nu_log))
        h = self._state(x, state, rows)
        if x.numel() == 0:
            return x, h
        with exactly(x.device.type):
            u = x.to(wide(self.nu_log))
            y, h = self._system().run(u, h, cu_seqlens=cu_seqlens, intervals=intervals)
        return self._out(y, u, x), h

    def step(
        self, x: Float[Tensor, "B D"], state: Complex[Tensor, "B N"], interval: Real[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B D"], Complex[Tensor, "B N"]]:
        """The recurrent form."""
        check_tensors("lru", x=(x, f"B {self.d_model}"))
        interval = check_intervals("lru", x, interval, wide(self.nu_log))
        h, u = self._state(x, state, len(x)), x.to(wide(self.nu_log))
        with exactly(x.device.type):
            y, h = self._system().step(u, h, interval)
        return self._out(y, u, x), h

    def log_eigenvalues(self) -> Complex[Tensor, " N"]:
        """``log lambda = -exp(nu_log) + i exp(theta_log)``."""
        dtype = wide(self.nu_log)
        return torch.complex(-self.nu_log.to(dtype).exp(), self.theta_log.to(dtype).exp())

    def _system(self) -> Mimo:
        log_a, dtype = self.log_eigenvalues(), wide(self.nu_log)
        B = self.gamma_log.to(dtype).exp()[:, None] * torch.view_as_complex(self.B.to(dtype))
        return Mimo(log_a.exp(), log_a, B, torch.view_as_complex(self.C.to(dtype)))

    def _out(self, y: Tensor, u: Tensor, x: Tensor) -> Tensor:
        s = y.addcmul_(u, self.D.to(u.dtype))
        return F.glu(self.out_proj(F.gelu(s).to(x.dtype)), -1)

    def _state(self, x: Tensor, state: Tensor | None, rows: int) -> Tensor:
        start = self.init_state(rows)
        if state is None:
            return start
        check_tensors("lru", x=(x, "* ..."), state=(state, f"{rows} {len(self.nu_log)}"))
        return state.to(start.dtype)
