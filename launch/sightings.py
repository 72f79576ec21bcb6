"""What a results directory shows of a sweep from outside: who runs where, what has been published.

Read from files alone, so that it is the same on any machine that sees the directory, and nothing
here is in the way of a runner.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from harness import rank_state
from harness.reading import RECORD, read_sound, records_in
from harness.record import RankState, Record
from harness.store import Entry, Store
from launch.process import Progress, read_progress


@dataclass(frozen=True)
class Running:
    """A working directory: one attempt at a cell that has no final record yet.

    `held` is whether some runner, anywhere, has its claim; without one it was left behind, and
    the next run of its cell publishes it.
    """

    key: str
    directory: Path
    held: bool
    record: Record
    progress: Progress
    ranks: list[RankState] = field(default_factory=list)

    @property
    def hosts(self) -> list[str]:
        """The machines it runs on, the first rank's first."""
        return list(dict.fromkeys([*(r.host for r in self.ranks), *self.record.placement.hosts]))


def running(store: Store, wanted: Callable[[str], bool] = lambda key: True) -> list[Running]:
    """The attempts under way, and those left behind, of the keys that are wanted."""
    found = []
    for key, directory in store.abandoned():
        if not wanted(key):
            continue
        record = read_sound(directory / RECORD)
        if record is None:
            continue
        try:
            progress, ranks = read_progress(directory), rank_state.read_states(directory)
        except (OSError, ValidationError):
            continue  # published, or begun, at this very moment
        found.append(Running(key, directory, is_held(store, key), record, progress, ranks))
    return found


def is_held(store: Store, key: str) -> bool:
    """Whether a runner has the claim on a key, or a worker that outlived its runner its lock."""
    return _locked(store.claims / f"{key}.lock") or _locked(store.worker_lock(key))


def _locked(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Shared and for an instant: a runner that asks meanwhile asks again half a second later.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


class Published:
    """The records of a results directory, each read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.seen: set[str] = set()

    def new(self) -> list[Entry]:
        """Those that have come since the last call; at the first, all."""
        found = [Entry(*each) for each in records_in(self.store.root, self.seen)]
        self.seen |= {entry.directory.name for entry in found}
        return found
