"""Bring a converted model back to its teacher: a recipe, its stages, and the loop that runs them."""

from .recipe import Recipe, load_recipe
from .run import distill
from .stopping import Terminated

__all__ = ["Recipe", "Terminated", "distill", "load_recipe"]
