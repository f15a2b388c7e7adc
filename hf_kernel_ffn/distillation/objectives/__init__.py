"""What a stage minimises: a file for each objective, which registers it under the stage's name."""

from .layer_wise import layer_wise
from .logits import logits
from .registry import OBJECTIVES, register_objective

__all__ = ["OBJECTIVES", "layer_wise", "logits", "register_objective"]
