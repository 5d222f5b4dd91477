"""Training: a recipe says what, :func:`train` does it.

from dualform.train import Recipe, train

folder = train(Recipe.load("stdlib", ["minutes=10", "out=runs/ten"]))
"""

from dualform.core.lazy import explain_call
from dualform.train.loop import train
from dualform.train.recipe import Data, Optim, Recipe

__all__ = ["Data", "Optim", "Recipe", "train"]

explain_call(__name__, "from dualform.train import Recipe, train; train(Recipe.load('my.toml'))")
