"""The processor time of other processes while something is timed."""

from __future__ import annotations

import os

import psutil


def foreign_share(all_busy: float, own_busy: float, available: float) -> float | None:
    """(busy seconds of all - of this process) / processor seconds available.

    None when the system counts less than this process used: some virtual machines count little or
    nothing. With clock ticks of 10 ms the result may be slightly negative, which counts as 0.
    """
    if available <= 0 or all_busy < 0.95 * own_busy - 0.05:
        return None
    return max(0.0, all_busy - own_busy) / available


class ForeignCpuMeter:
    """`start()`, then `share()` over the time since. Idle and I/O wait are not busy."""

    def __init__(self) -> None:
        self._before: tuple[float, float, float] | None = None

    def start(self) -> None:
        self._before = self._read()

    def share(self) -> float | None:
        if self._before is None:
            return None
        busy, own, total = (now - old for now, old in zip(self._read(), self._before, strict=True))
        return foreign_share(busy, own, total)

    def _read(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        own = os.times()
        total = sum(times[:8])  # guest times are counted within user and nice
        idle = times.idle + getattr(times, "iowait", 0.0)
        return total - idle, own.user + own.system, total
