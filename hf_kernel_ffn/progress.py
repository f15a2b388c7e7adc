"""The one progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def track_progress(items: Iterable[Item], label: str, show: bool) -> Iterable[Item]:
    """Iterate over ``items`` under a bar that appears with the first of them.

    Args:
        items: counted beforehand, which makes a list of a generator.
        label: what is being done, such as ``converting``.
        show: without it, ``items`` are returned as they are.
    """
    if not show:
        return items
    from rich.progress import track

    sequence = items if isinstance(items, Sequence) else list(items)
    return track(sequence, description=label)
