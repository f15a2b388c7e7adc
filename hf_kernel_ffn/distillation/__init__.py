"""Bring a converted model back to its teacher: a recipe, its stages, and the loop that runs them."""

from .loop import distill
from .recipe import Recipe, load_recipe
from .stopping import Terminated

__all__ = ["Recipe", "Terminated", "distill", "load_recipe"]
