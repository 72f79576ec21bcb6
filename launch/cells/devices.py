"""The devices of this machine, and which runner has which of them.

A device is a GPU (its UUID) or, on a machine without one, a processor (`cpu:0`). Every runner of a
user locks the devices of a cell while the cell runs, in files of the cache directory, so that two
runners on one machine never share one. The operating system gives a dead runner's locks back.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from harness.meters.gpu_processes import Occupant, occupants, process_name
from harness.records import provenance
from matrices.errors import UserError
from matrices.files.cache import cache_directory, cache_errors
from reports.text import bytes_text

# The memory of a process that has just ended is held a little longer.
RELEASE_SECONDS = 10.0
# How often devices in use are looked at for what does not belong there.
LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Grant:
    """The devices a cell may use, and the environment that shows it no others.

    `cores` are the processor cores that come with them; none means all that may be used here.
    """

    devices: tuple[str, ...]
    environment: dict[str, str]
    exclusive: bool
    cores: int | None = None


def local_devices() -> tuple[str, ...]:
    """The GPUs that are visible here; without one, the processors this process may run on."""
    if provenance.uses_gpu_here():
        return tuple(gpu.uuid for gpu in provenance.nvml().gpus)
    if hasattr(os, "sched_getaffinity"):
        return tuple(f"cpu:{number}" for number in sorted(os.sched_getaffinity(0)))
    return tuple(f"cpu:{number}" for number in range(provenance.usable_cpus()))


def given(cores: int | None = None, exclusive: bool = False) -> Grant:
    """What an engine (SLURM, Ray) has given this process: the devices it makes visible."""
    # A process of Ray's runs one task after another, each with devices of its own.
    provenance.nvml.cache_clear()
    provenance.hardware.cache_clear()
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    environment = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
    return Grant(local_devices(), environment, exclusive, cores)


@dataclass
class Lease:
    """Devices held for one cell, until `release`; or why it is not to be started."""

    grant: Grant
    locks: list[FileLock] = field(default_factory=list)
    refused: str = ""

    def release(self) -> None:
        for lock in self.locks:
            lock.release()
        self.locks = []


class Slots:
    """Hands out the devices of this machine. `exclusive`: all of it to one cell at a time."""

    def __init__(
        self,
        exclusive: bool = True,
        allow_busy: bool = False,
        devices: Sequence[str] | None = None,
        directory: Path | None = None,
        cores: int | None = None,
    ) -> None:
        """`directory` holds the locks.  [default: in the cache directory, one for each host]
        `cores` come with the devices of a cell.  [default: its share of the machine's]"""
        self.exclusive = exclusive
        self.allow_busy = allow_busy
        self.devices = tuple(local_devices() if devices is None else devices)
        self.directory = directory or cache_directory() / "slots" / socket.gethostname()
        self._cores = cores
        self._place_in_line: FileLock | None = None

    def ask(self, count: int, patient: bool = True) -> Lease | None:
        """Devices for one cell; none while others hold them. `patient` keeps a place in line for
        the next time: nobody who asks later comes first.

        Raises UserError when the machine has fewer, when a process that is no cell uses them, and
        when locks cannot be written.
        """
        if count > len(self.devices):
            raise UserError(
                f"a cell needs {count} devices and this machine has {len(self.devices)}",
                key="devices",
            )
        line = self._place_in_line or self._lock("line")
        self._place_in_line = None
        if line is None:
            return None
        locks = {name: lock for name in self.devices if (lock := self._lock(name))}
        enough = len(self.devices) if self.exclusive else count
        if len(locks) < enough:
            _release(locks.values())
            # Who needs many devices would wait for ever behind those who need one.
            if patient and enough > 1:
                self._place_in_line = line
            else:
                line.release()
            return None
        try:
            chosen = self._idle(list(locks), count)
        except UserError:
            _release([*locks.values(), line])
            raise
        kept = list(locks) if self.exclusive else chosen
        _release([lock for name, lock in locks.items() if name not in kept])
        line.release()
        return Lease(self._grant(chosen), [locks[name] for name in kept])

    def close(self) -> None:
        """Give up the place in line."""
        if self._place_in_line is not None:
            self._place_in_line.release()
            self._place_in_line = None

    def _lock(self, name: str) -> FileLock | None:
        lock = FileLock(self.directory / f"{name.replace(':', '-')}.lock", thread_local=False)
        with cache_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                return None
        return lock

    def _idle(self, names: list[str], count: int) -> list[str]:
        """`count` of the named devices, those first that nobody uses. Raises UserError when that
        takes one that somebody does use."""
        until = time.monotonic() + RELEASE_SECONDS
        while True:
            found = occupants([name for name in names if not name.startswith("cpu:")])
            used = {occupant.uuid for occupant in found}
            chosen = sorted(names, key=lambda name: name in used)[:count]
            taken = [occupant for occupant in found if occupant.uuid in chosen]
            if self.allow_busy or not taken:
                return sorted(chosen, key=self.devices.index)
            if time.monotonic() > until:
                raise UserError(f"{in_words(taken[0])}; wait for it, or run with --allow-busy")
            time.sleep(0.5)

    def _grant(self, chosen: Sequence[str]) -> Grant:
        on_gpu = not chosen[0].startswith("cpu:")
        some = len(chosen) < len(self.devices)
        # Only where it hides something: a variable that is set is part of the record.
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(chosen)} if on_gpu and some else {}
        return Grant(tuple(chosen), environment, self.exclusive, self.cores(len(chosen)))

    def cores(self, count: int) -> int | None:
        """The processor cores that come with so many devices; none means all of them."""
        if self._cores is not None or self.exclusive or not self.devices:
            return self._cores
        return max(1, provenance.cpu_threads() * count // len(self.devices))


def _release(locks: Iterable[FileLock]) -> None:
    for lock in locks:
        lock.release()


def in_words(occupant: Occupant) -> str:
    """`GPU 1234 (NVIDIA A100) is in use: pid 77 (python) holds 3.00 GiB`."""
    name = occupant.name or "not visible from here"
    held = "memory" if occupant.bytes is None else bytes_text(occupant.bytes)
    return f"{occupant.uuid} ({occupant.gpu}) is in use: pid {occupant.pid} ({name}) holds {held}"


class Guard:
    """Watches a cell's devices while it runs for processes that are none of its own.

    Held against those that were there first, too: `found` has a line for each.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self.gpus = [name for name in devices if not name.startswith("cpu:")]
        self.found: dict[int, str] = {}
        self._looked = float("-inf")

    def look(self, own: Callable[[], set[int]]) -> None:
        """Every LOOK_SECONDS; `own` are the pids of the cell's processes."""
        if not self.gpus or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        # NVML tells the host's pids: in a container, those of its own processes mean nothing.
        before = own()
        seen = [each for each in occupants(self.gpus) if process_name(each.pid)]
        mine = before | own() if seen else before
        for occupant in seen:
            if occupant.pid not in mine:
                self.found.setdefault(occupant.pid, in_words(occupant))
