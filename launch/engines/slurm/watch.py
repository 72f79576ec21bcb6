"""The login node's part after submitting: looking at files, and at the queue, until all is done."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from harness.records.record import Record
from harness.records.store import Entry, Store
from launch.cells.finish import finish_abandoned
from launch.cells.runner import Signals
from launch.display.progress import Display
from launch.display.tables import seconds_taken
from launch.engines import remote_plan
from launch.engines.results_watch import Published, Running, is_held, running
from launch.engines.slurm import queue, submit
from launch.engines.slurm.queue import JobState, NoAnswer, Partition
from launch.engines.slurm.submit import Array
from launch.planning.plan import Job

POLL_SECONDS = 0.5
# Files are looked at, and squeue is asked, this often.
FILES_SECONDS = 2.0
QUEUE_SECONDS = 5.0
# What a shared file system may take to show here what a node has written.
SETTLE_SECONDS = 10.0


@dataclass
class Watched:
    """A cell that is waited for: its job of this run, and its place in an array."""

    job: Job
    array: Array
    index: int
    attempts: Mapping[str, int]
    state: JobState | None = None
    submitted: str | None = None  # the array's number, known before the queue is first looked at
    started: bool = False
    ended_at: float | None = None  # when the queue was first seen without it
    last: Entry | None = None  # an attempt that was interrupted; another may follow


@dataclass
class Watcher:
    """Waits for the tasks of arrays. `entries` are the records that came, by the job's key."""

    store: Store
    display: Display
    on: Partition
    waiting: dict[str, Watched]  # by cell_id
    entries: dict[str, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.published = Published(self.store)
        self.told = ""
        self.silent = ""
        self.queue_at = float("-inf")

    def watch(self, signals: Signals) -> None:
        """Until every cell has its record or its job has died, or a signal comes."""
        self.display.begin([each.job for each in self.waiting.values()])
        files_at = float("-inf")
        while self.waiting and not signals.received:
            now = time.monotonic()
            if now - files_at >= FILES_SECONDS:
                files_at = now
                self.look()
            time.sleep(POLL_SECONDS)

    def look(self) -> None:
        """One look at the queue, when it is time, and then at the files: what ended before the
        queue was asked has written its record by then."""
        asked = time.monotonic() - self.queue_at >= QUEUE_SECONDS and self._ask_queue()
        self._read_records()
        self._read_running()
        if asked:
            self._bury()
            self._tell()

    def _ask_queue(self) -> bool:
        self.queue_at = time.monotonic()
        try:
            states = queue.queue(each.array.name for each in self.waiting.values())
        except NoAnswer as error:
            if str(error) != self.silent:
                self.display.message(f"{error}; asking again")
            self.silent = str(error)
            return False
        self.silent = ""
        for each in self.waiting.values():
            state = states.get((each.array.name, each.index))
            each.state = state or each.state
            if state is not None and state.unfinished:
                each.ended_at = None
            elif each.ended_at is None:
                each.ended_at = time.monotonic()
        return True

    def _read_records(self) -> None:
        for entry in self.published.new():
            each = self.waiting.get(entry.record.cell_id)
            if each is None:
                continue
            if not (wrote(each.state, entry) or answers(entry, each.attempts, self.on)):
                continue
            if entry.record.status == "interrupted":
                each.last, each.started = entry, False
            else:
                self._done(each, entry)

    def _read_running(self) -> None:
        short = {cell_id[:12]: cell_id for cell_id in self.waiting}
        for seen in running(self.store, lambda key: key[:12] in short):
            each = self.waiting.get(short.get(seen.key[:12], ""))
            if each is None or not seen.held:
                continue
            if not each.started:
                each.started = True
                self.display.cell_started(each.job)
            self.display.update(each.job, seen.progress)

    def _done(self, each: Watched, entry: Entry) -> None:
        del self.waiting[each.job.cell.cell_id]
        self.entries[each.job.key] = entry
        self.display.cell_finished(each.job, entry.record, seconds_taken(entry.record) or 0.0)

    def _bury(self) -> None:
        """Give up the cells whose jobs have ended and left no record that counts."""
        now = time.monotonic()
        for each in list(self.waiting.values()):
            if each.ended_at is None or now - each.ended_at < SETTLE_SECONDS:
                continue
            left = [s for s in running(self.store, partial(_is_of, each.job)) if not s.held]
            if any(is_held(self.store, key) for key in keys_of(self.store, each.job)):
                continue  # measured by another runner of this directory
            entry = self._recover(each, left) or each.last
            self._say_end(each)
            if entry is not None:
                self._done(each, entry)
            else:
                del self.waiting[each.job.cell.cell_id]

    def _recover(self, each: Watched, left: Sequence[Running]) -> Entry | None:
        """Publish what a dead job left, with SLURM's word for its end."""
        entry = None
        for seen in left:
            with self.store.claim(seen.key) as claimed:
                if claimed:
                    finish = partial(finish_dead, word=ending(each.state))
                    entry = next(iter(self.store.recover(seen.key, finish)), entry)
        return entry

    def _say_end(self, each: Watched) -> None:
        name = each.state.job if each.state else each.array.name
        log = next(iter(submit.logs(self.store, each.array, each.index)), None)
        said = last_line(log) if log is not None else "it wrote no log: can the node see it all?"
        self.display.message(
            f"{each.job.cell.cell_id[:12]} {each.job.label}: SLURM job {name} ended as "
            f"{ending(each.state)} without a finished record; the same command runs it again"
            + (f" ({said})" if said else "")
        )

    def _tell(self) -> None:
        """How the queue stands, when that has changed."""
        counts = Counter(in_queue(each) for each in self.waiting.values())
        text = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
        if text and text != self.told:
            self.display.message(f"slurm: {text}")
        self.told = text

    def jobs_left(self) -> list[str]:
        """Ids of the arrays that still hold cells of this run."""
        jobs = [
            each.state.job if each.state is not None else each.submitted
            for each in self.waiting.values()
        ]
        return list(dict.fromkeys(job.split("_")[0] for job in jobs if job is not None))


def answers(entry: Entry, attempts: Mapping[str, int], on: Partition) -> bool:
    """Whether a record is one that was waited for: newer than what was there, of this software,
    and of a GPU if the partition's would be."""
    key = entry.directory.name.split(".")[0]
    record = entry.record
    new = record.attempt > attempts.get(key, 0)
    return (
        new
        and remote_plan.same_software(record)
        and remote_plan.used_gpu(record) == submit.on_gpu(on)
    )


def wrote(state: JobState | None, entry: Entry) -> bool:
    """Whether this job wrote the record, on whatever it found there."""
    return state is not None and (entry.record.placement.job or "").split(".")[0] == state.job


def in_queue(each: Watched) -> str:
    """`running`, `waiting (Resources)`..., as the queue tells it."""
    if each.state is None:
        return "submitted"
    if each.state.waiting:
        return f"waiting ({each.state.reason})" if each.state.reason else "waiting"
    return "running" if each.state.unfinished else "ended"


def ending(state: JobState | None) -> str:
    """SLURM's word for how a job ended, with the nodes it was on."""
    if state is None:
        return "unknown to the queue"
    if state.unfinished:  # forgotten by the queue since it was last seen
        found = queue.ended_states([state.job]).get(state.job)
        state = found or JobState(state.job, f"gone (last {state.state})", nodes=state.nodes)
    return f"{state.state} on {state.nodes}" if state.nodes else state.state


def finish_dead(working: Path, record: Record, word: str) -> Record:
    """As for any runner that died, with what SLURM says of it."""
    finished = finish_abandoned(working, record)
    if finished.status != "interrupted" or finished.reason != "the runner died":
        return finished
    return finished.model_copy(update={"reason": f"the runner died; SLURM: {word}"})


def keys_of(store: Store, job: Job) -> list[str]:
    """The keys under which the cell of a job is claimed, on whatever machine."""
    locks = store.claims.glob(f"{job.cell.cell_id[:12]}-*.lock")
    return sorted({path.name.split(".")[0] for path in locks})


def _is_of(job: Job, key: str) -> bool:
    return key.startswith(job.cell.cell_id[:12])


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
