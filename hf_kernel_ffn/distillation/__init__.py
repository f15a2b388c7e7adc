"""Bring a converted model back to its teacher: a recipe, its stages, and the run of them."""

from .recipe import Recipe
from .recipe_file import load_recipe
from .run import distill
from .stopping import Terminated

__all__ = ["Recipe", "Terminated", "distill", "load_recipe"]
