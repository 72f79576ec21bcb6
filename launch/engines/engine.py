"""One loop for every engine: plan and check here, order there, follow, recover, stop.

An `Engine` says what its machines have, takes orders, tells how they stand and cancels them. What
a cell measures comes through the files of the results directory, which all machines share, so that
the loop is the same for every engine.

Cells on this machine are not ordered: the `Runner` starts them as devices become free, waits for
what another runner measures, and sees each process end at once. Orders would put a process and a
look at files in between. An order runs the same `Runner` on its machine.
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
from launch.cells.runner import Finished, Runner
from launch.display.progress import Display
from launch.display.tables import seconds_taken
from launch.engines import remote_plan
from launch.engines.order import Order
from launch.engines.results_watch import Published, Running, is_held, running
from launch.planning.left_out import quickly_checked
from launch.planning.plan import Job, Sweep, plan_jobs
from launch.processes.stop_signals import Signals, stop_signals, stopping_text
from launch.processes.workers import GRACE_SECONDS

POLL_SECONDS = 0.2
# Files are looked at this often, and whenever the engine says that an order is over.
FILES_SECONDS = 1.0
# What a shared file system may take to show here what a node has written.
SETTLE_SECONDS = 10.0
# How often a cell starts again whose machine, or whose process there, has died.
RESTARTS = 3
# A cell that is to stop is asked again after this time; what all of them get, beyond a worker's
# own time to write its record.
ASK_AGAIN_SECONDS = 5.0
REPORT_SECONDS = 20.0


class NoAnswer(Exception):
    """An engine does not tell how its orders stand; says what it said."""


@dataclass(frozen=True)
class State:
    """How one order stands, as the engine tells it.

    An order has `ended` when its process is gone, `died` when the machine or the process was lost
    and the cell may start again, and was `cancelled` when its cell had not begun. `job` is the
    engine's name of it, as in the cell's record. `told` are the queue's words, empty where there is
    no queue to tell of. `why` says what died. `record` is the name of the record's directory, where
    the engine knows it. `error` keeps the whole run from going on.
    """

    phase: Literal["waiting", "running", "ended", "died", "cancelled"]
    job: str = ""
    told: str = ""
    why: str = ""
    record: str | None = None
    error: Exception | None = None

    @property
    def over(self) -> bool:
        return self.phase not in ("waiting", "running")


class Engine(Protocol):
    """Machines that run orders. Cells are named by their cell_id; each has one order at a time.

    `name` is what records call the engine, `title` what messages call it; it is polled every
    `poll_seconds`, and its cells compute on GPUs or not (`gpus`).
    """

    name: start.Engine
    title: str
    poll_seconds: float

    @property
    def gpus(self) -> bool: ...

    def check(self, jobs: Sequence[Job]) -> None:
        """Raises UserError for the first cell that no machine could ever hold, and when the
        machines are not fit to run any."""

    def queued(self, cells: Sequence[str]) -> dict[str, State]:
        """Which of these cells an earlier run has ordered, and are not over. Raises UserError."""

    def adding(self) -> AbstractContextManager[object]:
        """Held while what is queued is looked at and added to, where two runs could meet."""

    def submit(self, orders: Mapping[str, Order]) -> dict[str, State]:
        """Take orders, by cell. Raises UserError when they are refused."""

    def poll(self) -> Mapping[str, State]:
        """How the orders stand, of earlier runs too where `queued` has found them. What an order
        that is over has published is in the results directory by then. Raises NoAnswer."""

    def cancel(self, cells: Sequence[str]) -> str:
        """Withdraw what waits and ask what runs to write its record; may be called again.

        Where orders outlive this command nothing is done: returns how to follow and to cancel them,
        else an empty text."""

    def ending(self, cell: str) -> tuple[str, str]:
        """How an order ended that left no finished record: briefly, for what is recovered of it,
        and as a sentence without its full stop."""


def run_on(engine: Engine, sweep: Sweep, order: Order, display: Display) -> Finished:
    """Run the cells of a sweep on an engine, and wait for them.

    `order` is what all their orders have in common. Raises UserError and ProblemsFound before
    anything is ordered, Stopped when stopped before that, and whatever keeps the machines from
    going on.
    """
    store = Store(sweep.results)
    store.check()
    published = Published(store)
    there = published.new()
    jobs = plan_jobs(
        sweep.cells,
        {entry.directory.name: entry for entry in there},
        sweep.retry,
        sweep.score_base,
        remote_plan.machine(engine.gpus),
        counts=remote_plan.counting(engine.gpus),
    )
    with stop_signals() as signals:
        jobs = quickly_checked(jobs, display, sweep)
        engine.check(_to_run(jobs))
        if found := _to_run(jobs):
            queued = engine.queued([job.cell.cell_id for job in found])
            new = [job for job in found if job.cell.cell_id not in queued]
            jobs = remote_plan.check(jobs, new, display, sweep) if new else jobs
        signals.raising = False
        to_run = _to_run(jobs)
        settled = Runner(store, display).run([job for job in jobs if job not in to_run])
        signals.received += [] if settled.stopped_by is None else [settled.stopped_by]
        driver = Driver(engine, store, display, order, published, there)
        if to_run and not signals.received:
            driver.submit(to_run)
        driver.follow(signals)
    entries = settled.entries | driver.entries
    return Finished(entries, next(iter(signals.received), None), jobs)


def _to_run(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.action in ("run", "retry")]


@dataclass
class Ordered:
    """A cell that is waited for. `attempts` are those that were there before it, by key; `losses`
    counts the machines that died under it; `ended_at` is when its order was first seen to be over;
    `last` is an attempt that was interrupted, which another may follow."""

    job: Job
    attempts: Mapping[str, int]
    state: State = State("waiting")
    started: bool = False
    losses: int = 0
    ended_at: float | None = None
    last: Entry | None = None


@dataclass
class Driver:
    """Orders cells and waits for what becomes of them. `there` are the records that the plan was
    made from, `entries` those that come, by the job's key."""

    engine: Engine
    store: Store
    display: Display
    order: Order
    published: Published
    there: Sequence[Entry] = ()
    waiting: dict[str, Ordered] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.told = self.silent = ""
        self.polled_at = self.files_at = self.asked_at = float("-inf")
        self.leave_at: float | None = None  # set once the cells are to stop

    def submit(self, jobs: Sequence[Job]) -> None:
        """Order what is not queued yet, and wait for all of it. Raises UserError."""
        attempts: dict[str, dict[str, int]] = {}
        for entry in self.there:
            known = attempts.setdefault(entry.record.cell_id, {})
            known[_key(entry)] = max(known.get(_key(entry), 0), entry.record.attempt)
        for job in jobs:
            self.waiting[job.cell.cell_id] = Ordered(job, attempts.get(job.cell.cell_id, {}))
        self.display.begin(jobs)
        with self.engine.adding():
            states = self.engine.queued(list(self.waiting))
            if states:
                count = _cells(len(states))
                self.display.message(f"{count} in {self.engine.title}'s queue from an earlier run")
            # An order that ended since the plan was made has published its record before.
            self._read_records()
            new = {cell: self._order(each) for cell, each in self.waiting.items()}
            new = {cell: order for cell, order in new.items() if cell not in states}
            states |= self.engine.submit(new) if new else {}
        for cell, each in self.waiting.items():
            each.state = states[cell]

    def _order(self, each: Ordered) -> Order:
        return dataclasses.replace(
            self.order,
            engine=self.engine.name,
            cell=each.job.cell.model_dump_json(),
            label=each.job.label,
            attempts=each.attempts,
        )

    def follow(self, signals: Signals) -> None:
        """Until every cell has its record or its order is over without one.

        The first signal cancels what waits and asks what runs to write its record; the second
        leaves at once. Where orders outlive this command, the first leaves them as they are.
        Raises the error that keeps the machines from going on.
        """
        while self.waiting:
            self.look()
            if (signals.received or self.error) and not self._stop(len(signals.received)):
                break
            if self.waiting:
                time.sleep(POLL_SECONDS)
        if self.error is not None:
            raise self.error

    def look(self) -> None:
        """One look at the engine, when it is time, and then at the files: what ended before the
        engine was asked has written its record by then."""
        now = time.monotonic()
        asked = now - self.polled_at >= self.engine.poll_seconds and self._poll(now)
        over = [each for each in self.waiting.values() if each.ended_at is not None]
        if now - self.files_at >= FILES_SECONDS or (asked and over):
            self.files_at = now
            self._read_records()
            self._read_running()
        if asked:
            for each in over:
                if each.job.cell.cell_id in self.waiting:
                    self._settle(each, now)
            self._tell()

    def _poll(self, now: float) -> bool:
        self.polled_at = now
        try:
            states = self.engine.poll()
        except NoAnswer as error:
            if str(error) != self.silent:
                self.display.message(f"{error}; asking again")
            self.silent = str(error)
            return False
        self.silent = ""
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
            if not (wrote(each.state, entry) or answers(entry, each.attempts, self.engine.gpus)):
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

    def _attempts(self, among: Iterable[Ordered]) -> list[Running]:
        """What the results directory shows of attempts under way, and left behind."""
        short = {each.job.cell.cell_id[:12] for each in among}
        return running(self.store, lambda key: key[:12] in short)

    def _done(self, each: Ordered, entry: Entry | None) -> None:
        del self.waiting[each.job.cell.cell_id]
        if entry is not None:
            self.entries[each.job.key] = entry
            seconds = seconds_taken(entry.record) or 0.0
            self.display.cell_finished(each.job, entry.record, seconds)

    def _settle(self, each: Ordered, now: float) -> None:
        """What becomes of a cell whose order is over and whose record has not come."""
        state, ended_at = each.state, each.ended_at or now
        if state.error is not None or (each.last and each.last.directory.name == state.record):
            self._done(each, each.last)
        elif state.phase == "cancelled":
            # Unless its process goes on without whoever ordered it.
            seen = self._attempts([each])
            if not any(one.held and one.record.placement.job == state.job for one in seen):
                self._done(each, each.last)
        elif state.phase == "died" and self.leave_at is None and each.losses < RESTARTS:
            self._again(each)
        elif state.phase == "died" or now - ended_at >= SETTLE_SECONDS:
            self._bury(each)

    def _again(self, each: Ordered) -> None:
        cell = each.job.cell.cell_id
        self._say(each, f"{self.engine.ending(cell)[1]}; it starts again")
        each.losses, each.started, each.ended_at = each.losses + 1, False, None
        each.state = self.engine.submit({cell: self._order(each)})[cell]

    def _bury(self, each: Ordered) -> None:
        """Give up a cell whose order left no record that counts, and keep what it left."""
        claims = self.store.claims.glob(f"{each.job.cell.cell_id[:12]}-*.lock")
        if any(is_held(self.store, key) for key in {path.name.split(".")[0] for path in claims}):
            return  # measured by another runner of this directory, or it still writes its record
        word, sentence = self.engine.ending(each.job.cell.cell_id)
        entry = each.last
        for seen in self._attempts([each]):
            with self.store.claim(seen.key) as claimed:
                finish = partial(finish_dead, word=word)
                found = self.store.recover(seen.key, finish) if claimed else []
                entry = next(iter(found), entry)
        self._say(each, f"{sentence}; the same command runs it again")
        self._done(each, entry)

    def _say(self, each: Ordered, text: str) -> None:
        self.display.message(f"{each.job.cell.cell_id[:12]} {each.job.label}: {text}")

    def _tell(self) -> None:
        """How the queue stands, when that has changed."""
        counts = Counter(each.state.told for each in self.waiting.values() if each.state.told)
        text = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
        if text and text != self.told:
            self.display.message(f"{self.engine.name}: {text}")
        self.told = text

    def _stop(self, signals: int) -> bool:
        """Have the cells stopped, and ask again what goes on. False when it is time to leave."""
        now, first = time.monotonic(), self.leave_at is None
        self.leave_at = self.leave_at or now + GRACE_SECONDS + REPORT_SECONDS
        if signals > 1 and not first:
            return False
        if now > self.leave_at:
            left = f"{_cells(len(self.waiting))} left without an answer"
            self.display.message(f"{left}; the next run keeps what they measured")
            return False
        if self.waiting and now - self.asked_at >= ASK_AGAIN_SECONDS:
            self.asked_at = now
            goes_on = self.engine.cancel(list(self.waiting))
            if first:
                begun = sum(each.started for each in self.waiting.values())
                self.display.message(goes_on or stopping_text(begun))
            return not goes_on
        return True


def answers(entry: Entry, attempts: Mapping[str, int], gpus: bool) -> bool:
    """Whether a record is one that was waited for: newer than what was there, of this software,
    and of a GPU if the engine's would be."""
    record = entry.record
    return (
        record.attempt > attempts.get(_key(entry), 0)
        and remote_plan.same_software(record)
        and remote_plan.used_gpu(record) == gpus
    )


def wrote(state: State, entry: Entry) -> bool:
    """Whether this order wrote the record, on whatever it found there."""
    job = (entry.record.placement.job or "").split(".")[0]
    return entry.directory.name == state.record or bool(job and job == state.job)


def finish_dead(working: Path, record: Record, word: str) -> Record:
    """As for any runner that died, with what the engine says of it."""
    finished = finish_abandoned(working, record)
    if finished.status != "interrupted" or finished.reason != "the runner died":
        return finished
    return finished.model_copy(update={"reason": f"the runner died; {word}"})


def _key(entry: Entry) -> str:
    return entry.directory.name.split(".")[0]


def _cells(count: int) -> str:
    return f"{count} cell is" if count == 1 else f"{count} cells are"
