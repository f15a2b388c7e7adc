"""Bring a converted model back to its teacher: a recipe, its stages, and the loop that runs them."""

from .loop import distill
from .recipe import Recipe, load_recipe

__all__ = ["Recipe", "distill", "load_recipe"]
