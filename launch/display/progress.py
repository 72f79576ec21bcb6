"""What a person watching a sweep sees: a live line for each running cell on a terminal, greppable
lines elsewhere.

Everything here goes to standard error.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from harness.ranks.progress_file import Progress
from harness.records.record import Record
from launch.planning.plan import Job
from matrices.files.text import visible
from reports.text import bytes_text

if TYPE_CHECKING:
    from rich.live import Live

HEARTBEAT_SECONDS = 30.0


class Display(Protocol):
    """Told by the runner what happens, in the order it happens."""

    def message(self, text: str) -> None: ...
    def busy(self, text: str) -> contextlib.AbstractContextManager[None]: ...
    def begin(self, jobs: Sequence[Job]) -> None: ...
    def cell_started(self, job: Job) -> None: ...
    def update(self, job: Job, progress: Progress) -> None: ...
    def cell_finished(self, job: Job, record: Record, seconds: float) -> None: ...
    def done_elsewhere(self, job: Job, record: Record) -> None: ...
    def waiting(self, labels: Sequence[str], for_devices: bool = False) -> None: ...
    def close(self) -> None: ...


def display_for_stderr() -> LiveDisplay | PlainDisplay:
    """A live line on a terminal that can redraw one, else plain lines."""
    live = sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    return LiveDisplay() if live else PlainDisplay()


def clock(seconds: float) -> str:
    """`0:34`, `12:05`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(progress: Progress) -> list[str]:
    """The parts of a line about a running cell."""
    steps = f"{progress.step}/{progress.steps}" if progress.step and progress.steps else ""
    parts = [f"{progress.phase.replace('_', ' ')} {steps}".strip()]
    if progress.message:
        parts.append(progress.message)
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3g}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
    return parts


def outcome(record: Record, seconds: float) -> list[str]:
    """The parts of a line about a finished cell."""
    parts: list[str] = [record.status]
    if record.status != "ok" and record.reason:
        parts.append(record.reason)
    if record.memory.peak_bytes is not None:
        meter = " (ledger)" if record.memory.headline == "ledger" else ""
        parts.append(f"peak {bytes_text(record.memory.peak_bytes)}{meter}")
    if record.speed.tokens_per_second is not None:
        parts.append(f"{record.speed.tokens_per_second.non_padding:,.0f} tok/s")
    return [*parts, clock(seconds)]


class Schedule:
    """How far the sweep is, and how long the rest takes if cells go on as they went."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.total = 0
        self.numbers: dict[str, int] = {}
        self.running: dict[str, float] = {}
        self.seconds: dict[str, list[float]] = {}

    def begin(self, jobs: Sequence[Job]) -> None:
        self.jobs = {job.key: job for job in jobs}
        self.total = len(jobs)

    def start(self, job: Job) -> None:
        self.running[job.key] = time.monotonic()

    def end(self, job: Job, seconds: float | None) -> None:
        """Count a cell as done; seconds is none if it was not run here."""
        self.position(job)
        self.running.pop(job.key, None)
        if self.jobs.pop(job.key, None) is not None and seconds is not None:
            self.seconds.setdefault(job.cell.method, []).append(seconds)

    def elapsed(self, job: Job) -> float:
        """Seconds since a running cell began; 0 for another."""
        now = time.monotonic()
        return now - self.running.get(job.key, now)

    def remaining(self) -> float | None:
        """Seconds until the sweep ends, the running cells counted among those left.

        A cell is expected to take the mean of the finished ones of its method, or of all if there
        is none yet, and as many to go on side by side as do now. None before any has finished.
        """
        durations = [second for seconds in self.seconds.values() for second in seconds]
        if not durations:
            return None
        overall = statistics.fmean(durations)
        expected = [
            statistics.fmean(self.seconds.get(job.cell.method) or [overall])
            for job in self.jobs.values()
        ]
        spent = sum(self.elapsed(job) for job in self.jobs.values())
        return max(0.0, sum(expected) - spent) / max(1, len(self.running))

    def position(self, job: Job) -> str:
        """Cells are numbered as they begin."""
        number = self.numbers.setdefault(job.key, len(self.numbers) + 1)
        return f"[{number}/{self.total}]"

    def eta(self) -> str:
        left = self.remaining()
        return f"ETA sweep {clock(left)}" if left is not None else "ETA sweep –"


class PlainDisplay:
    """A line when a phase changes, when a cell ends, and every 30 s in between."""

    def __init__(self) -> None:
        self.schedule = Schedule()
        self.phases: dict[str, str] = {}
        self.written: dict[str, float] = {}
        self.told_waiting: set[bool] = set()

    def message(self, text: str) -> None:
        print(f"tunebench: {visible(text)}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        self.message(f"{text} ...")
        yield

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
        if for_devices not in self.told_waiting:
            self.message(waiting_text(labels, for_devices))
        self.told_waiting.add(for_devices)

    def close(self) -> None:
        """Nothing to put back."""


def waiting_text(labels: Sequence[str], for_devices: bool) -> str:
    shown = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
    if for_devices:
        return f"waiting for devices that another runner on this machine uses: {shown}"
    return f"waiting for what another runner is measuring: {shown}"


class LiveDisplay:
    """A line for each running cell, redrawn twice a second; finished cells scroll above them."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.schedule = Schedule()
        self.lines: dict[str, str] = {}
        self.live: Live | None = None

    def message(self, text: str) -> None:
        from rich.text import Text

        self.console.print(Text(text, style="dim"))

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        with self.console.status(text):
            yield

    def begin(self, jobs: Sequence[Job]) -> None:
        self.schedule.begin(jobs)

    def _show(self, lines: Sequence[str]) -> None:
        from rich.live import Live
        from rich.text import Text

        line = Text("\n".join(lines), no_wrap=True, overflow="ellipsis")
        if self.live is None:
            self.live = Live(line, console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        self.live.update(line, refresh=True)

    def close(self) -> None:
        """Take the live line away and give the terminal its cursor back."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def cell_started(self, job: Job) -> None:
        self.schedule.start(job)
        self.update(job, Progress())

    def update(self, job: Job, progress: Progress) -> None:
        parts = [*describe(progress), clock(self.schedule.elapsed(job)), self.schedule.eta()]
        rest = "".join(f" · {part}" for part in parts)
        head = f"{self.schedule.position(job)} {job.label}"
        # On a narrow terminal the name gives way, not the figures.
        room = max(12, self.console.width - len(rest))
        self.lines[job.key] = (head if len(head) <= room else head[: room - 1] + "…") + rest
        self._show(list(self.lines.values()))

    def _finished(self, job: Job, status: str, parts: Sequence[str]) -> None:
        from rich.text import Text

        self.close()
        self.lines.pop(job.key, None)
        style = {"ok": "green", "interrupted": "yellow", "invalid": "yellow"}.get(status, "red")
        line = Text(f"{self.schedule.position(job)} {job.label} · ")
        line.append(parts[0], style=style)
        line.append("".join(f" · {part}" for part in parts[1:]))
        self.console.print(line)

    def cell_finished(self, job: Job, record: Record, seconds: float) -> None:
        self._finished(job, record.status, outcome(record, seconds))
        self.schedule.end(job, seconds)

    def done_elsewhere(self, job: Job, record: Record) -> None:
        self._finished(job, record.status, [record.status, "measured by another runner"])
        self.schedule.end(job, None)

    def waiting(self, labels: Sequence[str], for_devices: bool = False) -> None:
        self._show([waiting_text(labels, for_devices)])
