"""A display that remembers what it was told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from harness.ranks.progress_file import Progress
from harness.records.record import Record
from launch.planning.plan import Job


class RecordingDisplay:
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.started: list[str] = []
        self.finished: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        yield

    def begin(self, jobs: Sequence[Job]) -> None: ...

    def cell_started(self, job: Job) -> None:
        self.started.append(job.label)

    def update(self, job: Job, progress: Progress) -> None: ...

    def cell_finished(self, job: Job, record: Record, seconds: float) -> None:
        self.finished.append(record.status)

    def done_elsewhere(self, job: Job, record: Record) -> None: ...

    def waiting(self, labels: Sequence[str], for_devices: bool = False) -> None: ...

    def close(self) -> None: ...
