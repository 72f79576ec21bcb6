"""SIGTERM as an exception that is raised until it is handled. POSIX only.

Python drops an exception that a signal handler raises inside a destructor or a weakref callback
(it prints "Exception ignored in ..."), and the memory ledger lives on weakref callbacks. A library
may also catch BaseException. So the exception is raised again until `stop_raising` is called.
"""

from __future__ import annotations

import signal
from types import FrameType

# Long enough for context managers and `finally` blocks to end on the way up.
REPEAT_SECONDS = 1.0


class Interrupted(BaseException):
    """The worker was told to stop. Not an Exception: no library may swallow it."""


def raise_on_sigterm() -> None:
    """Raise Interrupted in the main thread on SIGTERM, again every second until `stop_raising`."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt)


def stop_raising() -> None:
    """Stop raising Interrupted: it has been handled."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS, REPEAT_SECONDS)
    raise Interrupted(f"stopped by {signal.SIGTERM.name}")
