"""Training: a recipe says what, :func:`train` does it.

from dualform.train import Recipe, train

folder = train(Recipe.load("stdlib", ["minutes=10", "out=runs/ten"]))
"""

from dualform.train.loop import train
from dualform.train.recipe import Data, Optim, Recipe

__all__ = ["Data", "Optim", "Recipe", "train"]
