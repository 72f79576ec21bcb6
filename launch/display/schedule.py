"""The progress of a sweep and of a request for predictions, in words."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from harness.ranks.progress_file import Progress
from harness.records.prediction import Prediction
from harness.records.record import Record
from launch.planning.plan import Job
from matrices.cell import label
from reports.text import bytes_text


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


def waiting_text(labels: Sequence[str], for_devices: bool) -> str:
    shown = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
    if for_devices:
        return f"waiting for devices that another runner on this machine uses: {shown}"
    return f"waiting for what another runner is measuring: {shown}"


class Schedule:
    """Counts the cells of a sweep and estimates when it ends."""

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
        """Count a cell as done. `seconds` is None when it did not run here."""
        self.position(job)
        self.running.pop(job.key, None)
        if self.jobs.pop(job.key, None) is not None and seconds is not None:
            self.seconds.setdefault(job.cell.method, []).append(seconds)

    def elapsed(self, job: Job) -> float:
        """Seconds since a running cell began; 0 for a cell that does not run."""
        now = time.monotonic()
        return now - self.running.get(job.key, now)

    def remaining(self) -> float | None:
        """Seconds until the sweep ends, with the running cells included.

        Every cell is expected to take the mean of the finished cells of its method, or of all
        finished cells when its method has none. The number of cells side by side is expected to
        stay. None before a cell has finished. A display may call this from another thread, so lists
        are copied first.
        """
        durations = [second for seconds in list(self.seconds.values()) for second in seconds]
        if not durations:
            return None
        jobs = list(self.jobs.values())
        overall = statistics.fmean(durations)
        expected = [
            statistics.fmean(self.seconds.get(job.cell.method) or [overall]) for job in jobs
        ]
        spent = sum(self.elapsed(job) for job in jobs)
        return max(0.0, sum(expected) - spent) / max(1, len(self.running))

    def position(self, job: Job) -> str:
        """`[2/8]`: cells are numbered in the order they begin."""
        number = self.numbers.setdefault(job.key, len(self.numbers) + 1)
        return f"[{number}/{self.total}]"

    def eta(self) -> str:
        left = self.remaining()
        return f"ETA sweep {clock(left)}" if left is not None else "ETA sweep –"


class PredictionCount:
    """Counts the predicted cells of a request; remembers the last one and the start time. `last` is
    what is shown before the first."""

    def __init__(self, total: int, last: str) -> None:
        self.total = total
        self.done = 0
        self.last = last
        self.began = time.monotonic()

    def add(self, prediction: Prediction) -> None:
        self.done += 1
        peak = prediction.memory.peak_allocated_bytes
        answer = bytes_text(peak) if peak is not None else prediction.status
        train, data = prediction.cell.train, prediction.cell.data
        size = f" {train.micro_batch_size} x {data.max_length}" if train and data else ""
        self.last = f"{label(prediction.cell)}{size}: {answer}"

    def parts(self) -> list[str]:
        elapsed = time.monotonic() - self.began
        return [f"predicting {self.done}/{self.total}", self.last, clock(elapsed)]

    def summary(self) -> str:
        cells = "1 cell" if self.total == 1 else f"{self.total} cells"
        return f"simulated {cells} in {clock(time.monotonic() - self.began)}"
