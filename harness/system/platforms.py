"""What works on which operating system. All of it is tried on Linux only."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from matrices.errors import UserError

# The energy counters of Intel and AMD processors (Linux, Documentation/power/powercap).
RAPL = Path("/sys/class/powercap")
ALSO_ELSEWHERE = "plan, report and show work"


def name() -> str:
    """The common name: Linux, macOS, Windows."""
    system = platform.system()
    return "macOS" if system == "Darwin" else system


def need_linux(command: str) -> None:
    """Cells run in processes that are followed through pidfd, prctl and /proc. Raises UserError
    where these are not."""
    if name() != "Linux":
        raise UserError(
            f"tunebench {command} needs Linux, and this is {name()}; {ALSO_ELSEWHERE} here"
        )


def prediction_obstacle() -> str:
    """Why no prediction can be made here, each in a forked process; empty where it can."""
    return "" if hasattr(os, "fork") else f"predictions need a system with fork; {name()} has none"


def limitations() -> str:
    """What does not work on this system; empty on Linux."""
    if name() == "Linux":
        return ""
    missing = "run, rerun, status and plan --check need Linux"
    return (
        f"{missing}{'; ' if prediction_obstacle() else ''}{prediction_obstacle()}; {ALSO_ELSEWHERE}"
    )
