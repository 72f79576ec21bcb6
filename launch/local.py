"""The runner on this machine: one cell after another, each in a process of its own."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

from harness import provenance
from harness.record import Record, Status, read_record
from harness.store import Entry, Store
from launch import preflight
from launch.finish import finish_abandoned, finish_record
from launch.foretelling import Foretold, with_prediction
from launch.plan import Job
from launch.process import POLL_SECONDS, start_worker, watch
from launch.progress import Display
from launch.server import start_server
from matrices.cell import Cell
from matrices.errors import UserError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal arrived while there was nothing to finish first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass
class Signals:
    """The stop signals received. While `raising`, one ends the run where it stands."""

    received: list[int] = field(default_factory=list)
    raising: bool = True

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self.raising:
            raise Stopped(number)


@contextlib.contextmanager
def stop_signals() -> Iterator[Signals]:
    """Catch Ctrl-C, SIGTERM and a lost terminal for the length of the block."""
    signals = Signals()
    before = {number: signal.signal(number, signals.handle) for number in STOP_SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ProblemsFound(Exception):
    """Preflight found mistakes of the user's; nothing was started."""

    def __init__(self, problems: list[UserError]) -> None:
        super().__init__(f"{len(problems)} problems")
        self.problems = problems


@dataclass(frozen=True)
class Finished:
    """What a run leaves: the last record of each of its cells, by key, and the signal that
    stopped it."""

    entries: dict[str, Entry]
    stopped_by: int | None = None


@dataclass
class Runner:
    """Runs the jobs of one plan. `worker` and `preflight` are module names; `foretell` predicts
    the cells that are about to run."""

    store: Store
    display: Display
    limit_seconds: float | None = None
    worker: str = "harness.worker"
    preflight: str | None = "harness.preflight"
    foretell: Callable[[Sequence[Cell]], Foretold] | None = None
    foretold: Foretold = field(default_factory=Foretold)

    def run(self, jobs: Sequence[Job]) -> Finished:
        """Run what is to be run. Raises UserError, ProblemsFound before anything has started, and
        Stopped when stopped before the first cell."""
        self.store.check()
        to_run = [job for job in jobs if job.action in ("run", "retry")]
        with stop_signals() as signals:
            if to_run:
                self._start_server([job.cell for job in to_run])
                if self.foretell is not None:
                    self.foretold = self.foretell([job.cell for job in to_run])
            self.store.prepare()
            self._recover_all()
            signals.raising = False
            entries = {job.key: job.entry for job in jobs if job.entry and job.action == "keep"}
            entries |= self._run_all([job for job in jobs if job.action != "keep"], signals)
        return Finished(entries, next(iter(signals.received), None))

    def _start_server(self, cells: list[Cell]) -> None:
        modules = [self.worker] + ([self.preflight] if self.preflight else [])
        self.server = start_server(modules)
        if self.preflight is None:
            return
        with self.display.busy(
            "importing torch, transformers, trl and lm-eval; checking models, data and tasks"
        ):
            found = preflight.problems(self.server, self.preflight, cells)
        if found:
            raise ProblemsFound(found)

    def _recover_all(self) -> None:
        for key in dict.fromkeys(key for key, _ in self.store.abandoned()):
            with self.store.claim(key) as claimed:
                if claimed:
                    self._recover(key)

    def _recover(self, key: str) -> None:
        for entry in self.store.recover(key, finish_abandoned):
            self.display.message(
                f"{entry.record.cell_id[:12]} was left by a runner that died: kept as "
                f"{entry.record.status} in {entry.directory.name}"
            )

    def _run_all(self, jobs: Sequence[Job], signals: Signals) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        waiting = deque(jobs)
        self.display.begin([job for job in jobs if job.action != "invalid"])
        elsewhere = 0  # jobs in a row that another runner holds
        while waiting and not signals.received:
            job = waiting.popleft()
            entry = self._run_if_free(job, signals)
            if entry is not None:
                entries[job.key] = entry
                elsewhere = 0
                continue
            waiting.append(job)
            elsewhere += 1
            if elsewhere >= len(waiting):
                self.display.waiting([job.label for job in waiting])
                time.sleep(POLL_SECONDS)
                elsewhere = 0
        return entries

    def _run_if_free(self, job: Job, signals: Signals) -> Entry | None:
        """The job's record; none while another runner has its claim."""
        with self.store.claim(job.key) as claimed:
            if not claimed:
                return None
            self._recover(job.key)
            last = self.store.latest_of(job.key)
            new = last is not None and last.record.attempt > job.seen_attempt
            if last is not None and new and last.record.status != "interrupted":
                self.display.done_elsewhere(job, last.record)
                return last
            if job.action == "invalid":
                return self._refuse(job, last, "invalid", job.why)
            skipped = self.foretold.skipped.get(job.cell.cell_id)
            if skipped:
                return self._refuse(job, last, "skipped", skipped)
            return self._measure(job, signals)

    def _refuse(self, job: Job, last: Entry | None, status: Status, why: str) -> Entry:
        """Record that a cell is not started here; once, however often it is looked at again."""
        self.display.message(f"{job.cell.cell_id[:12]} {job.label}: {status}, {why}")
        if last and (last.record.status, last.record.reason) == (status, why):
            return last
        working = self.store.start(partial(first_record, job.cell), job.key)
        refused = read_record(working / "record.json").model_copy(
            update={"status": status, "reason": why, "ended": provenance.now()}
        )
        return self.store.publish(working, self._with_prediction(refused))

    def _with_prediction(self, record: Record) -> Record:
        return with_prediction(record, self.foretold.predictions.get(record.cell_id))

    def _measure(self, job: Job, signals: Signals) -> Entry:
        working = self.store.start(partial(first_record, job.cell), job.key)
        self.display.cell_started(job)
        began = time.monotonic()
        process = start_worker(self.server, self.worker, working, self.store.worker_lock(job.key))
        show = partial(self.display.update, job)
        outcome = watch(process, working, self.limit_seconds, lambda: signals.received, show)
        finished = self._with_prediction(finish_record(working, outcome))
        entry = self.store.publish(working, finished)
        self.display.cell_finished(job, entry.record, time.monotonic() - began)
        return entry


def first_record(cell: Cell, place: Path, attempt: int) -> Record:
    """The record an attempt starts with; its command is valid once it is published at `place`."""
    gpu = provenance.uses_gpu(provenance.stack(), provenance.hardware())
    by_hand = Path(f"{place.name}.by-hand")
    command = provenance.worker_command(place / "cell.json", by_hand, gpu)
    return provenance.new_record(cell, command, attempt)
