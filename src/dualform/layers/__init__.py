"""Published layers, one per file: config, state, mixer. ``MIXERS[kind](...).build(d_model)`` makes one."""

from dualform.layers.mixer import Hint, Mixer
from dualform.layers.registry import FEEDFORWARDS, MIXERS

__all__ = ["FEEDFORWARDS", "MIXERS", "Hint", "Mixer"]
