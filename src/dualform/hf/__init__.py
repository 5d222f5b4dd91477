"""Models of this library as models of transformers.

    import dualform.hf  # registers them with AutoConfig and AutoModelForCausalLM

    model = dualform.hf.load("state-spaces/mamba-130m-hf")  # whatever dualform.load reads
    model.generate(tokens, max_new_tokens=20)  # beams, Trainer, PEFT and lm-evaluation-harness alike

It needs the extra ``hf``: ``pip install "dualform[hf]"``.
"""

from dualform.core.errors import DualformError

try:
    import transformers as _transformers
except ImportError as error:
    raise DualformError(
        "dualform.hf needs transformers, which is not installed", hint='pip install "dualform[hf]"'
    ) from error

from dualform.hf.cache import StateCache
from dualform.hf.configuration import DualformConfig
from dualform.hf.modeling import DualformForCausalLM, load

_transformers.AutoConfig.register(DualformConfig.model_type, DualformConfig, exist_ok=True)
_transformers.AutoModelForCausalLM.register(DualformConfig, DualformForCausalLM, exist_ok=True)

__all__ = ["DualformConfig", "DualformForCausalLM", "StateCache", "load"]
