"""The names that configs use for layers. A new layer is one line here."""

from typing import Any

from dualform.layers.attention import AttentionConfig
from dualform.layers.dss import DSSConfig
from dualform.layers.h3 import H3Config
from dualform.layers.hyena import HyenaConfig
from dualform.layers.hyena_modal import HyenaModalConfig
from dualform.layers.lru import LRUConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.s4 import S4Config
from dualform.layers.s4d import S4DConfig
from dualform.layers.s5 import S5Config

MIXERS: dict[str, type[Any]] = {
    "attention": AttentionConfig,
    "dss": DSSConfig,
    "h3": H3Config,
    "hyena": HyenaConfig,
    "hyena_modal": HyenaModalConfig,
    "lru": LRUConfig,
    "lstm": LSTMConfig,
    "mamba": MambaConfig,
    "mamba2": Mamba2Config,
    "s4": S4Config,
    "s4d": S4DConfig,
    "s5": S5Config,
}
FEEDFORWARDS: dict[str, type[Any]] = {"mlp": MLPConfig}
