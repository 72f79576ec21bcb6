"""The record of one cell while the cell runs; it is written at the start of every phase."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import device
from harness.meters.memory.shards import ParameterSize
from harness.meters.steps import Diverged
from harness.ranks.progress_file import Progress
from harness.ranks.state_files import Reporter, record_path
from harness.records.part import Status
from harness.records.provenance import now
from harness.records.ranks import Failure
from harness.records.record import Record
from harness.system.files import write_atomically
from harness.system.interrupts import Interrupted
from matrices.errors import first_line

# Seconds between two writes of the progress file.
PROGRESS_SECONDS = 0.5
# The share of the training time that writing its steps may take.
SAVING_SHARE = 0.02


class Measurement:
    """One running cell, or one of its ranks, whose record is in `output_dir`."""

    def __init__(
        self, record: Record, output_dir: Path, rank: int = 0, world_size: int = 1
    ) -> None:
        self.record = record
        self.output_dir = output_dir
        self.rank = rank
        self.reporter = Reporter(output_dir, rank, world_size)
        self.model_size: ParameterSize | None = None  # the model, as it was loaded
        self._progress_at = 0.0
        self._steps_after = 0.0
        record.reason = "still running"

    def enter(self, phase: str, message: str = "") -> None:
        """Begin a new phase; the record so far is written first."""
        self.record.phase = phase
        self.save()
        self.reporter.progress(phase=phase, step=None)
        self._progress_at = 0.0
        self.progress(message=message)

    def save(self) -> None:
        write_atomically(record_path(self.output_dir, self.rank), self.record.to_json())

    def save_steps(self, fill: Callable[[], None]) -> None:
        """Let `fill` put the steps so far into the record, and write it, so that a killed worker
        leaves them. Writing a long record takes at most SAVING_SHARE of the time."""
        began = time.monotonic()
        if began < self._steps_after:
            return
        fill()
        self.save()
        self._steps_after = began + (time.monotonic() - began) / SAVING_SHARE

    def step(self, number: int) -> None:
        """An optimizer step has ended."""
        self.reporter.progress(step=number)

    def progress(self, **figures: Any) -> bool:
        """Write the progress file: `step`, `steps`, `loss`, `tokens_per_second`, `message`. The
        first rank writes it, at most twice a second; returns whether it did."""
        if self.rank or time.monotonic() - self._progress_at < PROGRESS_SECONDS:
            return False
        self._progress_at = time.monotonic()
        Progress(self.record.phase or Progress.phase, **figures).write(self.output_dir)
        return True

    def finish(self, status: Status, reason: str | None = None) -> int:
        """Make the record final; returns the worker's exit code."""
        self.record.status = status
        self.record.reason = reason
        self.record.ended = now()
        self.save()
        self.reporter.end(status, reason, self.record.failure)
        return 0 if status == "ok" else 1

    def fail(self, error: BaseException) -> int:
        """Finish with an error; everything measured before it is kept."""
        status = status_of(error)
        message = first_line(error)
        self.record.failure = Failure(
            type=type(error).__name__,
            message=message,
            phase=self.record.phase,
            requested_bytes=device.requested_bytes(error) if status == "oom" else None,
        )
        if status in ("failed", "oom"):
            traceback.print_exception(error, file=sys.stderr)
        return self.finish(status, f"{self.record.phase}: {message}")


def status_of(error: BaseException) -> Status:
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, Diverged):
        return "diverged"
    return "oom" if device.is_out_of_memory(error) else "failed"
