"""The names that configs use for layers. A new layer is one line here."""

from typing import Any

from dualform.layers.attention import AttentionConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.s4d import S4DConfig

MIXERS: dict[str, type[Any]] = {
    "attention": AttentionConfig,
    "lstm": LSTMConfig,
    "mamba": MambaConfig,
    "mamba2": Mamba2Config,
    "s4d": S4DConfig,
}
FEEDFORWARDS: dict[str, type[Any]] = {"mlp": MLPConfig}
