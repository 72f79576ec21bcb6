"""The devices of this machine, and the locks by which runners share them.

A device is a GPU (its UUID) or, on a machine without one, a processor (`cpu:0`). A runner locks the
devices of a cell while the cell runs, with files in the cache directory, so that two runners of one
user never use the same device. The operating system releases the locks of a dead runner.
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

# A GPU frees the memory of a dead process within this time.
RELEASE_SECONDS = 10.0
# How often the runner looks for foreign processes on the devices of a cell.
LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Grant:
    """The devices that a cell may use, and the variables that hide all others from it.

    `cores` is its number of processor cores; none means all that this process may use.
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


def granted_devices(cores: int | None = None, exclusive: bool = False) -> Grant:
    """The devices that an engine (SLURM, Ray) makes visible to this process."""
    # A process of Ray's gets other devices with each task.
    provenance.nvml.cache_clear()
    provenance.hardware.cache_clear()
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    environment = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
    return Grant(local_devices(), environment, exclusive, cores)


@dataclass
class Lease:
    """Devices held for one cell until `release`, or in `refused` why it must not start."""

    grant: Grant
    locks: list[FileLock] = field(default_factory=list)
    refused: str = ""

    def release(self) -> None:
        for lock in self.locks:
            lock.release()
        self.locks = []


class DevicePool:
    """Gives the devices of this machine to cells. `exclusive`: one cell at a time gets all."""

    def __init__(
        self,
        exclusive: bool = True,
        allow_busy: bool = False,
        devices: Sequence[str] | None = None,
        directory: Path | None = None,
        cores: int | None = None,
    ) -> None:
        """`directory` holds the locks.  [default: one per host, in the cache directory] `cores` is
        the number of cores of a cell.  [default: in proportion to its devices]"""
        self.exclusive = exclusive
        self.allow_busy = allow_busy
        self.devices = tuple(local_devices() if devices is None else devices)
        self.directory = directory or cache_directory() / "slots" / socket.gethostname()
        self._cores = cores
        self._queue_lock: FileLock | None = None

    def acquire(self, count: int, keep_place: bool = True) -> Lease | None:
        """Devices for one cell; none while others hold them. With `keep_place` this pool is first
        in the queue until its next call.

        Raises UserError when the machine has fewer, when a process that is no cell uses them, and
        when locks cannot be written.
        """
        if count > len(self.devices):
            raise UserError(
                f"a cell needs {count} devices and this machine has {len(self.devices)}",
                key="devices",
            )
        line = self._queue_lock or self._lock("line")
        self._queue_lock = None
        if line is None:
            return None
        locks = {name: lock for name in self.devices if (lock := self._lock(name))}
        enough = len(self.devices) if self.exclusive else count
        if len(locks) < enough:
            _release(locks.values())
            # Otherwise cells that need one device would always come before one that needs many.
            if keep_place and enough > 1:
                self._queue_lock = line
            else:
                line.release()
            return None
        try:
            chosen = self._choose_idle(list(locks), count)
        except UserError:
            _release([*locks.values(), line])
            raise
        kept = list(locks) if self.exclusive else chosen
        _release([lock for name, lock in locks.items() if name not in kept])
        line.release()
        return Lease(self._grant(chosen), [locks[name] for name in kept])

    def close(self) -> None:
        """Leave the queue."""
        if self._queue_lock is not None:
            self._queue_lock.release()
            self._queue_lock = None

    def _lock(self, name: str) -> FileLock | None:
        lock = FileLock(self.directory / f"{name.replace(':', '-')}.lock", thread_local=False)
        with cache_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                return None
        return lock

    def _choose_idle(self, names: list[str], count: int) -> list[str]:
        """`count` of the named devices, idle ones first. Raises UserError when a process uses one
        of them."""
        until = time.monotonic() + RELEASE_SECONDS
        while True:
            found = occupants([name for name in names if not name.startswith("cpu:")])
            used = {occupant.uuid for occupant in found}
            chosen = sorted(names, key=lambda name: name in used)[:count]
            taken = [occupant for occupant in found if occupant.uuid in chosen]
            if self.allow_busy or not taken:
                return sorted(chosen, key=self.devices.index)
            if time.monotonic() > until:
                raise UserError(f"{occupant_text(taken[0])}; wait for it, or run with --allow-busy")
            time.sleep(0.5)

    def _grant(self, chosen: Sequence[str]) -> Grant:
        on_gpu = not chosen[0].startswith("cpu:")
        some = len(chosen) < len(self.devices)
        # Not set when it would hide nothing, because a variable that is set is recorded.
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(chosen)} if on_gpu and some else {}
        return Grant(tuple(chosen), environment, self.exclusive, self.cores(len(chosen)))

    def cores(self, count: int) -> int | None:
        """The processor cores of a cell on `count` devices; none means all."""
        if self._cores is not None or self.exclusive or not self.devices:
            return self._cores
        return max(1, provenance.cpu_threads() * count // len(self.devices))


def _release(locks: Iterable[FileLock]) -> None:
    for lock in locks:
        lock.release()


def occupant_text(occupant: Occupant) -> str:
    """`GPU 1234 (NVIDIA A100) is in use: pid 77 (python) holds 3.00 GiB`."""
    name = occupant.name or "not visible from here"
    held = "memory" if occupant.bytes is None else bytes_text(occupant.bytes)
    return f"{occupant.uuid} ({occupant.gpu}) is in use: pid {occupant.pid} ({name}) holds {held}"


class ForeignProcesses:
    """The processes that use a running cell's devices and are not its own; `found` has a line for
    each, by pid."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.gpus = [name for name in devices if not name.startswith("cpu:")]
        self.found: dict[int, str] = {}
        self._looked = float("-inf")

    def look(self, own: Callable[[], set[int]]) -> None:
        """Look again after LOOK_SECONDS. `own` gives the pids of the cell's processes."""
        if not self.gpus or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        # NVML gives the host's pids; a container does not know those of other containers.
        pids = own()
        present = [each for each in occupants(self.gpus) if process_name(each.pid)]
        if present:
            pids |= own()  # the cell may have started processes meanwhile
        for occupant in present:
            if occupant.pid not in pids:
                self.found.setdefault(occupant.pid, occupant_text(occupant))
