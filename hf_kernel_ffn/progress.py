"""The one progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def track_progress(
    items: Iterable[Item], label: str, show: bool, total: int | None = None
) -> Iterable[Item]:
    """Iterate over ``items`` under a bar that appears with the first of them.

    Args:
        label: what is being done, such as ``converting``.
        show: without it, ``items`` are returned as they are.
        total: how many there are. None: ``items`` are counted, which makes a list of a generator.
    """
    if not show:
        return items
    from rich.progress import track

    if total is None and not isinstance(items, Sequence):
        items = list(items)
    return track(items, description=label, total=total)
