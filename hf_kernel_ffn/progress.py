"""The one progress bar, over items or up to a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def count_progress(total: int, label: str, show: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar while the context is open, where items are not known beforehand.

    Args:
        total: what the count may come to.
        label: what is being done.
        show: without it, nothing is shown.

    Yields:
        a function that is told the count so far.
    """
    if not show:
        yield lambda count: None
        return
    from rich.progress import Progress

    with Progress() as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.update(task, completed=count)
