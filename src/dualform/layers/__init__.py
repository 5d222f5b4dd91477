"""Published layers, one per file: config, state, mixer.

``Mamba2(64, d_state=16)`` is a module from ``(B, T, 64)`` to ``(B, T, 64)`` and a state; ``Mamba2Config(d_state=16)``
describes it for a model. ``MIXERS`` and ``FEEDFORWARDS`` hold the configs by the names that files use.
"""

from typing import TYPE_CHECKING

from dualform.core.lazy import lazy

if TYPE_CHECKING:
    from dualform.layers.attention import Attention, AttentionConfig
    from dualform.layers.bidirectional import Bidirectional, BidirectionalConfig
    from dualform.layers.block import Block, ChainConfig, ParallelConfig, SublayerConfig
    from dualform.layers.context import Context
    from dualform.layers.delta_net import DeltaNet, DeltaNetConfig
    from dualform.layers.dss import DSS, DSSConfig
    from dualform.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
    from dualform.layers.gated_delta_product import GatedDeltaProduct, GatedDeltaProductConfig
    from dualform.layers.gla import GLA, GLAConfig
    from dualform.layers.h3 import H3, H3Config
    from dualform.layers.hgrn import HGRN, HGRN2, HGRN2Config, HGRNConfig
    from dualform.layers.hyena import Hyena, HyenaConfig
    from dualform.layers.hyena_modal import HyenaModal, HyenaModalConfig
    from dualform.layers.kda import KDA, KDAConfig
    from dualform.layers.lightning_attention import LightningAttention, LightningAttentionConfig
    from dualform.layers.lru import LRU, LRUConfig
    from dualform.layers.lstm import LSTM, LSTMConfig
    from dualform.layers.mamba import Mamba, MambaConfig
    from dualform.layers.mamba2 import Mamba2, Mamba2Config
    from dualform.layers.mixer import Hint, Mixer
    from dualform.layers.mla import MLA, MLAConfig
    from dualform.layers.mlp import MLP, MLPConfig
    from dualform.layers.mlstm import MLSTM, MLSTMConfig
    from dualform.layers.moe import MoE, MoEConfig
    from dualform.layers.part import Part
    from dualform.layers.recall import Recall, RecallConfig
    from dualform.layers.registry import FEEDFORWARDS, MIXERS
    from dualform.layers.retnet import RetNet, RetNetConfig
    from dualform.layers.rglru import RGLRU, RGLRUConfig
    from dualform.layers.rwkv4 import RWKV4, RWKV4Config, RWKVChannel, RWKVChannelConfig
    from dualform.layers.rwkv6 import RWKV6, RWKV6Config
    from dualform.layers.rwkv7 import RWKV7, RWKV7Config
    from dualform.layers.s4 import S4, S4Config
    from dualform.layers.s4d import S4D, S4DConfig
    from dualform.layers.s5 import S5, S5Config
    from dualform.layers.short_conv import GatedShortConv, GatedShortConvConfig
    from dualform.layers.slstm import SLSTM, SLSTMConfig

__all__ = [
    "DSS",
    "FEEDFORWARDS",
    "GLA",
    "H3",
    "HGRN",
    "HGRN2",
    "KDA",
    "LRU",
    "LSTM",
    "MIXERS",
    "MLA",
    "MLP",
    "MLSTM",
    "RGLRU",
    "RWKV4",
    "RWKV6",
    "RWKV7",
    "S4",
    "S4D",
    "S5",
    "SLSTM",
    "Attention",
    "AttentionConfig",
    "Bidirectional",
    "BidirectionalConfig",
    "Block",
    "ChainConfig",
    "Context",
    "DSSConfig",
    "DeltaNet",
    "DeltaNetConfig",
    "GLAConfig",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "GatedDeltaProduct",
    "GatedDeltaProductConfig",
    "GatedShortConv",
    "GatedShortConvConfig",
    "H3Config",
    "HGRN2Config",
    "HGRNConfig",
    "Hint",
    "Hyena",
    "HyenaConfig",
    "HyenaModal",
    "HyenaModalConfig",
    "KDAConfig",
    "LRUConfig",
    "LSTMConfig",
    "LightningAttention",
    "LightningAttentionConfig",
    "MLAConfig",
    "MLPConfig",
    "MLSTMConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "MambaConfig",
    "Mixer",
    "MoE",
    "MoEConfig",
    "ParallelConfig",
    "Part",
    "RGLRUConfig",
    "RWKV4Config",
    "RWKV6Config",
    "RWKV7Config",
    "RWKVChannel",
    "RWKVChannelConfig",
    "Recall",
    "RecallConfig",
    "RetNet",
    "RetNetConfig",
    "S4Config",
    "S4DConfig",
    "S5Config",
    "SLSTMConfig",
    "SublayerConfig",
]

_HOME = {
    "KDA": "kda",
    "GatedDeltaProduct": "gated_delta_product",
    "GatedDeltaNet": "gated_delta_net",
    "DeltaNet": "delta_net",
    "RWKVChannel": "rwkv4",
    "RWKV7": "rwkv7",
    "RWKV6": "rwkv6",
    "RWKV4": "rwkv4",
    "GLA": "gla",
    "Attention": "attention",
    "Bidirectional": "bidirectional",
    "Block": "block",
    "ChainConfig": "block",
    "Context": "context",
    "DSS": "dss",
    "FEEDFORWARDS": "registry",
    "GatedShortConv": "short_conv",
    "H3": "h3",
    "HGRN": "hgrn",
    "HGRN2": "hgrn",
    "Hint": "mixer",
    "Hyena": "hyena",
    "HyenaModal": "hyena_modal",
    "LRU": "lru",
    "LSTM": "lstm",
    "LightningAttention": "lightning_attention",
    "MIXERS": "registry",
    "MLA": "mla",
    "MLP": "mlp",
    "MLSTM": "mlstm",
    "Mamba": "mamba",
    "Mamba2": "mamba2",
    "Mixer": "mixer",
    "MoE": "moe",
    "ParallelConfig": "block",
    "Part": "part",
    "RGLRU": "rglru",
    "Recall": "recall",
    "RetNet": "retnet",
    "S4": "s4",
    "S4D": "s4d",
    "S5": "s5",
    "SLSTM": "slstm",
    "SublayerConfig": "block",
}
_HOME |= {f"{name}Config": home for name, home in _HOME.items() if f"{name}Config" in __all__}

__getattr__, __dir__ = lazy(__name__, _HOME)
