"""The linear systems inside of layers, as dense matrices that can be looked at."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dualform.core.dplr import as_complex, as_real
from dualform.core.errors import ArgumentError
from dualform.core.system import StateSpace
from dualform.layers.lru import LRU
from dualform.layers.mimo import Mimo
from dualform.layers.mixer import Mixer
from dualform.layers.s5 import S5
from dualform.layers.structured import Structured

_LINEAR = (Structured, S5, LRU)


def is_linear(mixer: nn.Module) -> bool:
    """Whether a layer is one linear time-invariant system and then a nonlinearity: S4, S4D, DSS, S5 and LRU are."""
    return isinstance(mixer, _LINEAR)


def linear_parts(model: nn.Module) -> dict[str, Mixer]:
    """The layers of a model with a linear time-invariant system, by name; a shared one once."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Mixer) and is_linear(part)}


@torch.no_grad()
def state_spaces(mixer: Mixer, channels: Sequence[int] | None = None) -> list[StateSpace]:
    """The discrete systems of a layer, before its nonlinearity; float64, ``dt`` 1, so that time counts in steps.

    S4, S4D and DSS have one system per channel, with one input and one output. In S5 and LRU all channels share one,
    of D inputs and D outputs. States are real: the parts of each complex one are two. Of a bidirectional layer these
    are the systems that run forward in time.

    Args:
        mixer: a layer for which :func:`is_linear` holds.
        channels: those to keep; None keeps all.

    Raises:
        ArgumentError: for a layer without such a system, or a channel that does not exist.

    Example:
        >>> import torch
        >>> from dualform.layers.s4d import S4DConfig
        >>> (first,) = state_spaces(S4DConfig(d_state=8).build(4), channels=[0])
        >>> first
        StateSpace(N=8, inputs=1, outputs=1, dt=1)
    """
    if not isinstance(mixer, _LINEAR):
        raise ArgumentError(
            f"state_spaces: {type(mixer).__name__} has no single linear time-invariant system",
            hint="layers that have one: S4, S4D, DSS, S5, LRU",
        )
    chosen = list(range(mixer.d_model)) if channels is None else list(channels)
    if wrong := [c for c in chosen if not 0 <= c < mixer.d_model]:
        raise ArgumentError(f"state_spaces: channel {wrong[0]}, expected 0 to {mixer.d_model - 1}")
    mixer = copy.deepcopy(mixer).to("cpu", torch.float64)
    if isinstance(mixer, Structured):
        return _per_channel(mixer, chosen)
    system = mixer._systems()[0] if isinstance(mixer, S5) else mixer._system()
    return [_shared(system, mixer.D, chosen)]


def _per_channel(mixer: Structured, chosen: list[int]) -> list[StateSpace]:
    system, C = mixer._system(mixer._dt(1.0)), mixer._C()
    C = C if mixer.causal else C[0]
    width, poles = mixer.A_im.shape
    basis = as_complex(torch.eye(2 * poles, dtype=torch.float64))[:, None].expand(-1, width, -1)
    A = as_real(system.step(torch.zeros(2 * poles, width, dtype=torch.float64), basis)).permute(1, 2, 0)
    B = as_real(system.step(torch.ones(1, width, dtype=torch.float64), torch.zeros_like(basis[:1])))[0]
    C = as_real(2 * C.conj().resolve_conj())
    return [StateSpace(A[c], B[c], C[c], mixer.D[c], dt=1.0) for c in chosen]


def _shared(system: Mimo, D: Tensor, chosen: list[int]) -> StateSpace:
    a, poles = system.a, len(system.a)
    turn = torch.stack([a.real, -a.imag, a.imag, a.real], -1).view(poles, 2, 2)
    A = torch.block_diag(*turn)
    B = torch.stack([system.B.real, system.B.imag], 1).flatten(0, 1)
    C = torch.stack([system.C.real, -system.C.imag], -1).flatten(1)
    return StateSpace(A, B[:, chosen], C[chosen], torch.diag(D[chosen]), dt=1.0)
