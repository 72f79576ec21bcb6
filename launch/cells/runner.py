"""The runner on this machine: each cell in processes of its own, one after another or side by side
on devices of their own."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection
from pathlib import Path

from harness.preflight.problems import Problem
from harness.ranks.launch_command import fixed_port
from harness.ranks.progress_file import read_progress
from harness.records import provenance
from harness.records.part import Status
from harness.records.reading import read_record
from harness.records.record import Record
from harness.records.store import Entry, Store
from launch.cells import accelerate_profile, start
from launch.cells.devices import Grant, Guard, Lease, Slots
from launch.cells.finish import contamination, finish_abandoned, finish_record
from launch.cells.start import Engine, Rendezvous, devices_here, first_record
from launch.cells.watch import POLL_SECONDS, Watched, limits_for
from launch.display.progress import Display
from launch.planning import preflight
from launch.planning.left_out import ProblemsFound as ProblemsFound
from launch.planning.left_out import leave_out
from launch.planning.plan import Job, Sweep
from launch.predict.run_predictions import RunPredictions, with_prediction
from launch.processes.server import start_server
from launch.processes.stop_signals import Signals, stop_signals, stopping_text
from launch.processes.stop_signals import Stopped as Stopped
from launch.processes.workers import Process, Ranks, free_port, start_ranks
from matrices.cell import Cell
from matrices.errors import UserError

# Starts the ranks of a cell in its working directory, the first of them holding the worker lock.
Launch = Callable[[Cell, Path, Path, Ranks], list[Process]]


@dataclass(frozen=True)
class Finished:
    """What a run leaves: the last record of each of its cells, by key, the signal that stopped
    it, and the jobs as its checks left them."""

    entries: dict[str, Entry]
    stopped_by: int | None = None
    jobs: Sequence[Job] = ()


@dataclass
class Running:
    """A cell that is being measured, with what it holds."""

    job: Job
    working: Path
    watched: Watched
    lease: Lease
    claim: contextlib.ExitStack
    guard: Guard
    began: float


@dataclass
class Runner:
    """Runs the jobs of one plan. `worker` and `preflight` are module names; `foretell` predicts
    the cells that are about to run.

    `grant` is what an engine has given this process: then no devices are asked for, and cells run
    one after another. `engine`, and its `job`, are recorded. `rendezvous` is where the machines of
    a cell on several of them meet, of which this is the first. `stopped` lets the engine say in a
    record why it had its cell stopped. `sweep` tells where in the matrix a problem stands.
    `launch` starts the processes of a cell, where they are not forked from the stack's server.
    """

    store: Store
    display: Display
    limit_seconds: float | None = None
    worker: str = "harness.worker"
    preflight: str | None = "harness.preflight.preflight"
    foretell: Callable[[Sequence[Cell]], RunPredictions] | None = None
    foretold: RunPredictions = field(default_factory=RunPredictions)
    phase_seconds: float | None = None
    engine: Engine = "local"
    job: str | None = None
    grant: Grant | None = None
    slots: Slots | None = None
    rendezvous: Rendezvous | None = None
    stopped: Callable[[Record], Record] | None = None
    sweep: Sweep | None = None
    launch: Launch | None = None
    running: list[Running] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> Finished:
        """Run what is to be run. Raises UserError, ProblemsFound before anything has started, and
        Stopped when stopped before the first cell."""
        self.store.check()
        to_run = [job for job in jobs if job.action in ("run", "retry")]
        for port in {fixed_port(job.cell) for job in to_run} - {0}:
            free_port(port)
        with stop_signals() as signals:
            if to_run:
                jobs = leave_out(jobs, self._start_server(to_run), self.display, self.sweep)
                if self.foretell is not None:
                    left = [job.cell for job in jobs if job.action in ("run", "retry")]
                    self.foretold = self.foretell(left)
            self.store.prepare()
            self._recover_all()
            signals.raising = False
            entries = {job.key: job.entry for job in jobs if job.entry and job.action == "keep"}
            entries |= self._run_all([job for job in jobs if job.action != "keep"], signals)
        return Finished(entries, next(iter(signals.received), None), jobs)

    def _start_server(self, jobs: Sequence[Job]) -> list[Problem]:
        """Have the stack imported, and say what is wrong with the cells of these jobs."""
        if self.launch is not None:
            return []
        cells = [job.cell for job in jobs]
        modules = [self.worker] + ([self.preflight] if self.preflight else [])
        # It looks for GPUs when it is imported, which a process that is forked from must not do.
        gpu = provenance.uses_gpu_here()
        if not gpu:
            modules += sorted({each for cell in cells if (each := cell.strategy.package)})
        self.server = start_server(modules)
        if self.preflight is None:
            return []
        with self.display.busy(
            "importing torch, transformers, trl and lm-eval; checking models, data and tasks"
        ):
            return preflight.problems(self.server, self.preflight, cells)

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
        told = False
        self.display.begin([job for job in jobs if job.action != "invalid"])
        try:
            while self.running or (waiting and not signals.received):
                if not signals.received:
                    self._start_some(waiting, entries)
                elif not told and self.grant is None:  # an engine's own loop says it
                    told = True
                    self.display.message(stopping_text(len(self.running)))
                sentinels = [each for one in self.running for each in one.watched.sentinels]
                if self.running:
                    connection.wait(sentinels, POLL_SECONDS)
                elif waiting:
                    time.sleep(POLL_SECONDS)
                for one in list(self.running):
                    entry = self._look_at(one, signals)
                    if entry is not None:
                        entries[one.job.key] = entry
        finally:
            self._give_up()
        return entries

    def _start_some(self, waiting: deque[Job], entries: dict[str, Entry]) -> None:
        """Start, or settle without starting, the jobs that are not held elsewhere and for which
        there are devices."""
        least_refused = float("inf")
        for_devices = False
        for job in list(waiting):
            count = devices_here(job.cell) if job.action != "invalid" else 0
            if count >= least_refused:
                continue
            lease = self._lease(job, count, started=bool(entries or self.running))
            if lease is None:
                least_refused, for_devices = count, True
                continue
            taken = self._take(job, lease)
            if isinstance(taken, Entry):
                entries[job.key] = taken
            if taken is not None:
                waiting.remove(job)
        if waiting and not self.running:
            self.display.waiting([job.label for job in waiting], for_devices)

    def _lease(self, job: Job, count: int, started: bool) -> Lease | None:
        """Devices for a job; none while there are none."""
        if self.grant is not None:
            return None if self.running and count else Lease(self.grant)
        if count == 0:
            return Lease(Grant((), {}, exclusive=False))
        self.slots = self.slots or Slots()
        if self.slots.exclusive and self.running:
            return None
        try:
            # Whoever has some already, and wants more, is not to keep others from getting any.
            return self.slots.ask(count, patient=not self.running)
        except UserError as error:
            if not started:
                raise
            return Lease(Grant((), {}, exclusive=False), refused=str(error))

    def _take(self, job: Job, lease: Lease) -> Entry | Running | None:
        """The job's record, or its processes; none while another runner has its claim. The lease
        is given back unless a cell was started on it."""
        with contextlib.ExitStack() as claim:
            claim.callback(lease.release)
            if not claim.enter_context(self.store.claim(job.key)):
                return None
            self._recover(job.key)
            last = self.store.latest_of(job.key)
            new = last is not None and last.record.attempt > job.seen_attempt
            if last is not None and new and last.record.status != "interrupted":
                self.display.done_elsewhere(job, last.record)
                return last
            if job.action == "invalid":
                return self._refuse(job, last, "invalid", job.why)
            skipped = self.foretold.skipped.get(job.cell.cell_id) or lease.refused
            if skipped:
                return self._refuse(job, last, "skipped", skipped)
            try:
                running = self._start(job, lease)
            except UserError as error:
                if error.key != "main_process_port":
                    raise
                return self._refuse(job, last, "failed", str(error))
            running.claim = claim.pop_all()
        self.running.append(running)
        return running

    def _refuse(self, job: Job, last: Entry | None, status: Status, why: str) -> Entry:
        """Record that a cell is not started here; once, however often it is looked at again."""
        if not job.told:
            self.display.message(f"{job.cell.cell_id[:12]} {job.label}: {status}, {why}")
        if last and (last.record.status, last.record.reason) == (status, why):
            return last
        working = self.store.start(partial(first_record, job.cell), job.key)
        accelerate_profile.write(job.cell, working)
        refused = read_record(working / "record.json").model_copy(
            update={"status": status, "reason": why, "ended": provenance.now()}
        )
        return self.store.publish(working, self._with_prediction(refused))

    def _with_prediction(self, record: Record) -> Record:
        return with_prediction(record, self.foretold.predictions.get(record.cell_id))

    def _start(self, job: Job, lease: Lease) -> Running:
        cell, grant = job.cell, lease.grant
        placed = start.placement(self.engine, self.job, grant)
        meeting = self.rendezvous if cell.nodes > 1 else None
        if meeting is None and (port := fixed_port(cell)):
            free_port(port)
        first = partial(first_record, cell, grant=grant, placed=placed, meeting=meeting)
        working = self.store.start(first, job.key)
        accelerate_profile.write(cell, working)
        ranks = start.ranks(cell, working, grant, meeting)
        if meeting is not None:
            start.announce(working, meeting)
        self.display.cell_started(job)
        lock = self.store.worker_lock(job.key)
        if self.launch is not None:
            processes = self.launch(cell, working, lock, ranks)
        else:
            processes = start_ranks(self.server, self.worker, working, lock, ranks)
        limits = limits_for(cell.devices, self.limit_seconds, self.phase_seconds)
        return Running(
            job=job,
            working=working,
            watched=Watched(processes, working, limits, ranks),
            lease=lease,
            claim=contextlib.ExitStack(),
            guard=Guard(grant.devices),
            began=time.monotonic(),
        )

    def _look_at(self, one: Running, signals: Signals) -> Entry | None:
        """The record of a running cell, once its processes have ended."""
        outcome = one.watched.poll(signals.received)
        if outcome is None:
            one.guard.look(one.watched.pids)
            self.display.update(one.job, read_progress(one.working))
            return None
        record = self._with_prediction(finish_record(one.working, outcome))
        if signals.received and self.stopped is not None and record.status == "interrupted":
            record = self.stopped(record)
        doubts = [*one.guard.found.values(), *contamination(record)]
        hosts = list(dict.fromkeys(state.host for state in record.ranks if state.host))
        placed = record.placement.model_copy(update={"hosts": hosts or record.placement.hosts})
        record = record.model_copy(update={"contaminated": doubts, "placement": placed})
        entry = self.store.publish(one.working, record)
        self.running.remove(one)
        one.claim.close()
        self.display.cell_finished(one.job, entry.record, time.monotonic() - one.began)
        return entry

    def _give_up(self) -> None:
        """Whatever still runs after an error is ended; its record is recovered by the next run."""
        for one in self.running:
            one.watched.kill()
            one.claim.close()
        self.running = []
        if self.slots is not None:
            self.slots.close()
