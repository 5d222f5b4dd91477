"""State space models, from Kalman to Mamba-3: one contract, any device.

Names are resolved on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "StateSpace": "dualform.core.system",
    "backend": "dualform.ops.op",
    "LinearGaussian": "dualform.gaussian.model",
    "KalmanFilter": "dualform.gaussian.kalman",
    "ModelConfig": "dualform.models.config",
    "LanguageModel": "dualform.models.lm",
    "preset": "dualform.models.presets",
    "load": "dualform.models.store",
    "generate": "dualform.generation.engine",
    "Sampling": "dualform.generation.sampling",
    "DualformError": "dualform.core.errors",
}
_PACKAGES = ("check", "core", "gaussian", "layers", "models", "ops", "train")

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _PACKAGES:
        value = import_module(f"dualform.{name}")
    else:
        raise AttributeError(f"module 'dualform' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_PACKAGES])
