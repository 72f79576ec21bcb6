"""Processes that do not outlive the one that started them, however that ends.

Only Linux has this. Elsewhere a process ends when the one that started it ends it, and may be left
behind by one that was killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

# man 2 prctl
_PR_SET_PDEATHSIG = 1
# A process that finds this set ends with its parent; who starts it sets it.
VARIABLE = "TUNEBENCH_ENDS_WITH_PARENT"
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, `parent` by its pid, is gone.

    The parent is the thread that started this process, so start it from the main thread. It holds
    across `exec`, and not for what this process starts itself.
    """
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def ending_with_this() -> Callable[[], None]:
    """`preexec_fn` for a process that is to end with this one."""
    parent = os.getpid()
    return lambda: end_with_parent(parent)
