"""The runner on this machine: each cell runs in its own processes, one cell after another, or side
by side on different devices."""

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
from harness.ranks.launch_command import MODULE, fixed_port
from harness.ranks.progress_file import read_progress
from harness.records import provenance
from harness.records.part import Status
from harness.records.reading import read_record
from harness.records.record import Record
from harness.records.store import Entry, Store
from launch.cells import accelerate_profile, start
from launch.cells.devices import DevicePool, ForeignProcesses, Grant, Lease
from launch.cells.finish import contamination, finish_abandoned, finish_record
from launch.cells.start import EngineName, Rendezvous, first_record
from launch.cells.watch import POLL_SECONDS, RankProcesses, limits_for
from launch.display.progress import Display
from launch.planning import preflight
from launch.planning.invalid_cells import leave_out
from launch.planning.plan import Job, Sweep
from launch.predict.run_predictions import RunPredictions, with_prediction
from launch.processes.server import start_server
from launch.processes.stop_signals import Signals, stop_signals, stopping_text
from launch.processes.workers import Process, Ranks, free_port, start_ranks
from matrices.cell import Cell
from matrices.errors import UserError

# Starts the ranks of a cell in its working directory; the first rank holds the worker lock.
StartProcesses = Callable[[Cell, Path, Path, Ranks], list[Process]]


@dataclass(frozen=True)
class RunResult:
    """The last record of each cell of a run, by key, the signal that stopped the run, and its jobs
    after all checks."""

    entries: dict[str, Entry]
    stopped_by: int | None = None
    jobs: Sequence[Job] = ()


@dataclass
class RunningCell:
    """A cell that is measured now, with its processes, devices and claim."""

    job: Job
    working: Path
    processes: RankProcesses
    lease: Lease
    claim: contextlib.ExitStack
    foreign: ForeignProcesses
    began: float


@dataclass
class Runner:
    """Runs the jobs of one plan. `worker` and `preflight` are module names. `predict` predicts the
    cells that will run; `run_predictions` are its answers.

    `grant` are the devices that an engine has given this process: then the runner acquires none,
    and runs one cell after another. Records name the `engine` and its `job`. This machine is the
    first of the machines that meet at `rendezvous`. `explain_stop` adds the engine's reason to the
    record of a stopped cell. `sweep` locates problems in the matrix. `start_processes` starts the
    processes of a cell; by default they are forked from the server that has imported the stack.
    """

    store: Store
    display: Display
    limit_seconds: float | None = None
    worker: str = MODULE
    preflight: str | None = preflight.MODULE
    predict: Callable[[Sequence[Cell]], RunPredictions] | None = None
    run_predictions: RunPredictions = field(default_factory=RunPredictions)
    phase_seconds: float | None = None
    engine: EngineName = "local"
    job: str | None = None
    grant: Grant | None = None
    devices: DevicePool | None = None
    rendezvous: Rendezvous | None = None
    explain_stop: Callable[[Record], Record] | None = None
    sweep: Sweep | None = None
    start_processes: StartProcesses | None = None
    running: list[RunningCell] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> RunResult:
        """Run what is to be run. Raises UserError, ProblemsFound before anything has started, and
        Stopped when stopped before the first cell."""
        self.store.check()
        to_run = [job for job in jobs if job.will_run]
        for port in {fixed_port(job.cell) for job in to_run} - {0}:
            free_port(port)
        with stop_signals() as signals:
            if to_run:
                problems = self._start_server(to_run)
                jobs = leave_out(jobs, problems, self.display.message, self.sweep)
                if self.predict is not None:
                    self.run_predictions = self.predict([j.cell for j in jobs if j.will_run])
            self.store.prepare()
            self._recover_all()
            signals.raising = False
            entries = {job.key: job.entry for job in jobs if job.entry and job.action == "keep"}
            entries |= self._run_all([job for job in jobs if job.action != "keep"], signals)
        return RunResult(entries, next(iter(signals.received), None), jobs)

    def _start_server(self, jobs: Sequence[Job]) -> list[Problem]:
        """Start the fork server and import the stack; gives the problems of these cells."""
        if self.start_processes is not None:
            return []
        cells = [job.cell for job in jobs]
        modules = [self.worker] + ([self.preflight] if self.preflight else [])
        # Its import looks for GPUs, and the fork server must not.
        if not provenance.uses_gpu_here():
            modules += sorted({each for cell in cells if (each := cell.strategy.package)})
        self.server = start_server(modules)
        if self.preflight is None:
            return []
        with self.display.busy(preflight.TITLE):
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
        announced = False
        self.display.begin([job for job in jobs if job.action != "invalid"])
        try:
            while self.running or (waiting and not signals.received):
                if not signals.received:
                    self._start_some(waiting, entries)
                elif not announced and self.grant is None:  # otherwise the engine's loop says it
                    announced = True
                    self.display.message(stopping_text(len(self.running)))
                sentinels = [each for run in self.running for each in run.processes.sentinels]
                if self.running:
                    connection.wait(sentinels, POLL_SECONDS)
                elif waiting:
                    time.sleep(POLL_SECONDS)
                for run in list(self.running):
                    entry = self._poll(run, signals)
                    if entry is not None:
                        entries[run.job.key] = entry
        finally:
            self._kill_running()
        return entries

    def _start_some(self, waiting: deque[Job], entries: dict[str, Entry]) -> None:
        """Start the jobs that no other runner holds and for which there are devices, or record why
        they do not start."""
        least_refused = float("inf")
        for_devices = False
        for job in list(waiting):
            count = job.cell.devices_per_node if job.action != "invalid" else 0
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
        """Devices for a job; none while there are too few."""
        if self.grant is not None:
            return None if self.running and count else Lease(self.grant)
        if count == 0:
            return Lease(Grant((), {}, exclusive=False))
        self.devices = self.devices or DevicePool()
        if self.devices.exclusive and self.running:
            return None
        try:
            # A runner that has devices already does not block the others.
            return self.devices.acquire(count, keep_place=not self.running)
        except UserError as error:
            if not started:
                raise
            return Lease(Grant((), {}, exclusive=False), refused=str(error))

    def _take(self, job: Job, lease: Lease) -> Entry | RunningCell | None:
        """The job's record, or its running cell; none while another runner has its claim. Releases
        the lease unless a cell was started on it."""
        with contextlib.ExitStack() as claim:
            claim.callback(lease.release)
            if not claim.enter_context(self.store.claim(job.key)):
                return None
            self._recover(job.key)
            last = self.store.latest_of(job.key)
            new = last is not None and last.record.attempt > job.known_attempt
            if last is not None and new and last.record.status != "interrupted":
                self.display.done_elsewhere(job, last.record)
                return last
            if job.action == "invalid":
                return self._refuse(job, last, "invalid", job.why)
            skipped = self.run_predictions.skipped.get(job.cell.cell_id) or lease.refused
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
        """Record that a cell does not start here, unless its last record says the same."""
        if not job.reported:
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
        return with_prediction(record, self.run_predictions.predictions.get(record.cell_id))

    def _start(self, job: Job, lease: Lease) -> RunningCell:
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
        if self.start_processes is not None:
            processes = self.start_processes(cell, working, lock, ranks)
        else:
            processes = start_ranks(self.server, self.worker, working, lock, ranks)
        limits = limits_for(cell.devices, self.limit_seconds, self.phase_seconds)
        return RunningCell(
            job=job,
            working=working,
            processes=RankProcesses(processes, working, limits, ranks),
            lease=lease,
            claim=contextlib.ExitStack(),
            foreign=ForeignProcesses(grant.devices),
            began=time.monotonic(),
        )

    def _poll(self, run: RunningCell, signals: Signals) -> Entry | None:
        """The record of a running cell, once its processes have ended."""
        outcome = run.processes.poll(signals.received)
        if outcome is None:
            run.foreign.look(run.processes.pids)
            self.display.update(run.job, read_progress(run.working))
            return None
        record = self._with_prediction(finish_record(run.working, outcome))
        if signals.received and self.explain_stop is not None and record.status == "interrupted":
            record = self.explain_stop(record)
        doubts = [*run.foreign.found.values(), *contamination(record)]
        hosts = list(dict.fromkeys(state.host for state in record.ranks if state.host))
        placed = record.placement.model_copy(update={"hosts": hosts or record.placement.hosts})
        record = record.model_copy(update={"contaminated": doubts, "placement": placed})
        entry = self.store.publish(run.working, record)
        self.running.remove(run)
        run.claim.close()
        self.display.cell_finished(run.job, entry.record, time.monotonic() - run.began)
        return entry

    def _kill_running(self) -> None:
        """Kill the cells that still run after an error; the next run recovers their records."""
        for run in self.running:
            run.processes.kill()
            run.claim.close()
        self.running = []
        if self.devices is not None:
            self.devices.close()
