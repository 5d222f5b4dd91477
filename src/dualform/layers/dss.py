"""DSS: diagonal state spaces, whose kernel is a sum of exponentials, each normalised like a row of a softmax."""

import math
from typing import ClassVar

import torch

from dualform.core.discretize import zoh
from dualform.core.errors import ConfigError
from dualform.core.nplr import DIAGONALS
from dualform.core.options import options
from dualform.layers.diagonal import DiagonalSystem
from dualform.layers.lti import ContinuousLTI
from dualform.layers.poles import check_choice, check_pairs
from dualform.layers.structured import Structured

KERNELS = ("softmax", "exp")
_EPSILON = 1e-7  # of the paper's bounded reciprocal


@options
class DSSConfig:
    """Sizes and initialisation of a :class:`DSS`.

    Args:
        d_state: eigenvalues of the state matrix of a channel; even, as they come in conjugate pairs, of which the state
            holds one each. Twice the N of the paper, which is 64 there.
        kernel: ``softmax`` or ``exp``.
        length: L, the number of taps over which ``softmax`` normalises: the length of the training sequences.
        init: the poles at the start, a key of :data:`~dualform.core.nplr.DIAGONALS`; ``legs`` is the paper's.
        dt_min: smallest step size at the start; steps are spread evenly in their logarithm.
        dt_max: largest step size at the start.
        bidirectional: whether outputs depend on later inputs too; such a layer is not causal and has no state.
    """

    d_state: int = 128
    kernel: str = "softmax"
    length: int = 1024
    init: str = "legs"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    bidirectional: bool = False

    def build(self, d_model: int) -> "DSS":
        """The layer, freshly initialised."""
        return DSS(self, d_model)


class DSS(Structured, ContinuousLTI):
    """``s`` is the causal convolution of x with K plus ``D x``; ``y_t = GLU(W gelu(s_t) + b)``.

        exp:      K_l = Re sum_n C_n (exp(dt A_n) - 1) / A_n  exp(l dt A_n)
        softmax:  K_l = Re sum_n C_n / A_n  exp(l dt A_n) / (exp(0) + .. + exp((L - 1) dt A_n))

    Both are recurrences with ``Abar = exp(dt A)``, and that is how they run. L is a number of the config, not the
    length of the sequence at hand, or the kernel would change from one chunk of it to the next. The poles A have a
    negative real part in both; the paper leaves it free for ``softmax``, where a mode that grows has no recurrence.

    For the parametrisation, ``rate`` and bidirectional layers see :class:`~dualform.layers.structured.Structured`;
    the w of the paper is C here. The output map is that of S4.

    Raises:
        ConfigError: for an odd ``d_state``, an unknown ``kernel`` or ``init``, a length below 1, or step sizes that
            are not positive.

    References:
        Gupta, Gu and Berant (2022), "Diagonal state spaces are as effective as structured state spaces",
        arXiv:2203.14343: Proposition 1 (kernels), section 3.2 (DSS-exp and DSS-softmax), appendix A (reciprocal).
    """

    _stream_map: ClassVar[str | None] = "out_proj"

    def __init__(self, config: DSSConfig, d_model: int):
        check_pairs("dss", config.d_state)
        check_choice("dss", "kernel", config.kernel, KERNELS)
        check_choice("dss", "init", config.init, tuple(DIAGONALS))
        if config.length < 1:
            raise ConfigError(f"dss: length is {config.length}, expected at least 1")
        super().__init__(config, d_model, DIAGONALS[config.init](config.d_state))
        with torch.no_grad():
            self.C.mul_(math.sqrt(2))  # each part from the standard normal distribution
        self.length = config.length if config.kernel == "softmax" else None

    def _systems(self, rate: float) -> list[DiagonalSystem]:
        A, dt = self._poles(), self._dt(rate)
        if self.length is None:
            a, b = zoh(A, dt)
        else:
            a = torch.exp(dt * A)
            x = A * torch.expm1(self.length * self._dt() * A)
            b = torch.expm1(dt * A) * x.conj() / (x * x.conj() + _EPSILON)
        return [DiagonalSystem(dt * A, a, b / 2, C) for C in self._C()]  # the half of Re(z) = (z + conj(z)) / 2
