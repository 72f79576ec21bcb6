"""Energy from a hardware counter: NVML on NVIDIA devices, else Intel RAPL of the whole package."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from harness import device
from harness.system.platforms import RAPL


class Energy(NamedTuple):
    joules: float | None
    reason: str | None


class EnergyMeter:
    """`start()` then `stop()`; a counter that does not exist gives None and why."""

    def __init__(self, rapl: Path = RAPL) -> None:
        self._rapl = rapl
        self._before: dict[str, float] = {}

    def start(self) -> None:
        self._before = self._read()

    def stop(self) -> Energy:
        after = self._read()
        if not self._before or self._before.keys() != after.keys():
            return Energy(None, "no NVML energy counter and no readable RAPL counter")
        used = 0.0
        for name, joules in after.items():
            delta = joules - self._before[name]
            if delta < 0:
                # RAPL counters wrap at max_energy_range_uj (kernel's powercap documentation).
                delta += _joules(self._rapl / name / "max_energy_range_uj") or 0.0
            if delta < 0:
                return Energy(None, f"the counter {name} went backwards")
            used += delta
        return Energy(used, None)

    def _read(self) -> dict[str, float]:
        gpu = device.energy_joules()
        if gpu is not None:
            return {"nvml": gpu}
        # Only whole packages (intel-rapl:0), not their parts (intel-rapl:0:0), which they contain.
        found = {}
        for package in sorted(self._rapl.glob("intel-rapl:*")):
            joules = _joules(package / "energy_uj")
            if package.name.count(":") == 1 and joules is not None:
                found[package.name] = joules
        return found


def _joules(counter: Path) -> float | None:
    try:
        return int(counter.read_text()) / 1e6
    except (OSError, ValueError):
        return None
