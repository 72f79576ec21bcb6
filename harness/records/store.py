"""The results directory: one directory per record, claims, and working directories.

    <results>/<cell_id[:12]>-<stack_id[:8]>/       first attempt: cell.json, record.json, log.txt...
    <results>/<cell_id[:12]>-<stack_id[:8]>.2/     second attempt
    <results>/.running/<key>.<attempt>-<random>/   being measured; published by a rename
    <results>/.claims/<key>.lock                   held for as long as a cell runs
    <results>/.claims/<key>.worker.lock            held by the worker process itself

Nothing is ever deleted or overwritten, so directories merge by copying. `harness.records.reading`
reads them: names that start with a dot are skipped, what is no sound record is set aside.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from harness.records.attempts import in_force, in_force_by
from harness.records.reading import CELL, RECORD, read_valid, records_in
from harness.records.record import Record
from harness.system.files import TEMPORARY_PREFIX, sync_directory, write_atomically
from matrices.errors import UserError

# Below this a sweep would end in the middle of writing an adapter or a table of samples.
MINIMUM_FREE_BYTES = 256 * 2**20
_WORKING_NAME = re.compile(r"(?P<key>[0-9a-f]{12}-[0-9a-f]{8})\.\d+-\w+")


def record_key(cell_id: str, stack_id: str) -> str:
    """The name that attempts at one cell on one stack share."""
    return f"{cell_id[:12]}-{stack_id[:8]}"


def matches_key(record: Record, key: str) -> bool:
    """Whether a record is of the cell that a key names."""
    return key.startswith(f"{record.cell_id[:12]}-")


@dataclass(frozen=True)
class Entry:
    """A published record and where it is."""

    directory: Path
    record: Record


class Store:
    """One results directory. Several processes may use it at the same time."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.running = self.root / ".running"
        self.claims = self.root / ".claims"

    def check(self) -> None:
        """Raise UserError if the directory cannot be written or the disk is nearly full, and warn
        of abandoned attempts that cannot be read.

        It creates nothing: if the directory does not exist, its nearest ancestor is tried.
        """
        place = self.root
        while not place.exists():
            place = place.parent
        with disk_errors(self.root):
            if not place.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
            with tempfile.TemporaryFile(dir=place):
                pass
            free = shutil.disk_usage(place).free
        if free < MINIMUM_FREE_BYTES:
            raise UserError(
                f"{self.root}: only {free / 2**20:.0f} MiB free on this disk, and a sweep needs "
                f"{MINIMUM_FREE_BYTES / 2**20:.0f} MiB to start; free some, or use another "
                "directory with --results"
            )
        for _, working in self.abandoned():
            read_valid(working / RECORD)

    def prepare(self) -> None:
        """Make the directory. Raises UserError when it cannot be written."""
        self.check()
        with disk_errors(self.root):
            self.running.mkdir(parents=True, exist_ok=True)
            self.claims.mkdir(exist_ok=True)

    def latest(self) -> dict[str, Entry]:
        """The attempt in force of every key in this directory."""
        entries = (Entry(*each) for each in records_in(self.root))
        return in_force_by(entries, lambda e: record_key(e.record.cell_id, e.record.stack_id))

    def latest_of(self, key: str) -> Entry | None:
        """The attempt in force of one key, read anew."""
        paths = [self.root / key, *self.root.glob(f"{key}.*")]
        read = [(path, read_valid(path / RECORD)) for path in paths]
        return in_force(
            Entry(path, record) for path, record in read if record and matches_key(record, key)
        )

    def published_directory(self, key: str, attempt: int) -> Path:
        """Where an attempt is published."""
        return self.root / (key if attempt == 1 else f"{key}.{attempt}")

    def next_attempt(self, key: str) -> int:
        """The first attempt number without a directory."""
        attempt = 1
        while self.published_directory(key, attempt).exists():
            attempt += 1
        return attempt

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Claim a key for the length of the block; yields False when another process has it.

        The operating system releases the claim when its process dies. A worker that outlives its
        runner has its own lock, and the key stays claimed.
        """
        with disk_errors(self.root):
            lock = _try_lock(self.claims / f"{key}.lock")
        if lock is None:
            yield False
            return
        try:
            with disk_errors(self.root):
                worker = _try_lock(self.worker_lock(key))
            if worker is not None:
                worker.release()
            yield worker is not None
        finally:
            lock.release()

    def worker_lock(self, key: str) -> Path:
        """The lock that the worker process of a key holds while it lives."""
        return self.claims / f"{key}.worker.lock"

    def start(self, record_for: Callable[[Path, int], Record], key: str) -> Path:
        """Make the working directory of the next attempt at a claimed key.

        `record_for(published directory, attempt)` gives the record to start from. Raises
        UserError when the disk refuses, and then leaves no directory.
        """
        attempt = self.next_attempt(key)
        record = record_for(self.published_directory(key, attempt), attempt)
        with disk_errors(self.root):
            working = Path(tempfile.mkdtemp(prefix=f"{key}.{attempt}-", dir=self.running))
            try:
                working.chmod(0o755)
                write_atomically(working / CELL, record.cell.model_dump_json(indent=1) + "\n")
                write_atomically(working / RECORD, record.to_json())
            except BaseException:
                shutil.rmtree(working)
                raise
        return working

    def publish(self, working: Path, record: Record) -> Entry:
        """Write the final record and rename the working directory. Needs the claim on its key.

        If that name has appeared meanwhile (results copied in), the attempt gets the next one.
        """
        named = _WORKING_NAME.fullmatch(working.name)
        key = named["key"] if named else record_key(record.cell_id, record.stack_id)
        attempt = self.next_attempt(key)
        target = self.published_directory(key, attempt)
        record = record.model_copy(update={"attempt": attempt})
        with disk_errors(self.root):
            write_atomically(working / RECORD, record.to_json())
            _remove_temporary_files(working)
            for path in working.rglob("*"):
                if path.is_file():
                    _sync(path)
            working.rename(target)
            sync_directory(self.root)
        return Entry(target, record)

    def abandoned(self, key: str | None = None) -> list[tuple[str, Path]]:
        """Working directories, of one key or all; abandoned if their key can be claimed."""
        if not self.running.is_dir():
            return []
        named = ((_WORKING_NAME.fullmatch(path.name), path) for path in self.running.iterdir())
        found = [(match["key"], path) for match, path in named if match]
        return sorted(pair for pair in found if key in (None, pair[0]))

    def recover(self, key: str, finish: Callable[[Path, Record], Record]) -> list[Entry]:
        """Publish the abandoned attempts of a claimed key. `finish` completes their records.

        A directory without a record is removed. One whose record cannot be read stays.
        """
        recovered = []
        for working_key, working in self.abandoned(key):
            if not (working / RECORD).exists():
                with disk_errors(self.root):
                    shutil.rmtree(working)
                continue
            record = read_valid(working / RECORD)
            # The record of another cell would need another claim.
            if record is not None and matches_key(record, working_key):
                recovered.append(self.publish(working, finish(working, record)))
        return recovered


def _try_lock(path: Path) -> FileLock | None:
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _remove_temporary_files(working: Path) -> None:
    """Remove the temporary files and directories of a killed process."""
    for path in [*working.rglob(f"{TEMPORARY_PREFIX}*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    # A rank on another machine may still replace its own files.
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn an OSError of the disk into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{root}: no space left on this disk; what is finished is kept: free some space "
                "and run the same command again"
            ) from error
        raise UserError(
            f"{root}: cannot write results here ({error.strerror or error}); choose another "
            "directory with --results"
        ) from error
