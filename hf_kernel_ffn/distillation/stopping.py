"""Being told to stop: SIGTERM, as a pre-emptible machine sends it some seconds before it goes away,
or SIGINT, which Ctrl-C sends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C (SIGINT)"}
"""The signals that ask to stop, and how messages call them."""
ELSEWHERE = "a signal to another process"


class Terminated(BaseException):
    """A distillation was told to stop, and has; the message says what is left.

    Like KeyboardInterrupt, it is no Exception: what handles errors lets it pass.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.exit_code = 128 + number
        """As a shell reports a process that the signal ended."""


class Stop:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.number: signal.Signals | None = None
        """The signal that asked this process."""
        self.between_steps = False
        """The stages are running: they look at ``asked`` after each step, save and stop. Before
        them nothing is worth saving."""

    def terminated(self, when: str) -> Terminated:
        """What to raise: "stopped by …" and ``when``."""
        name = ELSEWHERE if self.number is None else NAMES[self.number]
        return Terminated(f"stopped by {name} {when}", self.number or signal.SIGTERM)


@contextmanager
def on_stop_signals() -> Iterator[Stop]:
    """While the context is open, the first SIGTERM or SIGINT asks to stop; the second ends the
    process as ever. Signals reach the main thread only: in another one this does nothing."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    before = {number: signal.getsignal(number) for number in NAMES}
    # A process that was started to ignore a signal goes on ignoring it.
    before = {
        number: handler for number, handler in before.items() if handler is not signal.SIG_IGN
    }

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        put_back()
        stop.asked = True
        stop.number = signal.Signals(number)
        if not stop.between_steps:
            raise stop.terminated(
                "outside of training: nothing new is saved; start again, by --resume if it had "
                "begun to train"
            )

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        put_back()
