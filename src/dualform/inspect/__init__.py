"""Pictures of memories, layers and systems; every ``draw`` function returns a Matplotlib figure."""

from dualform.core.lazy import explain_call
from dualform.inspect.folder import pictures_of_layer, pictures_of_measure, pictures_of_model, save
from dualform.inspect.memory import draw_memory
from dualform.inspect.response import draw_frequency, draw_impulse
from dualform.inspect.spectrum import draw_poles
from dualform.inspect.systems import is_linear, linear_parts, state_spaces

__all__ = [
    "draw_frequency",
    "draw_impulse",
    "draw_memory",
    "draw_poles",
    "is_linear",
    "linear_parts",
    "pictures_of_layer",
    "pictures_of_measure",
    "pictures_of_model",
    "save",
    "state_spaces",
]

explain_call(__name__, "it has functions such as dualform.inspect.draw_poles; dualform inspect is a command")
