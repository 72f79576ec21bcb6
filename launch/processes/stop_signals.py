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
def stop_signals(numbers: Sequence[int] = STOP_SIGNALS, raising: bool = True) -> Iterator[Signals]:
    """Catch Ctrl-C, SIGTERM and a lost terminal, or other signals, for the length of the block."""
    signals = Signals(raising=raising)
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopping_text(cells: int) -> str:
    """What a run says on the first signal; `cells` are being measured at that moment."""
    asked = "1 cell is asked to write its record"
    if cells != 1:
        asked = f"{cells} cells are asked to write their records"
    return f"stopping: {asked}; a second Ctrl-C leaves at once"
