"""Hyena with long filters of finite state: each a diagonal system, so that it streams in constant memory."""

import copy
import math
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from dualform.core.nplr import DIAGONALS
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.system import StateSpace
from dualform.core.tree import clone, state_class
from dualform.layers.diagonal import DiagonalSystem
from dualform.layers.hyena_operator import HyenaOperator
from dualform.layers.mixer import Hint, Prepared, check_state
from dualform.layers.poles import check_pairs, check_steps


@options
class HyenaModalConfig:
    """Sizes and initialisation of a :class:`HyenaModal`.

    Args:
        order: N, gates; ``N - 1`` long convolutions per channel.
        d_state: eigenvalues of the state matrix of a filter; even, as they come in conjugate pairs, of which the state
            holds one each.
        d_conv: W, width of the short convolution.
        dt_min: smallest step size at the start, with which poles ``-1/2 + i pi n`` are discretised.
        dt_max: largest step size at the start.
    """

    order: int = 2
    d_state: int = 16
    d_conv: int = 3
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    def build(self, d_model: int) -> "HyenaModal":
        """The layer, freshly initialised."""
        return HyenaModal(self, d_model)


@state_class
class HyenaModalState(NamedTuple):
    """Constant in the length of the context."""

    conv: Tensor  # (B, (N + 1) D, W - 1), the last inputs of the short convolution
    h: Tensor  # (B, N - 1, D, d_state / 2), complex, the states of the filters


class HyenaModal(HyenaOperator):
    """The operator of :class:`~dualform.layers.hyena.Hyena` with filters ``k_t = 2 Re sum_m C_m a_m^t``.

    ``a = exp(-exp(log_decay) + i phase)``, always inside the unit disc. Made from a Hyena by
    :meth:`~dualform.layers.hyena.Hyena.distill`, or trained from the start.

    Raises:
        ConfigError: for an order below 2, an odd ``d_state``, sizes below 1, or step sizes that are not positive.

    References:
        Massaroli, Poli, Fu et al. (2023), "Laughing Hyena Distillery", arXiv:2310.18780: section 3.1 (modal form).
    """

    hints: ClassVar[dict[str, Hint]] = {
        **HyenaOperator.hints,
        "log_decay": Hint(decay=False, max_lr=1e-3),
        "phase": Hint(decay=False, max_lr=1e-3),
    }

    def __init__(self, config: HyenaModalConfig, d_model: int):
        c = config
        super().__init__("hyena_modal", c.order, c.d_conv, d_model)
        check_pairs("hyena_modal", c.d_state)
        check_steps("hyena_modal", c)
        self.config, dtype = config, torch.get_default_dtype()
        A = DIAGONALS["lin"](c.d_state)
        log_dt = math.log(c.dt_min) + torch.rand(c.order - 1, d_model, 1) * math.log(c.dt_max / c.dt_min)
        self.log_decay = nn.Parameter((-A.real).log().to(dtype) + log_dt)
        self.phase = nn.Parameter(A.imag.to(dtype) * log_dt.exp())
        self.C = nn.Parameter(torch.randn(*self.phase.shape, 2) * math.sqrt(0.5) * log_dt.exp()[..., None])

    def init_state(self, batch: int, *, max_len: int = 0) -> HyenaModalState:
        """Zeros; ``max_len`` is ignored."""
        dtype, new = wide(self.D), self.D.new_zeros
        return HyenaModalState(
            conv=new(self._conv_shape(batch), dtype=dtype),
            h=new(batch, *self.phase.shape, dtype=torch.promote_types(dtype, torch.complex64)),
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: HyenaModalState | None = None,
        *,
        cu_seqlens: Borders = None,
    ) -> tuple[Float[Tensor, "B T D"], HyenaModalState]:
        """The parallel form."""
        check_features("hyena_modal", x, self.d_model)
        packing = Packing.of("hyena_modal", cu_seqlens, x)
        rows = x.shape[0] if packing is None else packing.rows
        state = check_state("hyena_modal", state, self.init_state(rows))
        p, conv = self._short(x, state.conv, packing)
        filters, last = self._filters(), []

        def convolve(n: int, u: Tensor) -> Tensor:
            y, h = filters[n].run(u, state.h[:, n], packing)
            last.append(h)
            return y

        return self._gate(p, convolve, x), HyenaModalState(conv, torch.stack(last, 1))

    def step(self, x: Float[Tensor, "B D"], state: HyenaModalState) -> tuple[Float[Tensor, "B D"], HyenaModalState]:
        """The recurrent form."""
        return self._step(self._filters(), x, state)

    def prepare(self) -> Prepared:
        """Steps that do not make the poles anew; see :class:`~dualform.layers.mixer.Prepared`."""
        return Prepared(partial(self._step, clone(self._filters())))

    def kernel(self, length: int) -> Float[Tensor, "n D K"]:
        """The long filters of every channel, ``2 Re sum_m C_m a_m^t``, without the skips D."""
        return torch.stack([system.kernel(length) for system in self._filters()])

    @torch.no_grad()
    def systems(self) -> list[StateSpace]:
        """The long filters, channel by channel and with their skips, on the CPU in float64, with ``dt`` 1."""
        exact = copy.deepcopy(self).to("cpu", torch.float64)
        return [one for filter, D in zip(exact._filters(), exact.D, strict=True) for one in filter.dense(D)]

    @torch.no_grad()
    def set_modes(self, poles: Complex[Tensor, "n D N"], C: Complex[Tensor, "n D N"]) -> None:
        """Overwrite the filters by ``2 Re sum_m C_m poles_m^t``; poles of modulus between 0 and 1, both exclusive."""
        self.log_decay.copy_((-poles.abs().log()).log())
        self.phase.copy_(poles.angle())
        self.C.copy_(torch.view_as_real(C))

    def _step(
        self, filters: tuple[DiagonalSystem, ...], x: Tensor, state: HyenaModalState
    ) -> tuple[Tensor, HyenaModalState]:
        check_features("hyena_modal", x, self.d_model, "B")
        state = check_state("hyena_modal", state, self.init_state(x.shape[0]))
        p, conv = self._short_step(x, state.conv)
        last = []

        def convolve(n: int, u: Tensor) -> Tensor:
            y, h = filters[n].step(u, state.h[:, n])
            last.append(h)
            return y

        return self._gate(p, convolve, x), HyenaModalState(conv, torch.stack(last, 1))

    def _filters(self) -> tuple[DiagonalSystem, ...]:
        dtype = wide(self.D)
        log_a = torch.complex(-self.log_decay.to(dtype).exp(), self.phase.to(dtype))
        C = 2 * torch.view_as_complex(self.C.to(dtype))
        return tuple(map(DiagonalSystem, log_a, log_a.exp(), torch.ones_like(log_a), C))
