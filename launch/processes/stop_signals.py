"""Signals that stop a run: Ctrl-C, SIGTERM, a lost terminal.

Imports little, because the command line sets its first handlers with it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from types import FrameType

# Windows has no SIGHUP.
STOP_SIGNALS = tuple(s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP"))


class Stopped(BaseException):
    """A signal came while nothing had to be finished first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """The stop signals received. While `raising`, a signal raises Stopped at once."""

    def __init__(self, received: Sequence[int] = (), raising: bool = True) -> None:
        self.received = list(received)
        self.raising = raising

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self.raising:
            raise Stopped(number)


@contextlib.contextmanager
def stop_signals(numbers: Sequence[int] = STOP_SIGNALS, raising: bool = True) -> Iterator[Signals]:
    """Catch Ctrl-C, SIGTERM and a lost terminal, or other signals, in the block."""
    signals = Signals(raising=raising)
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopping_text(cells: int) -> str:
    """The message of a run on the first signal, while it measures so many cells."""
    asked = "1 cell is asked to write its record"
    if cells != 1:
        asked = f"{cells} cells are asked to write their records"
    return f"stopping: {asked}; a second Ctrl-C leaves at once"
