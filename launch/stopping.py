"""Signals that stop a run: Ctrl-C, SIGTERM, a lost terminal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

from launch.entry import STOP_SIGNALS


class Stopped(BaseException):
    """A signal arrived while there was nothing to finish first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass
class Signals:
    """The stop signals received. While `raising`, one ends the run where it stands."""

    received: list[int] = field(default_factory=list)
    raising: bool = True

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
