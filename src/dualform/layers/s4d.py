"""S4D: a diagonal, time-invariant state space model per channel."""

from typing import ClassVar

from dualform.core.discretize import EXPONENTS, RULES
from dualform.core.nplr import DIAGONALS
from dualform.core.options import options
from dualform.layers.diagonal import DiagonalSystem
from dualform.layers.lti import ContinuousLTI
from dualform.layers.poles import check_choice, check_pairs
from dualform.layers.structured import Structured

INITS = DIAGONALS  # the poles at the start


@options
class S4DConfig:
    """Sizes and initialisation of an :class:`S4D`.

    Args:
        d_state: eigenvalues of the state matrix of a channel; even, as they come in conjugate pairs, of which the state
            holds one each.
        init: the poles at the start, a key of :data:`INITS`, see :func:`dualform.core.nplr.diagonal`.
        rule: discretisation, ``zoh`` or ``bilinear``.
        dt_min: smallest step size at the start; steps are spread evenly in their logarithm.
        dt_max: largest step size at the start.
        bidirectional: whether outputs depend on later inputs too; such a layer is not causal and has no state.
    """

    d_state: int = 64
    init: str = "lin"
    rule: str = "zoh"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    bidirectional: bool = False

    def build(self, d_model: int) -> "S4D":
        """The layer, freshly initialised."""
        return S4D(self, d_model)


class S4D(Structured, ContinuousLTI):
    """``h_t = Abar h_{t-1} + Bbar x_t``, ``s_t = 2 Re(C h_t) + D x_t``, ``y_t = GLU(W gelu(s_t) + b)``.

    Abar and Bbar discretise ``(A, 1)`` for the N poles A of each channel; the input vector is part of C. For the
    parametrisation, ``rate`` and bidirectional layers see :class:`~dualform.layers.structured.Structured`. With
    ``intervals``, ``zoh`` is applied to each interval, ``bilinear`` to the layer's own step, whose powers then span
    the interval.

    Raises:
        ConfigError: for an odd ``d_state``, an unknown ``init`` or ``rule``, or step sizes that are not positive.

    References:
        Gu, Goel, Gupta and Re (2022), arXiv:2206.11893: equation 2 (system), section 3 (kernel, parametrisation),
        section 4 (initialisations).
    """

    _stream_map: ClassVar[str | None] = "out_proj"

    def __init__(self, config: S4DConfig, d_model: int):
        check_pairs("s4d", config.d_state)
        check_choice("s4d", "init", config.init, tuple(INITS))
        check_choice("s4d", "rule", config.rule, tuple(EXPONENTS))
        super().__init__(config, d_model, INITS[config.init](config.d_state))
        self.rule = config.rule

    def _systems(self, rate: float) -> list[DiagonalSystem]:
        A, dt = self._poles(), self._dt(rate)
        log_a, (a, b) = EXPONENTS[self.rule](A, dt), RULES[self.rule](A, dt)
        return [DiagonalSystem(log_a, a, b, C) for C in self._C()]
