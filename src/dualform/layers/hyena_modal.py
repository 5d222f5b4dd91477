"""Hyena with long filters of finite state: each a diagonal system, so that it streams in constant memory."""

import math
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.nplr import DIAGONALS
from dualform.core.options import options
from dualform.core.packing import check_cu_seqlens
from dualform.core.shapes import check_tensors, wide
from dualform.core.tree import state_class
from dualform.layers.diagonal import Poles
from dualform.layers.hyena_operator import HyenaOperator
from dualform.layers.mixer import Hint
from dualform.layers.structured import check_pairs


@options
class HyenaModalConfig:
    """Sizes and initialisation of a :class:`HyenaModal`.

    Args:
        order: N, gates; ``N - 1`` long convolutions per channel.
        d_state: state size of a filter, real numbers; even, as poles come in conjugate pairs.
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
        if not 0 < c.dt_min <= c.dt_max:
            raise ConfigError(f"hyena_modal: dt_min {c.dt_min} and dt_max {c.dt_max}, expected 0 < dt_min <= dt_max")
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
        cu_seqlens: Int[Tensor, " n"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], HyenaModalState]:
        """The parallel form."""
        check_tensors("hyena_modal", x=(x, f"B T {self.d_model}"))
        rows = x.shape[0] if cu_seqlens is None else check_cu_seqlens("hyena_modal", cu_seqlens, *x.shape[:2])
        state = self._state(x, state, rows)
        if x.numel() == 0:
            return x, state
        p, conv = self._short(x, state.conv, cu_seqlens)
        borders = None if cu_seqlens is None else cu_seqlens.to(x.device, torch.int64)
        C, last = self._C(), []

        def convolve(n: int, u: Tensor) -> Tensor:
            y, h = self._system(n).run(u, state.h[:, n], borders, C[n])
            last.append(h)
            return y

        return self._gate(p, convolve, x), HyenaModalState(conv, torch.stack(last, 1))

    def step(self, x: Float[Tensor, "B D"], state: HyenaModalState) -> tuple[Float[Tensor, "B D"], HyenaModalState]:
        """The recurrent form."""
        check_tensors("hyena_modal", x=(x, f"B {self.d_model}"))
        state = self._state(x, state, len(x))
        p, conv = self._short_step(x, state.conv)
        C, last = self._C(), []

        def convolve(n: int, u: Tensor) -> Tensor:
            last.append(self._system(n).step(u, state.h[:, n]))
            return 2 * (C[n] * last[n]).sum(-1).real

        return self._gate(p, convolve, x), HyenaModalState(conv, torch.stack(last, 1))

    def kernel(self, length: int) -> Float[Tensor, "n D K"]:
        """The long filters of every channel, ``2 Re sum_m C_m a_m^t``, without the skips D."""
        C = self._C()
        return torch.stack([self._system(n).kernel(C[n], length) for n in range(len(C))])

    @torch.no_grad()
    def set_modes(self, poles: Complex[Tensor, "n D N"], C: Complex[Tensor, "n D N"]) -> None:
        """Overwrite the filters by ``2 Re sum_m C_m poles_m^t``; poles of modulus between 0 and 1, both exclusive."""
        self.log_decay.copy_((-poles.abs().log()).log())
        self.phase.copy_(poles.angle())
        self.C.copy_(torch.view_as_real(C))

    def _system(self, n: int) -> Poles:
        dtype = wide(self.D)
        log_a = torch.complex(-self.log_decay[n].to(dtype).exp(), self.phase[n].to(dtype))
        return Poles(log_a, log_a.exp(), torch.ones_like(log_a))

    def _C(self) -> Tensor:
        return torch.view_as_complex(self.C.to(wide(self.D)))

    def _state(self, x: Tensor, state: HyenaModalState | None, rows: int) -> HyenaModalState:
        start = self.init_state(rows)
        if state is None:
            return start
        pairs = zip(state._fields, state, start, strict=True)
        expected = {f"state.{name}": (leaf, " ".join(map(str, like.shape))) for name, leaf, like in pairs}
        check_tensors("hyena_modal", x=(x, "* ..."), **expected)
        return HyenaModalState(state.conv.to(start.conv.dtype), state.h.to(start.h.dtype))
