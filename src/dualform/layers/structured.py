"""What S4, S4D and DSS share: one system per channel, with one input and one output."""

import math
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.shapes import wide
from dualform.layers.lti import LTI
from dualform.layers.poles import Poles, Steps, check_rate
from dualform.ops.dispatch import exactly


class Sizes(Steps, Protocol):
    """What the config of a structured layer has."""

    @property
    def bidirectional(self) -> bool: ...


class Structured(Poles, LTI):
    """``h_t = Abar h_{t-1} + Bbar x_t``, ``s_t = 2 Re(C h_t) + D x_t``, ``y_t = GLU(W gelu(s_t) + b)``.

    Each of D channels has N = ``d_state / 2`` poles, one of each conjugate pair, and a step of its own, see
    :class:`~dualform.layers.poles.Poles`. For the state, ``rate`` and what is common to the family see
    :class:`~dualform.layers.lti.LTI`.

    A bidirectional layer has a second output vector C' and adds ``sum_{i > t} 2 Re(C' Abar^(i - t - 1) Bbar) x_i``
    to ``s_t``; C then holds both, ``(2, D, N, 2)``, that of the past first.

    Args:
        config: the range of the steps, and whether the layer is bidirectional.
        d_model: D.
        A: ``(N,)`` or ``(D, N)``, the poles at the start; real parts above -1e-4 are moved there.

    Raises:
        ConfigError: for an odd ``d_state``, or step sizes that are not positive.
    """

    def __init__(self, config: Sizes, d_model: int, A: Tensor):
        A = A.expand(d_model, -1)
        super().__init__(d_model, A.shape, config.bidirectional)
        self._set_poles(A, d_model, config)
        ways = (2,) if config.bidirectional else ()
        self.C = nn.Parameter(torch.randn(*ways, *A.shape, 2) * math.sqrt(0.5))  # (real, imaginary)
        self.D = nn.Parameter(torch.randn(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def kernel(self, length: int, *, rate: float = 1.0) -> Float[Tensor, "... D K"]:
        """The response of the systems to an impulse, ``2 Re(C Abar^l Bbar)``, without the skip D.

        From the zero state s is the causal convolution of x with it, plus ``D x``. Of a bidirectional layer
        ``(2, D, K)``, the second for the inputs to come, from the next one on.
        """
        check_rate(self._name, rate)
        with exactly(self.D.device.type):
            kernels = [system.kernel(length) for system in self._systems(rate)]
        return kernels[0] if self.causal else torch.stack(kernels)

    def _C(self) -> list[Tensor]:
        """Twice the output vectors ``(D, N)``, one for each direction."""
        C = 2 * torch.view_as_complex(self.C.to(wide(self.C)))
        return [C] if self.causal else list(C)
