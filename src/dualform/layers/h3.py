"""H3: a shift and a diagonal state space model between multiplications, in place of attention's comparisons."""

import copy
import math
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.discretize import EXPONENTS, RULES
from dualform.core.errors import ConfigError
from dualform.core.nplr import DIAGONALS
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.system import StateSpace
from dualform.core.tree import clone, state_class
from dualform.layers.diagonal import DiagonalSystem
from dualform.layers.mixer import Hint, Mixer, Prepared, check_state
from dualform.layers.poles import Poles, check_choice, check_pairs
from dualform.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from dualform.ops.dispatch import exactly

INITS = DIAGONALS  # the poles at the start


@options
class H3Config:
    """Sizes and initialisation of an :class:`H3`.

    Args:
        d_state: eigenvalues of the state matrix of a channel in both models. Those of the shift are zero: it keeps the
            current key and the last ``d_state - 1``. Those of the diagonal model come in conjugate pairs, of which the
            state holds one each; hence even.
        d_head: P, width of a head; every head has ``P * P`` channels of the diagonal model, which share its poles.
        init: the poles at the start, a key of :data:`INITS`, see :func:`dualform.core.nplr.diagonal`.
        rule: discretisation, ``zoh`` or ``bilinear``.
        dt_min: smallest step size at the start; steps are spread evenly in their logarithm.
        dt_max: largest step size at the start.
        bias: whether the projections have one.
    """

    d_state: int = 64
    d_head: int = 1
    init: str = "lin"
    rule: str = "zoh"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    bias: bool = True

    def build(self, d_model: int) -> "H3":
        """The layer, freshly initialised."""
        return H3(self, d_model)


@state_class
class H3State(NamedTuple):
    """Constant in the length of the context."""

    shift: Tensor  # (B, H P, d_state - 1), the last keys, oldest first
    h: Tensor  # (B, H, P, P, d_state / 2), complex, the diagonal model of every pair of key and value channels


class H3(Poles, Mixer):
    """``y_t = W_out (q_t SSM_diag(SSM_shift(k) v^T)_t)``, a head at a time, with ``q, k, v = W x + b``.

    The shift model is a causal convolution, ``kbar_t = sum_{j < d_state} shift_j k_{t-j}``: its state is a shift
    register of keys, its input vector the first unit vector, and ``shift`` its output vector with the skip added to
    the first entry. The diagonal model of a head, ``h_t = Abar h_{t-1} + Bbar kbar_t v_t^T``,
    ``z_t = 2 Re(C h_t) + D kbar_t v_t^T``, is that of :class:`~dualform.layers.s4d.S4D`; it runs on each of the
    ``P x P`` products of a key and a value channel, and ``q_t z_t`` sums over the key channels.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, H = d_model / P heads of width P. The parallel form holds
        ``(B, T, d_model * P)`` numbers, and never the states of every step.

    Raises:
        ConfigError: for an odd ``d_state``, an unknown ``init`` or ``rule``, step sizes that are not positive, or a
            ``d_head`` that does not divide ``d_model``.

    References:
        Fu, Dao, Saab, Thomas, Rudra and Re (2023), "Hungry hungry hippos", arXiv:2212.14052: section 3.1 and
        algorithm 1.
    """

    hints: ClassVar[dict[str, Hint]] = {"shift": Hint(decay=False), **Poles.hints}

    def __init__(self, config: H3Config, d_model: int):
        super().__init__()
        c, self.config, self.d_model = config, config, d_model
        check_pairs("h3", c.d_state)
        check_choice("h3", "init", c.init, tuple(INITS))
        check_choice("h3", "rule", c.rule, tuple(EXPONENTS))
        if c.d_head < 1 or d_model % c.d_head:
            raise ConfigError(
                f"h3: d_head is {c.d_head}, which does not divide d_model {d_model}",
                hint=f"set d_head to a divisor of {d_model}",
            )
        self.heads = d_model // c.d_head
        A = INITS[c.init](c.d_state).expand(self.heads, -1)
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=c.bias)
        self.shift = nn.Parameter(torch.randn(d_model, c.d_state))
        self._set_poles(A, self.heads, c)
        self.C = nn.Parameter(torch.randn(*A.shape, 2) * math.sqrt(0.5))  # (real, imaginary)
        self.D = nn.Parameter(torch.randn(self.heads))
        self.out_proj = nn.Linear(d_model, d_model, bias=c.bias)

    def init_state(self, batch: int, *, max_len: int = 0) -> H3State:
        """Zeros; ``max_len`` is ignored."""
        c, dtype, new = self.config, wide(self.D), self.D.new_zeros
        return H3State(
            shift=new(batch, self.d_model, c.d_state - 1, dtype=dtype),
            h=new(batch, self.heads, c.d_head, c.d_head, c.d_state // 2, dtype=_complex(dtype)),
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: H3State | None = None,
        *,
        cu_seqlens: Borders = None,
    ) -> tuple[Float[Tensor, "B T D"], H3State]:
        """The parallel form."""
        check_features("h3", x, self.d_model)
        packing = Packing.of("h3", cu_seqlens, x)
        state = check_state("h3", state, self.init_state(x.shape[0] if packing is None else packing.rows))
        q, k, v = self._qkv(x)
        with exactly(x.device.type):
            k, shift = causal_conv1d(k.flatten(2), self._taps(), initial_state=state.shift, cu_seqlens=packing)
            y, h = self._diagonal(q, k.view_as(v), v, state.h, packing)
        return self.out_proj(y.flatten(2).to(x.dtype)), H3State(shift, h)

    def step(self, x: Float[Tensor, "B D"], state: H3State) -> tuple[Float[Tensor, "B D"], H3State]:
        """The recurrent form."""
        return self._step(*self._derived(), x, state)

    def prepare(self) -> Prepared:
        """Steps that do not discretise anew; see :class:`~dualform.layers.mixer.Prepared`."""
        return Prepared(partial(self._step, *clone(self._derived())))

    def kernel(self, length: int) -> Float[Tensor, "H K"]:
        """The response of the diagonal models to an impulse, ``2 Re(C Abar^l Bbar)``, without the skip D."""
        return self._system().kernel(length)

    @torch.no_grad()
    def systems(self) -> list[StateSpace]:
        """The shift of every channel, then the diagonal model of every head, on the CPU in float64, with ``dt`` 1."""
        exact = copy.deepcopy(self).to("cpu", torch.float64)
        line = torch.eye(self.config.d_state, dtype=torch.float64)
        shifts = [StateSpace(line.roll(1, 0).tril(), line[0], taps, dt=1.0) for taps in exact.shift]
        return shifts + exact._system().dense(exact.D)

    def _step(self, taps: Tensor, system: DiagonalSystem, x: Tensor, state: H3State) -> tuple[Tensor, H3State]:
        check_features("h3", x, self.d_model, "B")
        state = check_state("h3", state, self.init_state(x.shape[0]))
        q, k, v = self._qkv(x)
        with exactly(x.device.type):
            k, shift = causal_conv1d_update(k.flatten(1), state.shift, taps)
            u = k.view_as(v)[..., :, None] * v[..., None, :]  # (B, H, P, P)
            z, h = system.step(u, state.h)
            z = torch.addcmul(z, u, self.D.to(u.dtype)[:, None, None])
            y = (q[..., None] * z).sum(-2)
        return self.out_proj(y.flatten(1).to(x.dtype)), H3State(shift, h)

    def _diagonal(self, q: Tensor, k: Tensor, v: Tensor, h: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """``(B, T, H, P)`` -> the same. Products are further rows of one batch, or further sequences of one line."""
        kv = (k[..., :, None] * v[..., None, :]).permute(3, 4, 0, 1, 2)  # (P, P, B, T, H)
        u = kv.flatten(0, 2) if packing is None else kv.flatten(0, 3)[None]
        line = None if packing is None else packing.repeated(self.config.d_head**2)
        z, last = self._system().run(u, h.permute(2, 3, 0, 1, 4).flatten(0, 2), line)
        z = torch.addcmul(z, u, self.D.to(u.dtype)).view(kv.shape)
        last = last.unflatten(0, (self.config.d_head, self.config.d_head, -1)).permute(2, 3, 0, 1, 4).contiguous()
        return torch.einsum("bthi,ijbth->bthj", q, z), last

    def _qkv(self, x: Tensor) -> list[Tensor]:
        """``(..., D)`` -> queries, keys and values ``(..., H, P)``, in float32 or wider."""
        parts = self.qkv_proj(x).to(wide(self.D)).chunk(3, -1)
        return [part.unflatten(-1, (self.heads, self.config.d_head)) for part in parts]

    def _derived(self) -> tuple[Tensor, DiagonalSystem]:
        """What a step makes of the weights: the taps, and the diagonal models for ``(B, H, P, P)`` channels."""
        return self._taps(), DiagonalSystem(*(m[:, None, None] for m in self._system()))

    def _taps(self) -> Tensor:
        """The shift as the weights of a convolution, which take the current input last."""
        return self.shift.to(wide(self.shift)).flip(1)

    def _system(self) -> DiagonalSystem:
        A, dt, C = self._poles(), self._dt(), 2 * torch.view_as_complex(self.C.to(wide(self.C)))
        return DiagonalSystem(EXPONENTS[self.config.rule](A, dt), *RULES[self.config.rule](A, dt), C)


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.complex64)
