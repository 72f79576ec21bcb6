"""The state file of each rank, which the rank writes: phase, step, and a heartbeat.

Light on purpose (no torch): the runner reads these files.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.records.part import Status
from harness.records.ranks import Failure, RankState
from harness.records.reading import RECORD
from harness.system.files import TEMPORARY_PREFIX
from matrices.files.text import visible

DIRECTORY = "ranks"
BEAT_SECONDS = 1.0


def state_path(output_dir: Path, rank: int) -> Path:
    return output_dir / DIRECTORY / f"rank-{rank}.json"


def record_path(output_dir: Path, rank: int) -> Path:
    """The record file of a rank: rank 0's is the cell's, into which the others are gathered."""
    if rank == 0:
        return output_dir / RECORD
    return output_dir / DIRECTORY / f"rank-{rank}.record.json"


def log_path(output_dir: Path, rank: int) -> Path:
    return output_dir / "log.txt" if rank == 0 else output_dir / DIRECTORY / f"rank-{rank}.log"


def stack_path(output_dir: Path, rank: int) -> Path:
    """The file with the stack of each thread of a rank, written at SIGUSR1."""
    return output_dir / DIRECTORY / f"rank-{rank}.stack.txt"


def read_states(output_dir: Path) -> list[RankState]:
    """The states written so far, by rank; a rank that has not started has none."""
    return sorted(_valid_states(output_dir), key=lambda state: state.rank)


def _valid_states(output_dir: Path) -> Iterator[RankState]:
    for path in (output_dir / DIRECTORY).glob("rank-*.json"):
        if path.name.endswith(".record.json"):
            continue
        try:
            yield RankState.model_validate_json(path.read_text())
        except (FileNotFoundError, ValidationError):
            # The disk was full when it was written; the rank counts as silent.
            continue


class Reporter:
    """Keeps this process's RankState on disk, and renews `beat` from a thread while it lives.

    SIGUSR1 has every thread's stack written to `stack_path`, also while the process waits in C.
    """

    def __init__(self, output_dir: Path, rank: int, world_size: int) -> None:
        self._path = state_path(output_dir, rank)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._stacks = stack_path(output_dir, rank).open("a")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self.state = RankState(
            rank=rank, world_size=world_size, host=socket.gethostname(), pid=os.getpid()
        )
        self.progress(phase="starting")
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def progress(self, **where: Any) -> None:
        """A phase was entered or a step ended: `phase`, `step`."""
        for name, value in where.items():
            setattr(self.state, name, value)
        self.state.progressed = time.time()
        self._write()

    def end(
        self, status: Status, reason: str | None = None, failure: Failure | None = None
    ) -> None:
        """Write the final state of this process."""
        self._ended.set()
        self.state.status, self.state.reason, self.state.failure = status, reason, failure
        self._write()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        with self._lock:
            self.state.beat = time.time()
            part = self._path.with_name(f"{TEMPORARY_PREFIX}{self._path.name}")
            # Not flushed to disk: the file is read only while this machine runs.
            part.write_text(visible(self.state.model_dump_json(indent=1)) + "\n")
            os.replace(part, self._path)
