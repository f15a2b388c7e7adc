"""The objectives by the names that stages have in a recipe."""

from __future__ import annotations

from collections.abc import Callable

from ..step import Objective

OBJECTIVES: dict[str, Objective] = {}
"""By name of the stage."""


def register_objective(name: str) -> Callable[[Objective], Objective]:
    """Decorate an objective with this, to register it for stages of that ``name``."""

    def register(objective: Objective) -> Objective:
        OBJECTIVES[name] = objective
        return objective

    return register
