"""Signals that stop a run: Ctrl-C, SIGTERM, a lost terminal.

Imports little: the command line sets its first handlers with it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from types import FrameType

# Windows has no SIGHUP.
STOP_SIGNALS = tuple(s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP"))


class Stopped(BaseException):
    """A signal arrived while there was nothing to finish first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """The stop signals received. While `raising`, one ends the run where it stands."""

    def __init__(self, received: Sequence[int] = (), raising: bool = True) -> None:
        self.received = list(received)
        self.raising = raising

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self.raising:
            raise Stopped(number)


@contextlib.contextmanager
def stop_signals() -> Iterator[Signals]:
    """Catch Ctrl-C, SIGTERM and a lost terminal for the length of the block."""
    signals = Signals()
    before = {number: signal.signal(number, signals.handle) for number in STOP_SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
