"""Being told to stop: SIGTERM, as a pre-emptible machine sends it some seconds before it goes away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(BaseException):
    """A distillation was told to stop, and has; the message says what is left. Like KeyboardInterrupt, no handler of errors takes it."""


class Stop:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.between_steps = False
        """The stages are running: they look at ``asked`` after each step, save and stop. Before them nothing is worth saving."""


@contextmanager
def on_sigterm() -> Iterator[Stop]:
    """While the context is open, the first SIGTERM asks to stop; the second ends the process as ever. Signals reach the main thread
    only: in another one this does nothing."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def asked(number, frame) -> None:
        signal.signal(signal.SIGTERM, before)
        stop.asked = True
        if not stop.between_steps:
            raise Terminated(
                "stopped by SIGTERM outside of training: nothing new is saved; start again, by --resume if it had begun to train"
            )

    before = signal.signal(signal.SIGTERM, asked)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
