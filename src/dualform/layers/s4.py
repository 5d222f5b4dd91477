"""S4: a time-invariant state space model per channel whose state matrix is diagonal plus low rank."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dualform.core.dplr import DiscreteDPLR
from dualform.core.errors import ConfigError
from dualform.core.nplr import DIAGONALS, LOW_RANK, nplr
from dualform.core.options import options
from dualform.core.shapes import wide
from dualform.layers.dplr import DPLRSystem
from dualform.layers.mixer import Hint
from dualform.layers.poles import check_choice, check_pairs
from dualform.layers.structured import Structured


@options
class S4Config:
    """Sizes and initialisation of an :class:`S4`.

    Args:
        d_state: eigenvalues of the state matrix of a channel; even, as they come in conjugate pairs, of which the state
            holds one each.
        init: the state matrix at the start, a key of :data:`INITS`: a HiPPO measure, ``legs`` or ``fout`` among
            them; ``random``; or ``dplr-`` and ``diag-`` with a diagonal init of S4D, such as ``diag-lin``, where the
            low-rank term starts at random or at zero. From zero it does not move, its gradient being zero too.
        rank: of the low-rank term; None is that of the measure, and 1 for the others.
        dt_min: smallest step size at the start; steps are spread evenly in their logarithm.
        dt_max: largest step size at the start.
        bidirectional: whether outputs depend on later inputs too; such a layer is not causal and has no state.
    """

    d_state: int = 64
    init: str = "legs"
    rank: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    bidirectional: bool = False

    def build(self, d_model: int) -> "S4":
        """The layer, freshly initialised."""
        return S4(self, d_model)


class S4(Structured):
    """``h_t = Abar h_{t-1} + Bbar x_t``, ``s_t = 2 Re(C h_t) + D x_t``, ``y_t = GLU(W gelu(s_t) + b)``.

    Abar and Bbar discretise ``A = diag(Lambda) - sum_r P_r P_r^*`` and B by the bilinear rule, see
    :class:`~dualform.core.dplr.DiscreteDPLR`, where Lambda, P, B and C stand for themselves and their conjugates. As P
    appears twice, A stays stable whatever training does. For the parametrisation of Lambda, for ``rate`` and for
    bidirectional layers see :class:`~dualform.layers.structured.Structured`.

    A step costs ``O(N)``. The parallel form, :func:`~dualform.ops.dplr_ssm.dplr_ssm`, cuts time into chunks and uses
    dense powers of Abar between them. It takes and returns states, and is faster than an FFT with the kernel of the
    generating function, :func:`~dualform.ops.cauchy.cauchy_kernel`.

    Raises:
        ConfigError: for an odd ``d_state``, an unknown ``init``, a rank that is not the measure's, or step sizes
            that are not positive.

    References:
        Gu, Goel and Re (2022), "Efficiently modeling long sequences with structured state spaces",
        arXiv:2111.00396; Goel, Gu, Donahue and Re (2022), arXiv:2202.09729, section 4.1 (``-P P^*``); the
        initialisations other than ``legs`` are those of the authors' implementation.
    """

    hints: ClassVar[dict[str, Hint]] = {
        **Structured.hints,
        "P": Hint(decay=False, max_lr=1e-3),
        "B": Hint(decay=False, max_lr=1e-3),
    }

    def __init__(self, config: S4Config, d_model: int):
        check_pairs("s4", config.d_state)
        check_choice("s4", "init", config.init, tuple(INITS))
        if config.rank is not None and config.rank < 1:
            raise ConfigError(f"s4: rank is {config.rank}, expected at least 1", hint="without it S4 is S4D")
        start = INITS[config.init](config.d_state, d_model, 1 if config.rank is None else config.rank)
        if config.rank not in (None, len(start.P)):
            raise ConfigError(f"s4: rank is {config.rank}, but that of {config.init!r} is {len(start.P)}")
        super().__init__(config, d_model, start.A)
        P, B = (m.expand(*m.shape[:-2], d_model, -1) for m in (start.P, start.B))
        dtype = torch.get_default_dtype()
        self.P = nn.Parameter(torch.view_as_real(P.resolve_conj()).to(dtype).contiguous())  # (rank, D, N, 2)
        self.B = nn.Parameter(torch.view_as_real(B.resolve_conj()).to(dtype).contiguous())  # (D, N, 2)

    def _systems(self, rate: float) -> list[DPLRSystem]:
        P, B = (torch.view_as_complex(m.to(wide(m))) for m in (self.P, self.B))
        system = DiscreteDPLR.of(self._poles(), P, B, self._dt(rate)[:, 0])
        return [DPLRSystem(system, C) for C in self._C()]


class _Start(NamedTuple):
    """Complex128, for all channels or, with D = 1, alike for each."""

    A: Tensor  # (D, N)
    P: Tensor  # (rank, D, N)
    B: Tensor  # (D, N)


def _measure(name: str) -> Callable[[int, int, int], _Start]:
    def start(n: int, width: int, rank: int) -> _Start:
        form = nplr(name, n)
        return _Start(form.Lambda[None], form.P[:, None], form.B[None])

    return start


def _diagonal(name: str, scale: float) -> Callable[[int, int, int], _Start]:
    def start(n: int, width: int, rank: int) -> _Start:
        A = DIAGONALS[name](n)
        B = nplr("legs", n).B if name == "legs" else torch.ones_like(A)
        return _Start(A[None], scale * torch.randn(rank, width, n // 2, dtype=A.dtype), B[None])

    return start


def _random(n: int, width: int, rank: int) -> _Start:
    """Real parts -1/2, imaginary parts log-normal, P normal, B one."""
    frequency = torch.randn(width, n // 2, dtype=torch.float64).exp()
    A = torch.complex(torch.full_like(frequency, -0.5), frequency)
    return _Start(A, torch.randn(rank, width, n // 2, dtype=A.dtype), torch.ones_like(A))


INITS: dict[str, Callable[[int, int, int], _Start]] = {
    **{name: _measure(name) for name in LOW_RANK if name not in ("legsd", "foud")},  # those are diagonal
    "random": _random,
    **{f"dplr-{name}": _diagonal(name, 1.0) for name in DIAGONALS},
    **{f"diag-{name}": _diagonal(name, 0.0) for name in DIAGONALS},
}
