"""Hyena: long convolutions with implicit filters between gates, over the whole history."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.core.modal import fit_modes
from dualform.core.options import options
from dualform.core.packing import Borders, Packing, readable
from dualform.core.ring import blank_where_full, held, write
from dualform.core.shapes import check_features, check_tensors, larger, smaller, wide
from dualform.core.tree import state_class
from dualform.layers.hyena_modal import HyenaModal, HyenaModalConfig
from dualform.layers.hyena_operator import HyenaOperator
from dualform.layers.implicit_filter import ImplicitFilter
from dualform.layers.mixer import Prepared, check_kind
from dualform.layers.part import DEEPEST
from dualform.ops.long_conv import long_conv


@options
class HyenaConfig:
    """Sizes and initialisation of a :class:`Hyena`.

    Args:
        order: N, gates; ``N - 1`` long convolutions per channel.
        l_max: K, taps of a long filter, the length of training sequences; the filter is zero beyond.
        d_conv: W, width of the short convolution.
        d_embed: positional features of the filters' network, odd: time, and pairs of cosine and sine.
        d_filter: width of that network.
        filter_layers: maps between its first and its last.
        frequency: of its sine activation at the start; higher ones start with rougher filters.
        window: ``(slow, fast, floor)``: windows decay to a hundredth over ``slow`` to ``fast`` times l_max, from the
            first channel to the last, and tend to ``floor``.
    """

    order: int = 2
    l_max: int = 1024
    d_conv: int = 3
    d_embed: int = 33
    d_filter: int = 64
    filter_layers: int = 2
    frequency: float = 10.0
    window: tuple[float, float, float] = (1.5, 0.3, 0.05)

    def build(self, d_model: int) -> "Hyena":
        """The layer, freshly initialised."""
        return Hyena(self, d_model)


@state_class
class HyenaState(NamedTuple):
    """Grows with the context up to ``l_max - 1`` tokens, which is all that a filter sees.

    The capacity S is ``max_len``, doubled whenever it is exceeded, at most ``l_max - 1``; position p lies in slot
    ``p mod S``. Slots that hold nothing yet are zero. A compiled program cannot ask how long rows are: there the state
    keeps its capacity, and a row whose history is longer has outputs of NaN from then on.
    """

    conv: Tensor  # (B, (N + 1) D, W - 1), the last inputs of the short convolution
    past: Tensor  # (B, S, N - 1, D), inputs of the long convolutions
    length: Tensor  # (B,) int64, tokens each row has seen


class Distillation(NamedTuple):
    """A finite-state approximation of a :class:`Hyena` and how far its filters are from the exact ones."""

    mixer: HyenaModal
    error: Tensor  # (N - 1, D), |k - k'| / |k| over the l_max taps, Euclidean norms
    tail: Tensor  # (N - 1, D), |k'| / |k| for the taps k' from l_max to 4 l_max, where the exact filter is zero


class Hyena(HyenaOperator):
    """``v, x_0 .. x_{N-1} = conv(in(u))``; ``v <- k_n * (x_n v) + D_n x_n v`` from n = N - 1 to 1; ``y = out(x_0 v)``.

    ``k_n * u`` is the causal convolution with a filter of ``l_max`` taps per channel, made by a small network, see
    :class:`~dualform.layers.implicit_filter.ImplicitFilter`. It is zero from l_max on: the network was never asked
    for later times, so that a longer sequence is convolved with the same filter, and nothing is extrapolated.

    There is no state of fixed size. The exact ``step`` keeps the inputs of the long convolutions, up to ``l_max - 1``
    tokens of them, and costs a product with each: its memory and its time grow with the context until then. For
    streaming in constant memory, see :meth:`distill`.

    Raises:
        ConfigError: for an order below 2, sizes below 1, an even ``d_embed`` or a window that does not decay.

    References:
        Poli, Massaroli, Nguyen, Fu, Dao, Baccus, Bengio, Ermon and Re (2023), "Hyena hierarchy", arXiv:2302.10866:
        definition 3.1 (operator), section 3.3 (filters), algorithms 1 to 3.
    """

    def __init__(self, config: HyenaConfig, d_model: int):
        c = config
        if min(c.l_max, c.d_filter, c.filter_layers + 1) < 1:
            raise ConfigError(
                f"hyena: l_max is {c.l_max}, d_filter {c.d_filter} and filter_layers {c.filter_layers}, expected at "
                "least 1, 1 and 0"
            )
        if c.d_embed < 3 or c.d_embed % 2 == 0:
            raise ConfigError(f"hyena: d_embed is {c.d_embed}, expected an odd number from 3 on: time and pairs")
        if not 0 < c.window[1] <= c.window[0]:
            raise ConfigError(f"hyena: window is {c.window}, expected (slow, fast, floor) with 0 < fast <= slow")
        if c.filter_layers > DEEPEST:
            raise ConfigError(f"hyena: filter_layers is {c.filter_layers:,}, expected at most {DEEPEST:,}")
        super().__init__("hyena", c.order, c.d_conv, d_model)
        self.config = config
        self.filter = ImplicitFilter(
            c.order - 1,
            d_model,
            c.l_max,
            d_embed=c.d_embed,
            d_filter=c.d_filter,
            hidden=c.filter_layers,
            frequency=c.frequency,
            window=c.window,
        )

    def init_state(self, batch: int, *, max_len: int = 0) -> HyenaState:
        """An empty history, with room for ``max_len`` tokens, at most ``l_max - 1``."""
        new, dtype = self.D.new_zeros, wide(self.D)
        return HyenaState(
            conv=new(self._conv_shape(batch), dtype=dtype),
            past=new(batch, min(max_len, self._reach), self.order - 1, self.d_model, dtype=dtype),
            length=new(batch, dtype=torch.int64),
        )

    def forward(
        self, x: Float[Tensor, "B T D"], state: HyenaState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], HyenaState]:
        """The parallel form: one FFT convolution per filter over the history and the new tokens."""
        check_features("hyena", x, self.d_model)
        packing = Packing.of("hyena", cu_seqlens, x)
        start, state = state, self._state(x, state, packing)
        if x.numel() == 0:
            return x.clone(), state
        p, conv = self._short(x, state.conv, packing)
        new = _layout(x, packing)
        before, capacity = (0, smaller(new.most, self._reach)) if start is None else self._extent(state, new)
        past = _grow(state.past, capacity)
        history = _history(past, state.length, before)
        k, inputs = self.filter(before + new.most), []

        def convolve(n: int, u: Tensor) -> Tensor:
            inputs.append(u)
            return long_conv(u, k[:, n].T, history[:, :, n], cu_seqlens=packing)

        y, length = self._gate(p, convolve, x), state.length + new.added
        state = HyenaState(conv, _turn(past, torch.stack(inputs, 2), state.length, length, new.begin), length)
        return self._blanked(y, state, packing), state

    def step(self, x: Float[Tensor, "B D"], state: HyenaState) -> tuple[Float[Tensor, "B D"], HyenaState]:
        """The recurrent form: a product of the filters with the history, which grows by one token."""
        return self._step(None, x, state)

    def prepare(self) -> Prepared:
        """Steps that do not compute the filters anew; see :class:`~dualform.layers.mixer.Prepared`."""
        return Prepared(partial(self._step, self.filter(self.config.l_max)))

    def _step(self, taps: Tensor | None, x: Tensor, state: HyenaState) -> tuple[Tensor, HyenaState]:
        check_features("hyena", x, self.d_model, "B")
        state = self._state(x, state, None)
        if x.numel() == 0:
            return x.clone(), state
        p, conv = self._short_step(x, state.conv)
        before, capacity = self._extent(state, _layout(x[:, None], None))
        past = _grow(state.past, capacity)
        seen, inputs = past[:, :before], []
        k = self.filter(before + 1) if taps is None else taps[: before + 1]
        at = held(state.length, past.shape[1])[:, :before]
        weights = k[(state.length[:, None] - at).clamp(max=k.shape[0] - 1)]
        weights = torch.where((at >= 0)[..., None, None], weights, 0)

        def convolve(n: int, u: Tensor) -> Tensor:
            inputs.append(u)
            return (weights[:, :, n] * seen[:, :, n]).sum(1) + k[0, n] * u

        y = self._gate(p, convolve, x)
        if self._reach:
            place = torch.arange(x.shape[0], device=x.device), state.length % past.shape[1]
            past = write(past, place, torch.stack(inputs, 1))
        state = HyenaState(conv, past, state.length + 1)
        return self._blanked(y[:, None], state, None)[:, 0], state

    def kernel(self, length: int) -> Float[Tensor, "n D K"]:
        """The long filters of every channel, without the skips D; zero from l_max on."""
        k = self.filter(length).permute(1, 2, 0)
        return F.pad(k, (0, length - k.shape[2]))

    @torch.no_grad()
    def distill(self, order: int) -> Distillation:
        """A layer of constant state: every long filter replaced by a diagonal system of ``order`` real states.

        Poles come from the filter's Hankel matrix, residues by least squares over the ``l_max`` taps, see
        :func:`dualform.core.modal.fit_modes`; everything else is copied, the first tap exactly. Beyond l_max, where
        the exact filter is zero, the approximation dies out at its own pace. It is a layer of its own, which trains,
        and a part of a model, :class:`~dualform.layers.hyena_modal.HyenaModalConfig`.

        Args:
            order: states per filter, even; smooth filters need few, those of high ``frequency`` many.

        Returns:
            The layer, on the device and in the dtype of this one, and its measured errors, one per filter.

        Raises:
            ConfigError: for an order that is odd or below 2.
        """
        c = self.config
        mixer = HyenaModalConfig(order=c.order, d_state=order, d_conv=c.d_conv).build(self.d_model)
        mixer.to(self.D.device, self.D.dtype)
        weights = self.state_dict()
        mixer.load_state_dict({n: weights.get(n, w) for n, w in mixer.state_dict().items()})
        exact = self.filter(c.l_max).permute(1, 2, 0).to("cpu", torch.float64)
        poles, residues = fit_modes(exact[..., 1:].flatten(0, 1), order // 2)
        mixer.set_modes(poles.unflatten(0, exact.shape[:2]), (residues / poles).unflatten(0, exact.shape[:2]))
        mixer.D += exact[..., 0].to(mixer.D) - mixer.kernel(1)[..., 0].to(mixer.D)
        found = mixer.kernel(4 * c.l_max).to(exact)
        found[..., 0] = exact[..., 0]
        size = exact.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
        error = (found[..., : c.l_max] - exact).norm(dim=-1) / size
        return Distillation(mixer, error, found[..., c.l_max :].norm(dim=-1) / size)

    @property
    def _reach(self) -> int:
        """How many earlier tokens a filter sees."""
        return self.config.l_max - 1

    def _extent(self, state: HyenaState, new: "_Layout") -> tuple[int, int]:
        """How much history the longest row has, and the capacity that the new tokens ask for.

        The state is asked how long its rows are, and the answer waits for the device.
        """
        capacity, reach, length = state.past.shape[1], self._reach, state.length + new.added
        if not readable(state.length):
            return capacity, capacity
        high, end = torch.stack([state.length.max(), length.max()]).tolist()
        need = min(end, reach)
        return min(high, reach), capacity if need <= capacity else min(max(need, 2 * capacity), reach)

    def _blanked(self, y: Tensor, state: HyenaState, packing: Packing | None) -> Tensor:
        """Outputs ``(B, T, D)``; where lengths cannot be read, NaN for rows whose history was longer than fits."""
        if readable(state.length):
            return y
        row = None if packing is None else packing.places(y.shape[1])[0][None]
        return blank_where_full(y, state.length.clamp(max=self._reach), state.past.shape[1], row)

    def _state(self, x: Tensor, state: HyenaState | None, packing: Packing | None) -> HyenaState:
        if state is None:
            return self.init_state(x.shape[0] if packing is None else packing.rows)
        check_kind("hyena", state, HyenaState)
        dtype, (_, width, before) = wide(self.D), self._conv_shape(0)
        rows = {"x": (x, "R ...")} if packing is None else {"sequences": (packing.cu_seqlens[1:], "R")}
        leaves = {
            "state.conv": (state.conv, f"R {width} {before}"),
            "state.past": (state.past, f"R S {self.order - 1} {self.d_model}"),
            "state.length": (state.length, "R"),
        }
        check_tensors("hyena", **rows, **leaves)
        return HyenaState(state.conv.to(dtype), state.past.to(dtype), state.length)


class _Layout(NamedTuple):
    """Where the new tokens ``(B, T)`` belong."""

    begin: Tensor  # (rows,), place of a row's first token among the B * T
    added: Tensor  # (rows,), how many tokens a row receives
    most: int  # how many the longest row receives, or T where that is not known


def _layout(x: Tensor, packing: Packing | None) -> _Layout:
    (batch, length), device = x.shape[:2], x.device
    if packing is None:
        rows = torch.arange(batch, device=device)
        return _Layout(rows * length, torch.full_like(rows, length), length)
    most = packing.longest if packing.known else length
    return _Layout(packing.cu_seqlens[:-1], packing.cu_seqlens.diff(), most)


def _history(past: Tensor, length: Tensor, count: int) -> Tensor:
    """The last ``count`` entries of every row in their order, zeros before the first, ``(B, count, N - 1, D)``."""
    at = length[:, None] - count + torch.arange(count, device=past.device)
    rows, slots = torch.arange(past.shape[0], device=past.device), at.clamp(min=0) % larger(past.shape[1], 1)
    return torch.where((at >= 0)[..., None, None], past[rows[:, None], slots], 0)


def _grow(past: Tensor, capacity: int) -> Tensor:
    more = capacity - past.shape[1]
    return past if isinstance(more, int) and more == 0 else F.pad(past, (0, 0, 0, 0, 0, more))


def _turn(past: Tensor, new: Tensor, before: Tensor, after: Tensor, begin: Tensor) -> Tensor:
    """``past`` with the tokens ``new`` ``(B, T, N - 1, D)``, which may turn it more than once; never in place."""
    since = held(after, past.shape[1]) - before[:, None]  # >= 0: the slot holds a new token
    token = (begin[:, None] + since).clamp(min=0)
    return torch.where((since >= 0)[..., None, None], new.flatten(0, 1)[token], past)
