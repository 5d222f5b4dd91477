"""S5: one diagonal state space model for all channels together, then a gated GELU."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualform.core.discretize import EXPONENTS, RULES
from dualform.core.errors import ConfigError
from dualform.core.nplr import nplr
from dualform.core.options import options
from dualform.core.shapes import wide
from dualform.layers.lti import ContinuousLTI
from dualform.layers.mimo import MimoSystem
from dualform.layers.mixer import Hint
from dualform.layers.poles import Poles, check_choice


@options
class S5Config:
    """Sizes and initialisation of an :class:`S5`.

    Args:
        d_state: eigenvalues of the state matrix of the layer; with ``conj_pairs`` the state holds one of each pair.
        blocks: J, blocks on its diagonal at the start, each the normal part of a HiPPO-LegS matrix of
            ``d_state / blocks`` eigenvalues, an even number.
        rule: discretisation, ``zoh`` or ``bilinear``.
        conj_pairs: whether eigenvalues come in conjugate pairs, as those of a real system do; the state then is half as
            large.
        dt_min: smallest step size at the start; steps are spread evenly in their logarithm.
        dt_max: largest step size at the start.
        bidirectional: whether a second recurrence runs from the end; such a layer is not causal and has no state.
    """

    d_state: int = 64
    blocks: int = 1
    rule: str = "zoh"
    conj_pairs: bool = True
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    bidirectional: bool = False

    def build(self, d_model: int) -> "S5":
        """The layer, freshly initialised."""
        return S5(self, d_model)


class S5(Poles, ContinuousLTI):
    """``h_t = Abar h_{t-1} + Bbar x_t``, ``s_t = 2 Re(C h_t) + D x_t``, ``y_t = gelu(s_t) sigmoid(W gelu(s_t) + b)``.

    The state matrix is diagonal with N poles and N steps, see :class:`~dualform.layers.poles.Poles`; B is ``(N, D)``
    and C ``(D, N)``; ``Abar, Bbar`` discretise them. N is half of ``d_state`` with conjugate pairs, and all of it
    without; there is no factor 2 then. For the state ``(B, N)``, ``intervals`` and ``rate`` see
    :class:`~dualform.layers.lti.LTI` and :class:`~dualform.layers.lti.ContinuousLTI`.

    A bidirectional layer adds ``2 Re(C' h'_t)`` with ``h'_t = Abar h'_{t+1} + Bbar x_t``.

    With ``intervals``, ``zoh`` is applied to each interval; ``bilinear`` to the layer's own step, whose powers then
    span the interval. The recurrence from the end reads each interval at its beginning.

    Raises:
        ConfigError: for blocks that do not divide ``d_state`` into even parts, an unknown rule, or step sizes that
            are not positive.

    References:
        Smith, Warrington and Linderman (2023), "Simplified state space layers for sequence modeling",
        arXiv:2208.04933: section 3 (system, diagonalisation), section 4.3 and appendix B (HiPPO-N, blocks, conjugate
        pairs, steps), appendix G.1 (gate).
    """

    residual: ClassVar[tuple[str, ...]] = ("C", "D")  # its gate is no map into the stream
    _stream_map: ClassVar[str | None] = "gate"
    hints: ClassVar[dict[str, Hint]] = {**Poles.hints, "B": Hint(decay=False, max_lr=1e-3)}
    _next_first: ClassVar[bool] = False

    def __init__(self, config: S5Config, d_model: int):
        c = config
        if c.blocks < 1 or c.d_state < 2 or c.d_state % (2 * c.blocks):
            raise ConfigError(
                f"s5: d_state {c.d_state} does not split into {c.blocks} blocks of an even number of eigenvalues",
                hint="make d_state a multiple of 2 * blocks",
            )
        check_choice("s5", "rule", c.rule, tuple(EXPONENTS))
        A, B, C = _hippo(c, d_model)
        super().__init__(d_model, A.shape, c.bidirectional)
        self.config, dtype = c, torch.get_default_dtype()
        self._set_poles(A, len(A), c)
        self.B = nn.Parameter(torch.view_as_real(B).to(dtype))  # (N, D, 2), (real, imaginary)
        self.C = nn.Parameter(torch.view_as_real(C).to(dtype))  # (D, N, 2); bidirectional (D, 2 N, 2), forward first
        self.D = nn.Parameter(torch.randn(d_model))
        self.gate = nn.Linear(d_model, d_model)

    def _systems(self, rate: float) -> list[MimoSystem]:
        A, dt = self._poles(), self._dt(rate)
        log_a, (a, factor) = EXPONENTS[self.config.rule](A, dt), RULES[self.config.rule](A, dt)
        B, C = (torch.view_as_complex(m.to(wide(m))) for m in (self.B, self.C))
        C = 2 * C if self.config.conj_pairs else C
        return [MimoSystem(log_a, a, factor[:, None] * B, part) for part in C.split(len(A), 1)]

    def _out(self, s: Tensor, x: Tensor) -> Tensor:
        g = F.gelu(s).to(x.dtype)
        return g * torch.sigmoid(self.gate(g))


def _hippo(c: S5Config, d_model: int) -> tuple[Tensor, Tensor, Tensor]:
    """Poles ``(N,)``, B ``(N, D)`` and C ``(D, N)`` in the eigenvectors of J blocks of HiPPO-N."""
    hippo, size = nplr("legs", c.d_state // c.blocks), c.d_state // c.blocks
    A, V = hippo.Lambda, hippo.V
    if not c.conj_pairs:
        A, V = torch.cat([A, A.conj()]), torch.cat([V, V.conj()], 1)
    B = V.mH @ _normal(c.d_state, d_model).view(c.blocks, size, d_model).to(V.dtype)
    C = []
    for _ in range(1 + c.bidirectional):
        parts = _normal(c.d_state, d_model, 2).view(c.blocks, size, d_model, 2)
        C.append((torch.view_as_complex(parts).permute(2, 0, 1) @ V).flatten(1))
    return A.repeat(c.blocks), B.flatten(0, 1), torch.cat(C, 1)


def _normal(fan_in: int, *shape: int) -> Tensor:
    """``(fan_in, *shape)`` of variance ``1 / fan_in``, from a normal distribution cut off at two deviations."""
    std = 1 / (math.sqrt(fan_in) * 0.87962566103423978)  # the deviation of the standard one after the cut
    return nn.init.trunc_normal_(torch.empty(fan_in, *shape, dtype=torch.float64), 0.0, std, -2 * std, 2 * std)
