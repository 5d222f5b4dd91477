"""S5: one diagonal state space model for all channels together, then a gated GELU."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int, Real
from torch import Tensor, nn

from dualform.core.discretize import EXPONENTS, RULES
from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.nplr import nplr
from dualform.core.options import options
from dualform.core.packing import check_cu_seqlens
from dualform.core.shapes import check_tensors, wide
from dualform.layers.mimo import Mimo
from dualform.layers.mixer import Hint, Mixer, check_intervals, exactly


@options
class S5Config:
    """Sizes and initialisation of an :class:`S5`.

    Args:
        d_state: eigenvalues of the state matrix.
        blocks: J, blocks on its diagonal at the start, each the normal part of a HiPPO-LegS matrix of
            ``d_state / blocks`` eigenvalues, an even number.
        rule: discretisation, ``zoh`` or ``bilinear``.
        conj_pairs: whether eigenvalues come in conjugate pairs; the state then holds one of each pair, and half as
            many numbers do the same work.
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


class S5(Mixer):
    """``h_t = Abar h_{t-1} + Bbar x_t``, ``s_t = 2 Re(C h_t) + D x_t``, ``y_t = gelu(s_t) sigmoid(W gelu(s_t) + b)``.

    The state matrix is diagonal with N poles ``A = -exp(log_A_re) + i A_im`` and steps ``dt = exp(log_dt)``, B is
    ``(N, D)`` and C ``(D, N)``; ``Abar, Bbar`` discretise them. N is half of ``d_state`` with conjugate pairs, and
    all of it without; there is no factor 2 then. The state is h, ``(B, N)``, complex64 or, with float64 weights,
    complex128; everything before the output map is computed in that precision.

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

    continuous: ClassVar[bool] = True
    residual: ClassVar[tuple[str, ...]] = ("C", "D")  # its gate is no map into the stream
    hints: ClassVar[dict[str, Hint]] = {
        "log_dt": Hint(decay=False, max_lr=1e-3),
        "log_A_re": Hint(decay=False, max_lr=1e-3),
        "A_im": Hint(decay=False, max_lr=1e-3),
        "B": Hint(decay=False, max_lr=1e-3),
        "D": Hint(decay=False),
    }

    def __init__(self, config: S5Config, d_model: int):
        super().__init__()
        c, self.config, self.d_model, dtype = config, config, d_model, torch.get_default_dtype()
        if c.blocks < 1 or c.d_state < 2 or c.d_state % (2 * c.blocks):
            raise ConfigError(
                f"s5: d_state {c.d_state} does not split into {c.blocks} blocks of an even number of eigenvalues",
                hint="make d_state a multiple of 2 * blocks",
            )
        if c.rule not in EXPONENTS:
            raise ConfigError(f"s5: rule {c.rule!r} is unknown", hint=f"one of {', '.join(EXPONENTS)}")
        if not 0 < c.dt_min <= c.dt_max:
            raise ConfigError(f"s5: dt_min {c.dt_min} and dt_max {c.dt_max}, expected 0 < dt_min <= dt_max")
        self.causal = not c.bidirectional
        A, B, C = _hippo(c, d_model)
        self.log_dt = nn.Parameter(math.log(c.dt_min) + torch.rand(len(A)) * math.log(c.dt_max / c.dt_min))
        self.log_A_re = nn.Parameter((-A.real).log().to(dtype))
        self.A_im = nn.Parameter(A.imag.to(dtype))
        self.B = nn.Parameter(torch.view_as_real(B).to(dtype))  # (N, D, 2), (real, imaginary)
        self.C = nn.Parameter(torch.view_as_real(C).to(dtype))  # (D, N, 2); bidirectional (D, 2 N, 2), forward first
        self.D = nn.Parameter(torch.randn(d_model))
        self.gate = nn.Linear(d_model, d_model)

    def init_state(self, batch: int, *, max_len: int = 0) -> Complex[Tensor, "B N"]:
        """Zeros."""
        self._check_causal()
        return self._zeros(batch)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: Complex[Tensor, "rows N"] | None = None,
        *,
        cu_seqlens: Int[Tensor, " n"] | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        """The parallel form. Of a long sequence the states are held for one span at a time."""
        check_tensors("s5", x=(x, f"B T {self.d_model}"))
        rows = x.shape[0] if cu_seqlens is None else check_cu_seqlens("s5", cu_seqlens, *x.shape[:2])
        intervals = check_intervals("s5", x, intervals, wide(self.log_dt))
        h = self._state(x, state, rows)
        if x.numel() == 0:
            return x, h if self.causal else ()
        with exactly(x.device.type):
            u, (forward, *backward) = x.to(wide(self.log_dt)), self._systems()
            y, last = forward.run(u, h, cu_seqlens=cu_seqlens, intervals=intervals)
            for system in backward:
                turned = None if cu_seqlens is None else x.shape[1] - cu_seqlens.flip(0)
                steps = None if intervals is None else intervals.flip(1)
                y = y + system.run(u.flip(1), h, cu_seqlens=turned, intervals=steps)[0].flip(1)
        return self._out(y, u, x), last if self.causal else ()

    def step(
        self, x: Float[Tensor, "B D"], state: Complex[Tensor, "B N"], interval: Real[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B D"], Complex[Tensor, "B N"]]:
        """The recurrent form."""
        self._check_causal()
        check_tensors("s5", x=(x, f"B {self.d_model}"))
        interval = check_intervals("s5", x, interval, wide(self.log_dt))
        h, u = self._state(x, state, len(x)), x.to(wide(self.log_dt))
        with exactly(x.device.type):
            y, h = self._systems()[0].step(u, h, interval)
        return self._out(y, u, x), h

    def _systems(self) -> list[Mimo]:
        """The recurrence, or the two of a bidirectional layer."""
        c, dtype = self.config, wide(self.log_dt)
        A = torch.complex(-self.log_A_re.to(dtype).exp(), self.A_im.to(dtype))
        dt = self.log_dt.to(dtype).exp()
        Abar, factor = RULES[c.rule](A, dt)
        B = factor[:, None] * torch.view_as_complex(self.B.to(dtype))
        C = torch.view_as_complex(self.C.to(dtype)) * (2 if c.conj_pairs else 1)
        return [Mimo(Abar, EXPONENTS[c.rule](A, dt), B, part) for part in C.split(len(A), 1)]

    def _out(self, y: Tensor, u: Tensor, x: Tensor) -> Tensor:
        g = F.gelu(y.addcmul_(u, self.D.to(u.dtype))).to(x.dtype)
        return g * torch.sigmoid(self.gate(g))

    def _zeros(self, rows: int) -> Tensor:
        dtype = torch.promote_types(wide(self.log_dt), torch.complex64)
        return torch.zeros(rows, len(self.A_im), dtype=dtype, device=self.A_im.device)

    def _state(self, x: Tensor, state: Tensor | None, rows: int) -> Tensor:
        start = self._zeros(rows)
        if state is None:
            return start
        self._check_causal()
        check_tensors("s5", x=(x, "* ..."), state=(state, f"{rows} {len(self.A_im)}"))
        return state.to(start.dtype)

    def _check_causal(self) -> None:
        if not self.causal:
            raise ArgumentError(
                "s5: a bidirectional layer has no state and no step: its outputs depend on inputs still to come",
                hint="call forward on whole sequences, without a state",
            )


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
