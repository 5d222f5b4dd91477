"""LRU: the linear recurrent unit, a diagonal recurrence that is discrete from the start, then GELU and a gated map."""

import math
from typing import ClassVar

import torch
from jaxtyping import Complex
from torch import Tensor, nn

from dualform.core.discretize import hold
from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.shapes import wide
from dualform.layers.lti import ContinuousLTI
from dualform.layers.mimo import MimoSystem
from dualform.layers.mixer import Hint


@options
class LRUConfig:
    """Sizes and initialisation of an :class:`LRU`.

    Args:
        d_state: N, eigenvalues of the state matrix of the layer. They do not come in pairs: the state holds all.
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


class LRU(ContinuousLTI):
    """``h_t = lambda h_{t-1} + gamma B x_t``, ``s_t = Re(C h_t) + D x_t``, ``y_t = GLU(W gelu(s_t) + b)``.

    The N eigenvalues ``lambda = exp(-exp(nu_log) + i exp(theta_log))`` lie in the unit disc whatever the parameters;
    ``gamma = exp(gamma_log)`` starts at ``sqrt(1 - |lambda|^2)``, with which white noise keeps its variance. The
    layer has no step of its own: ``rate``, and ``intervals`` s, raise the eigenvalues to that power,
    ``lambda^s = exp(s log lambda)``, and hold the input for as long. For the state ``(B, N)`` see
    :class:`~dualform.layers.lti.LTI`.

    Raises:
        ConfigError: for sizes below 1, or a ring or phase that does not fit the unit disc.

    References:
        Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu and De (2023), "Resurrecting recurrent neural networks for
        long sequences", arXiv:2303.06349: lemma 3.2 (ring), section 3.3 (exponential parametrisation), section 3.4
        (normalisation), appendix A (code).
    """

    _stream_map: ClassVar[str | None] = "out_proj"
    hints: ClassVar[dict[str, Hint]] = {
        "nu_log": Hint(decay=False, max_lr=1e-3),
        "theta_log": Hint(decay=False, max_lr=1e-3),
        "gamma_log": Hint(decay=False, max_lr=1e-3),
        "B": Hint(decay=False, max_lr=1e-3),
        "D": Hint(decay=False),
    }

    def __init__(self, config: LRUConfig, d_model: int):
        c, dtype = config, torch.get_default_dtype()
        if min(c.d_state, d_model) < 1:
            raise ConfigError(f"lru: d_state is {c.d_state} and d_model {d_model}, expected at least 1")
        if not 0 <= c.r_min <= c.r_max <= 1 or c.r_max == 0:
            raise ConfigError(f"lru: r_min {c.r_min} and r_max {c.r_max}, expected 0 <= r_min <= r_max <= 1, r_max > 0")
        if not c.max_phase > 0:
            raise ConfigError(f"lru: max_phase is {c.max_phase}, expected a positive angle in radians")
        super().__init__(d_model, (c.d_state,))
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

    def log_eigenvalues(self) -> Complex[Tensor, " N"]:
        """``log lambda = -exp(nu_log) + i exp(theta_log)``."""
        dtype = wide(self.nu_log)
        return torch.complex(-self.nu_log.to(dtype).exp(), self.theta_log.to(dtype).exp())

    def _systems(self, rate: float) -> list[MimoSystem]:
        log_a, gain = self.log_eigenvalues(), self.gamma_log.to(wide(self.gamma_log)).exp()
        B, C = (torch.view_as_complex(m.to(wide(m))) for m in (self.B, self.C))
        if rate != 1:
            gain = gain * hold(log_a, torch.full_like(gain, rate))[1]
            log_a = rate * log_a
        return [MimoSystem(log_a, log_a.exp(), gain[:, None] * B, C)]
