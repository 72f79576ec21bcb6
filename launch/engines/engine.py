"""One loop for every engine: plan, check, submit orders, follow them, recover, stop.

An `Engine` says what its machines have, accepts orders, reports their states and cancels them. The
loop reads what a cell measured from the results directory, which all machines share. So the loop is
the same for every engine.

Cells on this machine need no orders: the `Runner` starts them as devices become free, waits for
other runners, and sees each process end at once. An order runs the same `Runner` on its machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from harness.records.record import Record
from harness.records.store import Entry, Store
from launch.cells import start
from launch.cells.finish import finish_abandoned
from launch.cells.runner import Runner, RunResult
from launch.display.progress import Display
from launch.display.tables import duration_seconds
from launch.engines import remote_plan
from launch.engines.order import Order
from launch.engines.results_watch import (
    PublishedRecords,
    UnfinishedAttempt,
    is_held,
    unfinished_attempts,
)
from launch.planning.invalid_cells import check_quickly
from launch.planning.plan import Job, Sweep, plan_jobs
from launch.processes.stop_signals import Signals, stop_signals, stopping_text
from launch.processes.workers import GRACE_SECONDS

POLL_SECONDS = 0.2
# The loop reads the files this often, and whenever the engine says that an order is over.
FILES_SECONDS = 1.0
# A shared file system may take this long to show what a node has written.
SETTLE_SECONDS = 10.0
# A cell starts again this often when its machine or its process there dies.
RESTARTS = 3
# The loop cancels again after this time while cells go on.
CANCEL_AGAIN_SECONDS = 5.0
# Time for all records to arrive after the cancellation, beyond a worker's own GRACE_SECONDS.
REPORT_SECONDS = 20.0


class NoAnswer(Exception):
    """The engine does not answer; the text says what it printed."""


@dataclass(frozen=True)
class OrderState:
    """The state of one order, as the engine reports it.

    `ended`: its process is gone. `died`: its machine or process was lost, and the cell may start
    again. `cancelled`: its cell had not begun. `job` is the engine's name of the order, as in the
    cell's record. `queue_text` is the state in the queue's words, empty for an engine without a
    queue. `why` says what died. `record` is the name of the record's directory, where the engine
    knows it. `error` ends the whole run.
    """

    phase: Literal["waiting", "running", "ended", "died", "cancelled"]
    job: str = ""
    queue_text: str = ""
    why: str = ""
    record: str | None = None
    error: Exception | None = None

    @property
    def over(self) -> bool:
        return self.phase not in ("waiting", "running")


class Engine(Protocol):
    """Machines that run orders. A cell is identified by its cell_id and has one order at a time.

    Records call it `name`, messages call it `title`. The loop polls it every `poll_seconds`. `gpus`
    says whether its cells compute on GPUs.
    """

    name: start.EngineName
    title: str
    poll_seconds: float

    @property
    def gpus(self) -> bool: ...

    def check(self, jobs: Sequence[Job]) -> None:
        """Raises UserError for the first cell that fits on no machine, and when the machines cannot
        run any cell."""

    def queued(self, cells: Sequence[str]) -> dict[str, OrderState]:
        """Those of these cells that an earlier run has ordered and that are not over. Raises
        UserError."""

    def submission_lock(self) -> AbstractContextManager[object]:
        """Held while the loop reads the queue and adds to it, so that two runs do not submit the
        same cell."""

    def submit(self, orders: Mapping[str, Order]) -> dict[str, OrderState]:
        """Submit orders, by cell. Raises UserError when the engine refuses them."""

    def poll(self) -> Mapping[str, OrderState]:
        """The states of the orders, including those of earlier runs that `queued` has found. The
        record of an order that is over is in the results directory. Raises NoAnswer."""

    def cancel(self, cells: Sequence[str]) -> str:
        """Cancel waiting orders, and have running cells write their records. May be called again.

        An engine whose orders outlive this command does nothing, and returns how to follow and to
        cancel them. Others return an empty text."""

    def ending(self, cell: str) -> tuple[str, str]:
        """How an order ended that left no finished record: in short, for the recovered record, and
        as a sentence without a full stop."""


def run_on(engine: Engine, sweep: Sweep, order: Order, display: Display) -> RunResult:
    """Run the cells of a sweep on an engine, and wait for them.

    `order` has what all their orders share. Before the first order: raises UserError and
    ProblemsFound, and Stopped after a stop signal. Later: raises the error that ends the whole run.
    """
    store = Store(sweep.results)
    store.check()
    published = PublishedRecords(store)
    present = published.new()
    jobs = plan_jobs(
        sweep.cells,
        {entry.directory.name: entry for entry in present},
        sweep.retry,
        sweep.score_base,
        remote_plan.machine(engine.gpus),
        counts=remote_plan.counting(engine.gpus),
    )
    with stop_signals() as signals:
        jobs = check_quickly(jobs, display.message, sweep)
        engine.check(_to_run(jobs))
        if found := _to_run(jobs):
            queued = engine.queued([job.cell.cell_id for job in found])
            new = [job for job in found if job.cell.cell_id not in queued]
            jobs = remote_plan.check(jobs, new, display, sweep) if new else jobs
        signals.raising = False
        to_run = _to_run(jobs)
        settled = Runner(store, display).run([job for job in jobs if job not in to_run])
        signals.received += [] if settled.stopped_by is None else [settled.stopped_by]
        driver = EngineLoop(engine, store, display, order, published, present)
        if to_run and not signals.received:
            driver.submit(to_run)
        driver.follow(signals)
    entries = settled.entries | driver.entries
    return RunResult(entries, next(iter(signals.received), None), jobs)


def _to_run(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.will_run]


@dataclass
class OrderedCell:
    """A cell that the loop waits for. `attempts` are the numbers of the attempts before this run,
    by key. `losses` counts how often its machine or process died. `ended_at` is when the engine
    first said that its order is over. `last` is its last interrupted attempt; another may follow.
    """

    job: Job
    attempts: Mapping[str, int]
    state: OrderState = OrderState("waiting")
    started: bool = False
    losses: int = 0
    ended_at: float | None = None
    last: Entry | None = None


@dataclass
class EngineLoop:
    """Submits orders and waits for their records. The plan was made from the records `present`;
    `entries` are the new ones, by the job's key."""

    engine: Engine
    store: Store
    display: Display
    order: Order
    published: PublishedRecords
    present: Sequence[Entry] = ()
    waiting: dict[str, OrderedCell] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.last_counts = self.last_error = ""
        self.polled_at = self.files_at = self.cancelled_at = float("-inf")
        self.leave_at: float | None = None  # set once the cells are to stop

    def submit(self, jobs: Sequence[Job]) -> None:
        """Submit the jobs that are not queued yet, and wait for all of them. Raises UserError."""
        attempts: dict[str, dict[str, int]] = {}
        for entry in self.present:
            known = attempts.setdefault(entry.record.cell_id, {})
            known[_key(entry)] = max(known.get(_key(entry), 0), entry.record.attempt)
        for job in jobs:
            self.waiting[job.cell.cell_id] = OrderedCell(job, attempts.get(job.cell.cell_id, {}))
        self.display.begin(jobs)
        with self.engine.submission_lock():
            states = self.engine.queued(list(self.waiting))
            if states:
                count = _cells(len(states))
                self.display.message(f"{count} in {self.engine.title}'s queue from an earlier run")
            # Another run's order may have published its record since the plan was made.
            self._read_records()
            new = {cell: self._order(each) for cell, each in self.waiting.items()}
            new = {cell: order for cell, order in new.items() if cell not in states}
            states |= self.engine.submit(new) if new else {}
        for cell, each in self.waiting.items():
            each.state = states[cell]

    def _order(self, each: OrderedCell) -> Order:
        return dataclasses.replace(
            self.order,
            engine=self.engine.name,
            cell=each.job.cell.model_dump_json(),
            label=each.job.label,
            attempts=each.attempts,
        )

    def follow(self, signals: Signals) -> None:
        """Wait until every cell has its record or its order is over without one.

        The first signal cancels the orders (see `Engine.cancel`), and returns where they outlive
        this command. The second returns at once. Raises the error that ends the whole run.
        """
        while self.waiting:
            self.step()
            if (signals.received or self.error) and not self._stop(len(signals.received)):
                break
            if self.waiting:
                time.sleep(POLL_SECONDS)
        if self.error is not None:
            raise self.error

    def step(self) -> None:
        """Poll the engine when it is time, then read the files: an order that ended before the poll
        has written its record."""
        now = time.monotonic()
        polled = now - self.polled_at >= self.engine.poll_seconds and self._poll(now)
        over = [each for each in self.waiting.values() if each.ended_at is not None]
        if now - self.files_at >= FILES_SECONDS or (polled and over):
            self.files_at = now
            self._read_records()
            self._read_running()
        if polled:
            for each in over:
                if each.job.cell.cell_id in self.waiting:
                    self._settle(each, now)
            self._report_queue()

    def _poll(self, now: float) -> bool:
        self.polled_at = now
        try:
            states = self.engine.poll()
        except NoAnswer as error:
            if str(error) != self.last_error:
                self.display.message(f"{error}; asking again")
            self.last_error = str(error)
            return False
        self.last_error = ""
        for cell, each in self.waiting.items():
            each.state = states.get(cell, each.state)
            self.error = self.error or each.state.error
            if not each.state.over:
                each.ended_at = None
            elif each.ended_at is None:
                each.ended_at = now
        return True

    def _read_records(self) -> None:
        for entry in self.published.new():
            each = self.waiting.get(entry.record.cell_id)
            if each is None:
                continue
            if not (
                is_written_by(each.state, entry)
                or is_new_result(entry, each.attempts, self.engine.gpus)
            ):
                continue
            if entry.record.status == "interrupted":
                each.last, each.started = entry, False
            else:
                self._done(each, entry)

    def _read_running(self) -> None:
        for seen in self._attempts(self.waiting.values()):
            each = self.waiting.get(seen.record.cell_id)
            if each is None or not seen.held:
                continue
            if not each.started:
                each.started = True
                self.display.cell_started(each.job)
            self.display.update(each.job, seen.progress)

    def _attempts(self, among: Iterable[OrderedCell]) -> list[UnfinishedAttempt]:
        """The attempts of these cells that run, and those that a dead runner left."""
        short = {each.job.cell.cell_id[:12] for each in among}
        return unfinished_attempts(self.store, lambda key: key[:12] in short)

    def _done(self, each: OrderedCell, entry: Entry | None) -> None:
        del self.waiting[each.job.cell.cell_id]
        if entry is not None:
            self.entries[each.job.key] = entry
            seconds = duration_seconds(entry.record) or 0.0
            self.display.cell_finished(each.job, entry.record, seconds)

    def _settle(self, each: OrderedCell, now: float) -> None:
        """Decide about a cell whose order is over and whose record has not come."""
        state, ended_at = each.state, each.ended_at or now
        if state.error is not None or (each.last and each.last.directory.name == state.record):
            self._done(each, each.last)
        elif state.phase == "cancelled":
            # Its process may go on without the engine.
            seen = self._attempts([each])
            if not any(one.held and one.record.placement.job == state.job for one in seen):
                self._done(each, each.last)
        elif state.phase == "died" and self.leave_at is None and each.losses < RESTARTS:
            self._restart(each)
        elif state.phase == "died" or now - ended_at >= SETTLE_SECONDS:
            self._give_up(each)

    def _restart(self, each: OrderedCell) -> None:
        cell = each.job.cell.cell_id
        self._message(each, f"{self.engine.ending(cell)[1]}; it starts again")
        each.losses, each.started, each.ended_at = each.losses + 1, False, None
        each.state = self.engine.submit({cell: self._order(each)})[cell]

    def _give_up(self, each: OrderedCell) -> None:
        """Stop waiting for a cell whose order left no record that counts; recover what it left."""
        claims = self.store.claims.glob(f"{each.job.cell.cell_id[:12]}-*.lock")
        if any(is_held(self.store, key) for key in {path.name.split(".")[0] for path in claims}):
            return  # another runner measures it, or it still writes its record
        word, sentence = self.engine.ending(each.job.cell.cell_id)
        entry = each.last
        for seen in self._attempts([each]):
            with self.store.claim(seen.key) as claimed:
                finish = partial(finish_lost, word=word)
                found = self.store.recover(seen.key, finish) if claimed else []
                entry = next(iter(found), entry)
        self._message(each, f"{sentence}; the same command runs it again")
        self._done(each, entry)

    def _message(self, each: OrderedCell, text: str) -> None:
        self.display.message(f"{each.job.cell.cell_id[:12]} {each.job.label}: {text}")

    def _report_queue(self) -> None:
        """Show the counts of the queue when they have changed."""
        counts = Counter(
            each.state.queue_text for each in self.waiting.values() if each.state.queue_text
        )
        text = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
        if text and text != self.last_counts:
            self.display.message(f"{self.engine.name}: {text}")
        self.last_counts = text

    def _stop(self, signals: int) -> bool:
        """Cancel the cells, and again while they go on. False when it is time to leave."""
        now, first = time.monotonic(), self.leave_at is None
        self.leave_at = self.leave_at or now + GRACE_SECONDS + REPORT_SECONDS
        if signals > 1 and not first:
            return False
        if now > self.leave_at:
            left = f"{_cells(len(self.waiting))} left without an answer"
            self.display.message(f"{left}; the next run keeps what they measured")
            return False
        if self.waiting and now - self.cancelled_at >= CANCEL_AGAIN_SECONDS:
            self.cancelled_at = now
            goes_on = self.engine.cancel(list(self.waiting))
            if first:
                begun = sum(each.started for each in self.waiting.values())
                self.display.message(goes_on or stopping_text(begun))
            return not goes_on
        return True


def is_new_result(entry: Entry, attempts: Mapping[str, int], gpus: bool) -> bool:
    """Whether a record is newer than the `attempts` before this run, of this software, and of a GPU
    if the engine has any."""
    record = entry.record
    return (
        record.attempt > attempts.get(_key(entry), 0)
        and remote_plan.same_software(record)
        and remote_plan.used_gpu(record) == gpus
    )


def is_written_by(state: OrderState, entry: Entry) -> bool:
    """Whether this order wrote the record, with whatever software or device it found there."""
    job = (entry.record.placement.job or "").split(".")[0]
    return entry.directory.name == state.record or bool(job and job == state.job)


def finish_lost(working: Path, record: Record, word: str) -> Record:
    """`finish_abandoned`, with `word`, which is the engine's, in the reason."""
    finished = finish_abandoned(working, record)
    if finished.status != "interrupted" or finished.reason != "the runner died":
        return finished
    return finished.model_copy(update={"reason": f"the runner died; {word}"})


def _key(entry: Entry) -> str:
    return entry.directory.name.split(".")[0]


def _cells(count: int) -> str:
    return f"{count} cell is" if count == 1 else f"{count} cells are"
