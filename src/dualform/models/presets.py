"""Models by name: the sizes of the papers, and small byte-level ones that a laptop trains."""

from dualform.core.calls import explained
from dualform.core.errors import ConfigError
from dualform.core.options import suggestion
from dualform.layers.attention import AttentionConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mixer import PartConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.moe import MoEConfig
from dualform.layers.s4d import S4DConfig
from dualform.models.config import ModelConfig


@explained
def preset(name: str) -> ModelConfig:
    """The config called ``name``; ``LanguageModel(preset(name))`` is that model, untrained.

    Raises:
        ConfigError: for a name that does not exist; suggests the nearest.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}", hint=suggestion(name, list(PRESETS)))
    return PRESETS[name]


def _mamba(layers: int, d_model: int) -> ModelConfig:
    """Gu & Dao (2023), arXiv:2312.00752, table 12. The vocabulary is GPT-NeoX's, padded to a multiple of 8."""
    return ModelConfig(50280, d_model, {"M": (MambaConfig(),)}, "M" * layers)


def _mamba2(layers: int, d_model: int) -> ModelConfig:
    """Dao & Gu (2024), arXiv:2405.21060, section 9. The vocabulary is GPT-NeoX's, padded to a multiple of 16."""
    return ModelConfig(50288, d_model, {"M": (Mamba2Config(),)}, "M" * layers)


def _bytes(pattern: str, **parts: tuple[PartConfig, ...]) -> ModelConfig:
    """About half a million parameters that each byte uses."""
    return ModelConfig(256, 128, parts, pattern)


def _moe_mamba() -> ModelConfig:
    """Pióro et al. (2024), arXiv:2401.04081, section 3.1: layers of Mamba and of one expert for each byte in turn."""
    return _bytes("ME" * 3, M=(MambaConfig(),), E=(MoEConfig(top_k=1, normalise=False, d_hidden=96),))


def _samba() -> ModelConfig:
    """Ren et al. (2024), arXiv:2406.07522, section 2: Mamba, feed-forward, attention over a window, feed-forward."""
    mlp = MLPConfig(d_hidden=128)
    return _bytes("MS" * 2, M=(MambaConfig(), mlp), S=(AttentionConfig(heads=4, window=128), mlp))


def _jamba() -> ModelConfig:
    """Lieber et al. (2024), arXiv:2403.19887, section 3: experts in every second layer, attention without positions.

    Here every fourth layer has attention; in the paper it is every eighth.
    """
    mlp, moe = MLPConfig(d_hidden=48), MoEConfig(d_hidden=48, top_k=2, normalise=False)
    return _bytes("MEAE", M=(MambaConfig(), mlp), E=(MambaConfig(), moe), A=(AttentionConfig(heads=4, rope=None), mlp))


_SMALL_MAMBA2 = Mamba2Config(d_state=32, d_head=64)

PRESETS: dict[str, ModelConfig] = {
    "mamba-130m": _mamba(24, 768),
    "mamba-370m": _mamba(48, 1024),
    "mamba-790m": _mamba(48, 1536),
    "mamba-1.4b": _mamba(48, 2048),
    "mamba-2.8b": _mamba(64, 2560),
    "mamba2-130m": _mamba2(24, 768),
    "mamba2-370m": _mamba2(48, 1024),
    "mamba2-780m": _mamba2(48, 1536),
    "mamba2-1.3b": _mamba2(48, 2048),
    "mamba2-2.7b": _mamba2(64, 2560),
    "byte-hybrid": _bytes("MMAM", M=(_SMALL_MAMBA2,), A=(AttentionConfig(heads=4, window=128), MLPConfig())),
    "byte-mamba2": _bytes("MMMM", M=(_SMALL_MAMBA2,)),
    "byte-mamba": _bytes("MMMM", M=(MambaConfig(),)),
    "byte-transformer": _bytes("AAA", A=(AttentionConfig(heads=4), MLPConfig(d_hidden=256))),
    "byte-lstm": _bytes("LLL", L=(LSTMConfig(hidden=144),)),
    "byte-moe-mamba": _moe_mamba(),
    "byte-samba": _samba(),
    "byte-jamba": _jamba(),
    "byte-s4d": _bytes("SSSS", S=(S4DConfig(), MLPConfig(d_hidden=192))),
}
