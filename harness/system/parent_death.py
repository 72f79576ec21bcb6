"""Processes that do not outlive the one that started them, however that ends.

Only Linux has this. Elsewhere a process ends when the one that started it ends it, and may be left
behind by one that was killed. There are three ways, because three things are wanted:

* One process: the kernel kills it (`end_with_parent`). Everything that `child_process` starts and
  forks, and the fork server, has it.
* A worker and all that it has started (data loaders, compilers): `launch.processes.server` kills
  their group. That needs the leader alive, because the number of a dead leader may name another
  group by now, so the kernel's way, which kills the leader alone, would leave the others behind.
* A cell whose record has to be finished first: the process that runs the cells of a Ray worker
  (`launch.engines.ray.task`) stops in good order when its standard input ends.
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
# Loaded before any fork: a child of several threads must not load anything.
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


def preexec_end_with_parent() -> Callable[[], None] | None:
    """`preexec_fn` that makes a child end with this process; None except on Linux."""
    parent = os.getpid()
    return (lambda: end_with_parent(parent)) if _LIBC is not None else None
