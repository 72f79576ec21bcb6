"""Reads a results directory while runners work: unfinished attempts, locks, new records.

It only reads files. So it works on any machine that sees the directory, and disturbs no runner.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from harness.ranks import state_files
from harness.ranks.progress_file import Progress, read_progress
from harness.records.ranks import RankState
from harness.records.reading import RECORD, read_valid, records_in
from harness.records.record import Record
from harness.records.store import Entry, Store
from matrices.errors import UserError

LOCKS = Path("/proc/locks")
# struct flock of Linux on 64 bits: type, whence, start, length, pid.
FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True)
class UnfinishedAttempt:
    """An attempt without a final record, in its working directory.

    `held`: some runner has its claim. Otherwise its runner died, and the next run of its cell
    publishes it.
    """

    key: str
    directory: Path
    held: bool
    record: Record
    progress: Progress
    ranks: list[RankState] = field(default_factory=list)

    @property
    def hosts(self) -> list[str]:
        """Its machines, that of the first rank first."""
        return list(dict.fromkeys([*(r.host for r in self.ranks), *self.record.placement.hosts]))


def unfinished_attempts(
    store: Store, wanted: Callable[[str], bool] = lambda key: True
) -> list[UnfinishedAttempt]:
    """The unfinished attempts of the wanted keys."""
    found = []
    for key, directory in store.abandoned():
        if not wanted(key):
            continue
        record = read_valid(directory / RECORD)
        if record is None:
            continue
        try:
            progress, ranks = read_progress(directory), state_files.read_states(directory)
        except (OSError, ValueError, UserError):
            continue  # begun or published now, or no record
        found.append(
            UnfinishedAttempt(key, directory, is_held(store, key), record, progress, ranks)
        )
    return found


def is_held(store: Store, key: str) -> bool:
    """Whether a runner has the claim on a key, or a worker whose runner died still has its lock."""
    return _locked(store.claims / f"{key}.lock") or _locked(store.worker_lock(key))


def _locked(path: Path) -> bool:
    """Whether any process holds the lock of a file. Does not take the lock, because another process
    may try to take it now."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return _on_this_machine(os.fstat(lock)) or _on_another(lock)
    finally:
        os.close(lock)


def _on_this_machine(file: os.stat_result) -> bool:
    """By proc(5): `1: FLOCK  ADVISORY  WRITE 123 08:01:2048 0 EOF`. It does not show other
    containers."""
    major, minor, inode = os.major(file.st_dev), os.minor(file.st_dev), str(file.st_ino)
    try:
        lines = [line.split() for line in LOCKS.read_text().splitlines() if " -> " not in line]
    except OSError:
        return False
    held = {fields[5].rpartition(":")[::2] for fields in lines if fields[1] == "FLOCK"}
    if major == 0:  # btrfs and overlays have other device numbers there than in stat
        return any(inode == number for _, number in held)
    return (f"{major:02x}:{minor:02x}", inode) in held


def _on_another(lock: int) -> bool:
    """By F_OFD_GETLK: NFS turns flock into a lock of the server's (nfs(5))."""
    request = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        kind, *_ = FLOCK.unpack(fcntl.fcntl(lock, fcntl.F_OFD_GETLK, request))
    except OSError:
        return False  # a file system without such locks
    return bool(kind != fcntl.F_UNLCK)


class PublishedRecords:
    """The records of a results directory, each read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.seen: set[str] = set()

    def new(self) -> list[Entry]:
        """The records since the last call; at the first call, all."""
        found = [Entry(*each) for each in records_in(self.store.root, self.seen)]
        self.seen |= {entry.directory.name for entry in found}
        return found
