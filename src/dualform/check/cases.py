"""What the laws are tried on: every mixer in odd sizes, Kalman filters, hidden Markov models, whole language models."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dualform.check.chains import hidden_markov_cases
from dualform.core.laws import Trial
from dualform.core.linalg import symmetric_part
from dualform.core.recurrence import State
from dualform.gaussian.belief import Belief
from dualform.gaussian.kalman import KalmanFilter
from dualform.gaussian.model import LinearGaussian
from dualform.layers.attention import AttentionConfig
from dualform.layers.delta_net import DeltaNetConfig
from dualform.layers.dss import DSSConfig
from dualform.layers.gated_delta_net import GatedDeltaNetConfig
from dualform.layers.gated_delta_product import GatedDeltaProductConfig
from dualform.layers.gla import GLAConfig
from dualform.layers.h3 import H3Config
from dualform.layers.hgrn import HGRN2Config, HGRNConfig
from dualform.layers.hyena import HyenaConfig
from dualform.layers.hyena_modal import HyenaModalConfig
from dualform.layers.kda import KDAConfig
from dualform.layers.lightning_attention import LightningAttentionConfig
from dualform.layers.lru import LRUConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mixer import PartConfig
from dualform.layers.mla import MLAConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.mlstm import MLSTMConfig
from dualform.layers.moe import MoEConfig
from dualform.layers.registry import MIXERS
from dualform.layers.retnet import RetNetConfig
from dualform.layers.rglru import RGLRUConfig
from dualform.layers.rotary import RotaryConfig
from dualform.layers.rwkv4 import RWKV4Config, RWKVChannelConfig
from dualform.layers.rwkv6 import RWKV6Config
from dualform.layers.rwkv7 import RWKV7Config
from dualform.layers.s4 import S4Config
from dualform.layers.s4d import S4DConfig
from dualform.layers.s5 import S5Config
from dualform.layers.short_conv import GatedShortConvConfig
from dualform.layers.slstm import SLSTMConfig
from dualform.models.config import ModelConfig
from dualform.models.heads import StepClassifier, StepRegressor
from dualform.models.lm import LanguageModel

_WIDTH = 16  # d_model of a mixer without a case of its own
Sample = Callable[[int, int, torch.Generator], Tensor]  # (batch, length, generator) -> float64 or integer inputs
Build = Callable[[torch.device, torch.dtype], tuple[Any, Mapping[str, Tensor] | None]]


@dataclass(frozen=True)
class Case:
    """One recurrence that the laws are tried on.

    Args:
        name: what the table of results calls it.
        kind: its name in ``MIXERS``; ``"kalman"``; ``"hmm"``; ``"intervals"`` for a mixer on irregular samples, or
            ``"lm"`` for a whole model.
        build: ``(device, dtype)`` -> the recurrence, and the tensors to differentiate if it has no parameters.
        sample: ``(batch, length, generator)`` -> inputs on the CPU.
        tangent: of its states, see :class:`~dualform.core.laws.Trial`.
    """

    name: str
    kind: str
    build: Build
    sample: Sample
    tangent: Callable[[Any], Any] = lambda gradient: gradient

    def trial(
        self,
        length: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        warmup: int = 5,
        batch: int = 4,
        seed: int = 0,
    ) -> Trial:
        """Freshly built and with fresh inputs, the same for every device and dtype but for rounding.

        Args:
            length: T, what the laws run over.
            device: of the recurrence and its inputs.
            dtype: of its parameters and of floating inputs.
            warmup: elements before those, which bring the rows to the states that the laws start from.
            batch: B.
            seed: of parameters, inputs, cuts and losses.
        """
        device = torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            f, parameters = self.build(device, dtype)
        x = self.sample(batch, warmup + length, torch.Generator().manual_seed(seed + 1))
        x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
        return Trial(f, x, warmup=warmup, parameters=parameters, seed=seed, tangent=self.tangent)


def mixer_case(name: str, config: PartConfig, d_model: int) -> Case:
    """The case of one mixer.

    Args:
        name: a word that sets it apart from the other cases of its kind; may be empty.
        config: of the mixer, registered in ``MIXERS``.
        d_model: D.
    """
    kind = MIXERS.name_of(type(config)) or type(config).__name__
    return _on_features(
        " ".join(filter(None, (kind, name, f"d={d_model}"))), kind, lambda: config.build(d_model), d_model
    )


def default_cases(known: Iterable[Case]) -> list[Case]:
    """A case for every mixer of the registry that has none among those ``known``, such as one of another package."""
    without = [kind for kind in MIXERS if kind not in {case.kind for case in known}]
    return [
        _on_features(f"{kind} d={_WIDTH}", kind, lambda kind=kind: MIXERS[kind]().build(_WIDTH), _WIDTH)
        for kind in without
    ]


def _on_features(name: str, kind: str, make: Callable[[], Any], width: int) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> tuple[Any, None]:
        return make().to(device, dtype), None

    def sample(batch: int, length: int, generator: torch.Generator) -> Tensor:
        return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)

    return Case(name, kind, build, sample)


class Irregular(nn.Module):
    """A mixer on samples at irregular times, as a recurrence: the last feature is the logarithm of the interval."""

    def __init__(self, mixer: Any):
        super().__init__()
        self.mixer = mixer

    def init_state(self, batch: int, *, max_len: int = 0) -> State:
        return self.mixer.init_state(batch, max_len=max_len)

    def forward(self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None) -> tuple[Any, State]:
        return self.mixer(x[..., :-1], state, cu_seqlens=cu_seqlens, intervals=x[..., -1].exp())

    def step(self, x: Tensor, state: State) -> tuple[Any, State]:
        return self.mixer.step(x[:, :-1], state, x[:, -1].exp())


def interval_case(config: PartConfig, d_model: int) -> Case:
    """The case of one mixer with intervals that are drawn along with its inputs.

    Args:
        config: of a mixer with a meaning in continuous time.
        d_model: D.
    """
    regular = mixer_case("", config, d_model)

    def build(device: torch.device, dtype: torch.dtype) -> tuple[Any, None]:
        return Irregular(config.build(d_model)).to(device, dtype), None

    def sample(batch: int, length: int, generator: torch.Generator) -> Tensor:
        return torch.randn(batch, length, d_model + 1, generator=generator, dtype=torch.float64)

    return Case(f"intervals {regular.name}", "intervals", build, sample)


def model_case(name: str, config: ModelConfig) -> Case:
    """The case of a whole language model.

    Args:
        name: the table calls it ``lm`` and this.
        config: of the model.
    """

    def build(device: torch.device, dtype: torch.dtype) -> tuple[Any, None]:
        return LanguageModel(config).to(device, dtype), None

    def sample(batch: int, length: int, generator: torch.Generator) -> Tensor:
        return torch.randint(config.vocab_size, (batch, length), generator=generator)

    return Case(f"lm {name}", "lm", build, sample)


def kalman_case(name: str, *, states: int, observed: int, parallel: bool, diffuse: int = 0) -> Case:
    """The case of a Kalman filter of a random stable model, whose data miss every fifth value and some whole steps.

    Args:
        name: the table calls it ``kalman`` and this.
        states: N.
        observed: M.
        parallel: which form of ``forward``.
        diffuse: so many states have an exactly diffuse prior, which is then of the state at the first observation.
    """

    def build(device: torch.device, dtype: torch.dtype) -> tuple[Any, Mapping[str, Tensor]]:
        turn = torch.linalg.qr(torch.randn(states, states, dtype=torch.float64)).Q

        def covariance(size: int) -> Tensor:
            root = torch.randn(size, size, dtype=torch.float64)
            return root @ root.mT / size + torch.eye(size, dtype=torch.float64)

        tensors = {
            "A": 0.9 * turn,
            "C": torch.randn(observed, states, dtype=torch.float64),
            "Q": covariance(states),
            "R": covariance(observed),
            "m0": torch.randn(states, dtype=torch.float64),
            "P0": covariance(states),
        }
        tensors = {k: v.to(device, dtype).requires_grad_() for k, v in tensors.items()}
        unknown = [i < diffuse for i in range(states)] if diffuse else None
        model = LinearGaussian(**tensors, prior="first" if diffuse else "before", diffuse=unknown)
        return KalmanFilter(model, parallel=parallel), tensors

    def sample(batch: int, length: int, generator: torch.Generator) -> Tensor:
        y = torch.randn(batch, length, observed, generator=generator, dtype=torch.float64)
        lost = torch.rand(y.shape, generator=generator) < 0.2
        lost |= (torch.rand(batch, length, generator=generator) < 0.1)[..., None]
        return y.masked_fill(lost, math.nan)

    def symmetric(gradient: Belief) -> Belief:
        return gradient._replace(cov=symmetric_part(gradient.cov))

    return Case(f"kalman {name}", "kalman", build, sample, symmetric)


_YARN = RotaryConfig(interleaved=True, scaling="yarn", factor=4.0, original=16, slow=0.5, fast=2.0)


def _mixers() -> list[Case]:
    return [
        mixer_case("", MambaConfig(d_state=5), 1),
        mixer_case("no conv", MambaConfig(d_state=1, d_conv=1, expand=1, dt_rank=2, bias=True), 3),
        mixer_case("", MambaConfig(d_state=7, d_conv=3, expand=3, dt_rank=5, conv_bias=False), 17),
        mixer_case("", Mamba2Config(d_state=5, d_head=1), 1),
        mixer_case("groups", Mamba2Config(d_state=3, d_head=3, expand=3, groups=3, dt_limit=(0.01, 0.09)), 3),
        mixer_case("", Mamba2Config(d_state=7, d_head=17, d_conv=3, expand=3, bias=True, conv_bias=False), 17),
        mixer_case("", GLAConfig(heads=1, expand_k=1.0, gate_rank=1), 1),
        mixer_case("wide", GLAConfig(heads=3, expand_k=2.0, expand_v=3.0, gate_rank=2, gate_temperature=1.0), 3),
        mixer_case("", GLAConfig(heads=1, gate_rank=3), 17),
        mixer_case("", RWKV4Config(), 1),
        mixer_case("", RWKV4Config(), 3),
        mixer_case("inner", RWKV4Config(d_inner=5), 17),
        mixer_case("", RWKVChannelConfig(d_hidden=1), 1),
        mixer_case("", RWKVChannelConfig(d_hidden=2), 3),
        mixer_case("no receptance", RWKVChannelConfig(d_hidden=5, receptance=False), 17),
        mixer_case("previous", RWKVChannelConfig(d_hidden=5, previous=True), 3),
        mixer_case("", RWKV6Config(d_head=1, mix_rank=1, decay_rank=1, norm_eps=0.1), 1),
        mixer_case("", RWKV6Config(d_head=3, mix_rank=2, decay_rank=1, norm_eps=0.1), 3),
        mixer_case("", RWKV6Config(d_head=17, mix_rank=1, decay_rank=2, norm_eps=0.1), 17),
        mixer_case("heads", RWKV6Config(d_head=3, mix_rank=2, decay_rank=1, norm_eps=0.1), 6),
        replace(  # a normalised key of width 1 is its sign, and gradients through one near 0 are rounding
            mixer_case("", RWKV7Config(d_head=1, decay_rank=1, rate_rank=1, gate_rank=1, norm_eps=0.1), 1),
            sample=lambda rows, length, rng: 1 + torch.rand(rows, length, 1, generator=rng, dtype=torch.float64),
        ),
        mixer_case("", RWKV7Config(d_head=3, decay_rank=1, rate_rank=2, gate_rank=1, norm_eps=0.1), 3),
        mixer_case("", RWKV7Config(d_head=17, decay_rank=2, rate_rank=1, gate_rank=3, norm_eps=0.1), 17),
        mixer_case("heads", RWKV7Config(d_head=3, decay_rank=1, rate_rank=2, gate_rank=1, norm_eps=0.1), 6),
        mixer_case("", AttentionConfig(heads=1), 1),
        mixer_case("grouped", AttentionConfig(heads=3, kv_heads=1, rope=None, bias=True), 3),
        mixer_case("window", AttentionConfig(heads=6, kv_heads=2, d_head=5, window=7), 17),
        mixer_case(
            "gate",
            AttentionConfig(2, 1, 4, d_rope=2, d_value=3, qk_norm="rms_offset", gate=True, scale=0.3, bias=True),
            3,
        ),
        mixer_case(
            "softcap",
            AttentionConfig(2, 2, 5, window=6, softcap=2.0, qk_norm="layer", qk_norm_over="all", rope=_YARN),
            17,
        ),
        mixer_case("", MLAConfig(1, 1, 2, 1, 3), 1),
        mixer_case("no positions", MLAConfig(2, 3, 1, 5, 4, d_query=3, rope=None, bias=True, scale=0.4), 3),
        mixer_case("window", MLAConfig(3, 2, 4, 3, 5, rope=_YARN, window=7), 17),
        mixer_case("conv", AttentionConfig(heads=2, kv_heads=1, d_head=4, d_rope=2, d_conv=3), 1),
        mixer_case("", LSTMConfig(), 1),
        mixer_case("", LSTMConfig(hidden=5, layers=2), 3),
        mixer_case("", LSTMConfig(), 17),
        mixer_case("lin zoh", S4DConfig(d_state=6), 1),
        mixer_case("legs bilinear", S4DConfig(d_state=10, init="legs", rule="bilinear", dt_max=0.5), 3),
        mixer_case("inv zoh", S4DConfig(d_state=2, init="inv"), 17),
        mixer_case("real bilinear", S4DConfig(d_state=14, init="real", rule="bilinear"), 3),
        mixer_case("legs", S4Config(d_state=6), 1),
        mixer_case("legt", S4Config(d_state=10, init="legt", dt_max=0.5), 3),
        mixer_case("random", S4Config(d_state=2, init="random", rank=3), 17),
        mixer_case("softmax", DSSConfig(d_state=6, length=30), 1),
        mixer_case("exp", DSSConfig(d_state=10, kernel="exp", dt_max=0.5), 3),
        mixer_case("softmax", DSSConfig(d_state=2, init="real", length=7), 17),
        mixer_case("zoh", S5Config(d_state=6), 1),
        mixer_case("blocks bilinear", S5Config(d_state=12, blocks=3, rule="bilinear", dt_max=0.5), 3),
        mixer_case("no pairs", S5Config(d_state=4, conj_pairs=False), 17),
        mixer_case("", LRUConfig(d_state=1), 1),
        mixer_case("", LRUConfig(d_state=5), 3),
        mixer_case("ring", LRUConfig(d_state=7, r_min=0.9, r_max=0.99, max_phase=0.3), 17),
        mixer_case("", H3Config(d_state=6), 1),
        mixer_case("wide heads", H3Config(d_state=4, d_head=3, rule="bilinear", dt_max=0.5), 3),
        mixer_case("no bias", H3Config(d_state=2, init="inv", bias=False), 17),
        mixer_case("long", HyenaConfig(l_max=200, d_embed=5, d_filter=6, frequency=3.0), 1),
        mixer_case("order 3", HyenaConfig(order=3, l_max=9, d_embed=3, d_filter=4, frequency=2.0), 3),
        mixer_case("short", HyenaConfig(l_max=40, d_conv=1, d_embed=3, d_filter=5, filter_layers=0), 17),
        mixer_case("", HyenaModalConfig(d_state=6), 1),
        mixer_case("order 3", HyenaModalConfig(order=3, d_state=2, d_conv=2, dt_max=0.5), 3),
        mixer_case("", HyenaModalConfig(d_state=4, d_conv=1), 17),
        mixer_case("", DeltaNetConfig(heads=1, d_key=3), 1),
        mixer_case("grouped", DeltaNetConfig(heads=4, key_heads=2, d_key=3, d_value=2, d_conv=1, negative=True), 3),
        mixer_case("", DeltaNetConfig(heads=1, d_key=5), 17),
        mixer_case("", GatedDeltaNetConfig(heads=1, d_key=3), 1),
        mixer_case("grouped", GatedDeltaNetConfig(heads=4, key_heads=2, d_key=3, d_value=2, negative=True), 3),
        mixer_case("", GatedDeltaNetConfig(heads=1, d_key=5, d_conv=2, dt_max=5.0), 17),
        mixer_case("", KDAConfig(heads=1, d_key=3), 1),
        mixer_case("grouped", KDAConfig(heads=4, key_heads=2, d_key=3, d_value=2, rank=5, negative=True), 3),
        mixer_case("", KDAConfig(heads=1, d_key=5, d_conv=2, dt_max=5.0), 17),
        mixer_case("", GatedDeltaProductConfig(heads=1, d_key=3), 1),
        mixer_case("three", GatedDeltaProductConfig(heads=4, key_heads=2, d_key=3, d_value=2, householders=3), 3),
        mixer_case("no decay", GatedDeltaProductConfig(heads=1, d_key=5, decay=False, negative=False), 17),
        mixer_case("", GatedShortConvConfig(), 1),
        mixer_case("wide", GatedShortConvConfig(d_conv=5, bias=True), 3),
        mixer_case("no memory", GatedShortConvConfig(d_conv=1), 17),
        mixer_case("", RetNetConfig(heads=1), 1),
        mixer_case("no positions", RetNetConfig(heads=3, expand=1, rope=None, norm_eps=0.1), 3),
        mixer_case("wide heads", RetNetConfig(heads=2, d_head=5, expand=1, rope=100.0), 17),
        mixer_case("", LightningAttentionConfig(heads=1), 1),
        mixer_case("wide heads", LightningAttentionConfig(heads=2, d_head=5), 3),
        mixer_case("no decay", LightningAttentionConfig(heads=17, decay=0.0), 17),
        mixer_case("", RGLRUConfig(heads=1), 1),
        mixer_case("first as it is", RGLRUConfig(heads=3, d_conv=2, scale_first=False), 3),
        mixer_case("", RGLRUConfig(d_inner=6, heads=2, d_conv=1, c=3.0), 17),
        mixer_case("", HGRNConfig(norm_eps=0.1), 1),
        mixer_case("bound", HGRNConfig(d_inner=5, lower_bound=0.7, norm_eps=0.1), 3),
        mixer_case("wide", HGRNConfig(rope=50.0), 17),
        mixer_case("", HGRN2Config(heads=1, norm_eps=0.1), 1),
        mixer_case("bound", HGRN2Config(heads=3, lower_bound=0.7, norm_eps=0.1), 3),
        mixer_case("wide heads", HGRN2Config(heads=2, d_head=5), 17),
        mixer_case("", MLSTMConfig(heads=1, d_value=2, norm_eps=0.1), 1),
        mixer_case("no cap", MLSTMConfig(heads=3, d_key=2, d_value=3, gate_cap=None, bias=True, norm_eps=0.1), 3),
        mixer_case("wide heads", MLSTMConfig(heads=2, d_key=3, d_value=5, gate_cap=2.0, norm_eps=0.1), 17),
        mixer_case("", SLSTMConfig(heads=1, d_head=2, norm_eps=0.1), 1),
        mixer_case("", SLSTMConfig(heads=2, d_head=2, norm_eps=0.1), 3),
        mixer_case("wide heads", SLSTMConfig(heads=2, d_head=5, norm_eps=0.1), 17),
    ]


def _irregular() -> list[Case]:
    return [
        interval_case(S4DConfig(d_state=4, rule="bilinear", dt_max=0.5), 3),
        interval_case(DSSConfig(d_state=4, dt_max=0.5), 3),
        interval_case(S5Config(d_state=4, dt_max=0.5), 3),
        interval_case(LRUConfig(d_state=5), 1),
        interval_case(MambaConfig(d_state=3, d_conv=3), 3),
        interval_case(Mamba2Config(d_state=3, d_head=2, dt_limit=(0.01, 0.09)), 3),
    ]


def _models() -> list[Case]:
    mlp = MLPConfig(d_hidden=13)
    mamba2 = Mamba2Config(d_state=5, d_head=3, d_inner=12, groups=2, norm_eps=1e-3)
    attention = AttentionConfig(heads=3, kv_heads=1, rope=100.0)
    zamba = ModelConfig(11, 6, {"M": (mamba2,), "S": (attention, mlp)}, "MSMS", shared="S")
    mixed = ModelConfig(
        vocab_size=7,
        d_model=9,
        parts={
            "M": (MambaConfig(d_state=5, d_inner=7, norm_maps=1e-4), mlp),
            "L": (LSTMConfig(hidden=5), MoEConfig(3, 2, d_hidden=4, d_shared=2)),
            "D": (S4DConfig(d_state=6),),
            "W": (AttentionConfig(heads=3, window=5), mlp),
        },
        pattern="MLDW",
        tie_embeddings=False,
    )
    normed = replace(mixed, norm="batch", embed_norm="batch")
    return [
        model_case("mamba2 + shared attention", zamba),
        model_case("mamba + lstm + experts + s4d + window", mixed),
        _on_features("step classifier", "lm", lambda: StepClassifier(mixed, 3, inputs=2, missing="carried"), 2),
        _on_features("step regressor", "lm", lambda: StepRegressor(normed, 1, inputs=2, missing="marked").eval(), 2),
    ]


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *_mixers(),
        *(Case(*parts) for parts in hidden_markov_cases()),
        *_irregular(),
        kalman_case("sequential", states=3, observed=2, parallel=False),
        kalman_case("parallel", states=2, observed=3, parallel=True),
        kalman_case("diffuse", states=3, observed=1, parallel=False, diffuse=2),
        *_models(),
    )
}
