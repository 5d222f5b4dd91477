"""State space models, from Kalman to Mamba-2: one contract, any device.

Names are resolved on first use, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING

from dualform.core.lazy import lazy

if TYPE_CHECKING:
    from dualform.core.errors import DualformError
    from dualform.core.identify import identify
    from dualform.core.memory import Memory
    from dualform.core.packing import Packing
    from dualform.core.system import StateSpace
    from dualform.discrete.model import HiddenMarkov
    from dualform.gaussian.kalman import KalmanFilter
    from dualform.gaussian.model import LinearGaussian
    from dualform.gaussian.nonlinear import NonlinearGaussian
    from dualform.generation.batch import Engine, generate_batch
    from dualform.generation.engine import generate
    from dualform.generation.options import Sampling
    from dualform.generation.session import Session
    from dualform.models.config import ModelConfig
    from dualform.models.heads import SequenceClassifier, SequenceRegressor, StepClassifier, StepRegressor
    from dualform.models.lm import LanguageModel
    from dualform.models.presets import preset
    from dualform.models.quantized import quantize
    from dualform.models.saving.model import load, save
    from dualform.models.saving.onnx_file import export_onnx
    from dualform.ops.op import backend

__version__ = "0.1.0"

__all__ = [
    "DualformError",
    "Engine",
    "HiddenMarkov",
    "KalmanFilter",
    "LanguageModel",
    "LinearGaussian",
    "Memory",
    "ModelConfig",
    "NonlinearGaussian",
    "Packing",
    "Sampling",
    "SequenceClassifier",
    "SequenceRegressor",
    "Session",
    "StateSpace",
    "StepClassifier",
    "StepRegressor",
    "__version__",
    "backend",
    "export_onnx",
    "generate",
    "generate_batch",
    "identify",
    "load",
    "preset",
    "quantize",
    "save",
]

_HOME = {
    "DualformError": "core.errors",
    "Engine": "generation.batch",
    "HiddenMarkov": "discrete.model",
    "KalmanFilter": "gaussian.kalman",
    "LanguageModel": "models.lm",
    "LinearGaussian": "gaussian.model",
    "Memory": "core.memory",
    "ModelConfig": "models.config",
    "NonlinearGaussian": "gaussian.nonlinear",
    "Packing": "core.packing",
    "Sampling": "generation.options",
    "SequenceClassifier": "models.heads",
    "SequenceRegressor": "models.heads",
    "Session": "generation.session",
    "StateSpace": "core.system",
    "StepClassifier": "models.heads",
    "StepRegressor": "models.heads",
    "backend": "ops.op",
    "export_onnx": "models.saving.onnx_file",
    "generate": "generation.engine",
    "generate_batch": "generation.batch",
    "identify": "core.identify",
    "load": "models.saving.model",
    "preset": "models.presets",
    "quantize": "models.quantized",
    "save": "models.saving.model",
}
_PACKAGES = (
    "check",
    "compat",
    "core",
    "discrete",
    "forecast",
    "gaussian",
    "inspect",
    "layers",
    "models",
    "ops",
    "series",
    "train",
)

__getattr__, __dir__ = lazy(__name__, _HOME, _PACKAGES)
