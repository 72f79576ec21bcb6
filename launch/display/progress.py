"""What a command shows on standard error while it works."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from harness.ranks.progress_file import Progress
from harness.records.prediction import Prediction
from harness.records.record import Record
from launch.display.schedule import (
    PredictionCount,
    Schedule,
    clock,
    describe,
    outcome,
    waiting_text,
)
from launch.planning.plan import Job
from matrices.files.text import visible

HEARTBEAT_SECONDS = 30.0
PREDICTION_SECONDS = 5.0
# Terminals that cannot move their cursor.
NO_CURSOR = (None, "", "dumb", "unknown")


class Display(Protocol):
    """Shows the events of a sweep and of a request for predictions, in their order."""

    def message(self, text: str) -> None: ...
    def busy(self, text: str) -> contextlib.AbstractContextManager[None]: ...
    def predicting(
        self, total: int, last: str
    ) -> contextlib.AbstractContextManager[Callable[[Prediction], None]]: ...
    def begin(self, jobs: Sequence[Job]) -> None: ...
    def cell_started(self, job: Job) -> None: ...
    def update(self, job: Job, progress: Progress) -> None: ...
    def cell_finished(self, job: Job, record: Record, seconds: float) -> None: ...
    def done_elsewhere(self, job: Job, record: Record) -> None: ...
    def waiting(self, labels: Sequence[str], for_devices: bool = False) -> None: ...
    def close(self) -> None: ...


def display_for_stderr() -> Display:
    """Live lines on a terminal that can redraw them, else plain lines."""
    if not sys.stderr.isatty() or os.environ.get("TERM") in NO_CURSOR:
        return PlainDisplay()
    from launch.display.terminal import TerminalDisplay

    return TerminalDisplay()


class PlainDisplay:
    """Plain lines for files and pipes. For cells: when a phase changes, when a cell ends, and every
    30 s in between. For predictions: at the start, at the end, and every 5 s in between."""

    def __init__(self) -> None:
        self.schedule = Schedule()
        self.phases: dict[str, str] = {}
        self.written: dict[str, float] = {}
        self.waited_for: set[bool] = set()

    def message(self, text: str) -> None:
        print(f"tunebench: {visible(text)}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        self.message(f"{text} ...")
        yield

    @contextlib.contextmanager
    def predicting(self, total: int, last: str) -> Iterator[Callable[[Prediction], None]]:
        count = PredictionCount(total, last)
        written = 0.0

        def show() -> None:
            nonlocal written
            self.message(" · ".join(count.parts()))
            written = time.monotonic()

        def predicted(prediction: Prediction) -> None:
            count.add(prediction)
            if time.monotonic() - written > PREDICTION_SECONDS and count.done < total:
                show()

        show()
        try:
            yield predicted
        finally:
            self.message(count.summary())

    def begin(self, jobs: Sequence[Job]) -> None:
        self.schedule.begin(jobs)

    def _line(self, job: Job, parts: Sequence[str]) -> None:
        prefix = f"{job.cell.cell_id[:12]} {self.schedule.position(job)} {job.label}"
        print(visible(f"{prefix}: {', '.join(parts)}"), file=sys.stderr, flush=True)
        self.written[job.key] = time.monotonic()

    def cell_started(self, job: Job) -> None:
        self.schedule.start(job)
        self.phases[job.key] = Progress().phase
        self._line(job, [self.phases[job.key], self.schedule.eta()])

    def update(self, job: Job, progress: Progress) -> None:
        quiet = time.monotonic() - self.written.get(job.key, 0.0) < HEARTBEAT_SECONDS
        if progress.phase == self.phases.get(job.key) and quiet:
            return
        self.phases[job.key] = progress.phase
        elapsed = clock(self.schedule.elapsed(job))
        self._line(job, [*describe(progress), elapsed, self.schedule.eta()])

    def cell_finished(self, job: Job, record: Record, seconds: float) -> None:
        self._line(job, outcome(record, seconds))
        self.schedule.end(job, seconds)

    def done_elsewhere(self, job: Job, record: Record) -> None:
        self._line(job, [record.status, "measured by another runner"])
        self.schedule.end(job, None)

    def waiting(self, labels: Sequence[str], for_devices: bool = False) -> None:
        if for_devices not in self.waited_for:
            self.message(waiting_text(labels, for_devices))
        self.waited_for.add(for_devices)

    def close(self) -> None:
        """Does nothing: there is no live line to remove."""
