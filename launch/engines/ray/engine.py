"""Cells as tasks of a Ray cluster: ordered here, measured on its nodes, followed through the files
of the shared results directory.

A task is never repeated by Ray itself: a node that dies is told apart here from a cell that fails,
and the cell starts again on another node, a few times at most.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.records import provenance
from harness.records.record import read_record
from harness.records.store import Entry, Store, record_key
from launch.cells.finish import finish_abandoned
from launch.cells.runner import Finished, Runner
from launch.display.progress import Display
from launch.engines.order import Order, Report
from launch.engines.ray.cluster import (
    Asked,
    Node,
    asked,
    check_nodes,
    connected,
    has_gpus,
    living_nodes,
)
from launch.engines.ray.task import Errand, ProcessDied, run_errand
from launch.engines.remote_plan import check, counting
from launch.engines.results_watch import Published, running
from launch.planning.left_out import quickly_checked
from launch.planning.plan import Job, Sweep, plan_jobs
from launch.processes.stop_signals import Signals, stop_signals
from launch.processes.workers import GRACE_SECONDS
from matrices.errors import UserError
from matrices.rules.machine import Machine

# How often a cell starts again whose node, or Ray worker, has died.
RESTARTS = 3
POLL_SECONDS = 0.5
FILES_SECONDS = 1.0
# What a shared file system may take to show here what a node has written.
SETTLE_SECONDS = 10.0
# What a node may take, beyond a worker's own time, to bring a stopped cell's report.
REPORT_SECONDS = 20.0


@dataclass(frozen=True)
class RayOptions:
    """The head node's address (none: RAY_ADDRESS, else a cluster on this machine), and what a
    device is to Ray where it is no GPU."""

    address: str | None = None
    per_device: Mapping[str, float] = field(default_factory=dict)


def run_on_ray(
    sweep: Sweep, order: Order, options: RayOptions, display: Display
) -> tuple[list[Job], Finished]:
    """Run the cells of a sweep as tasks of a Ray cluster, and wait for them.

    `order` is what all their orders have in common. Raises UserError and ProblemsFound before
    anything has started, and Stopped when stopped before that.
    """
    store = Store(sweep.results)
    store.check()
    there = Published(store).new()
    with stop_signals(), connected(options.address), stop_signals() as signals:
        nodes = living_nodes()
        jobs = quickly_checked(plan(sweep, nodes, there), display, sweep)
        to_run = [job for job in jobs if job.action in ("run", "retry")]
        requests = {job.key: asked(job.cell, nodes, options.per_device) for job in to_run}
        if to_run:
            check_nodes(nodes, store)
            jobs = check(jobs, to_run, display, sweep)
            to_run = [job for job in jobs if job.action in ("run", "retry")]
        signals.raising = False
        settled = Runner(store, display, engine="ray").run([j for j in jobs if j not in to_run])
        driver = Driver(store, display, order, nodes, there)
        for job in to_run:
            driver.submit(job, requests[job.key])
        driver.follow(signals)
    entries = settled.entries | driver.entries
    return jobs, Finished(entries, next(iter(signals.received), settled.stopped_by))


def plan(sweep: Sweep, nodes: Sequence[Node], there: Sequence[Entry]) -> list[Job]:
    """The jobs, under the rules for a node of the cluster; `there` are all records.

    Which kind of machine a task comes to is known when it gets there, so a record counts as this
    cluster's when its software is that of here and it used a GPU if there are GPUs.
    """
    gpus = has_gpus(nodes)
    # How many devices and machines there are is asked of Ray (`asked`).
    machine = Machine(has_gpu=gpus, packages=provenance.stack().packages, nodes=None)
    found = {entry.directory.name: entry for entry in there}
    return plan_jobs(
        sweep.cells, found, sweep.retry, sweep.score_base, machine, counts=counting(gpus)
    )


@dataclass
class Task:
    """A cell that was given to Ray. `losses` counts the nodes and workers that died under it."""

    job: Job
    request: Asked
    began: float
    started: bool = False
    losses: int = 0


class Driver:
    """Gives cells to Ray and waits for what becomes of them. `there` are the records that the plan
    was made from, `entries` those that come, by key."""

    def __init__(
        self,
        store: Store,
        display: Display,
        order: Order,
        nodes: Sequence[Node],
        there: Sequence[Entry],
    ) -> None:
        self.store = store
        self.display = display
        self.order = order
        self.nodes = nodes
        self.tasks: dict[Any, Task] = {}
        self.entries: dict[str, Entry] = {}
        self.error: UserError | None = None
        self.looked = float("-inf")
        self.attempts: dict[str, dict[str, int]] = {}
        for entry in there:
            own = self.attempts.setdefault(entry.record.cell_id, {})
            key = record_key(entry.record.cell_id, entry.record.stack_id)
            own[key] = max(own.get(key, 0), entry.record.attempt)

    def submit(self, job: Job, request: Asked) -> None:
        """Give Ray the cell of a job."""
        self._start(Task(job, request, time.monotonic()))

    def _start(self, task: Task) -> None:
        import ray

        own_threads = os.environ.get("OMP_NUM_THREADS")
        cores = int(task.request.resources.get("CPU", 0))
        order = dataclasses.replace(
            self.order,
            cell=task.job.cell.model_dump_json(),
            label=task.job.label,
            attempts=self.attempts.get(task.job.cell.cell_id, {}),
            cpus=cores if cores and task.request.device == "CPU" and not own_threads else None,
        )
        errand = Errand(
            order=order,
            variables={"OMP_NUM_THREADS": own_threads},
            resource=task.request.device,
            amount=task.request.resources[task.request.device],
            whole={n.node_id: n.resources.get(task.request.device, 0) for n in self.nodes},
        )
        # What a cell does is a result; what happens to its node is for `_lost`.
        remote = ray.remote(run_errand).options(
            **task.request.options(), max_retries=0, name=f"tunebench {task.job.label}"
        )
        self.tasks[remote.remote(errand)] = task

    def follow(self, signals: Signals) -> None:
        """Until every task has ended. The first signal cancels what waits and asks what runs to
        write its record; the second leaves at once. Raises UserError when a node cannot write
        results."""
        import ray

        self.display.begin([task.job for task in self.tasks.values()])
        stop_at: float | None = None
        while self.tasks:
            ended, _ = ray.wait(list(self.tasks), timeout=POLL_SECONDS)
            for reference in ended:
                self._end(reference, self.tasks.pop(reference), stop_at is not None)
            if stop_at is None and (signals.received or self.error):
                stop_at = time.monotonic() + GRACE_SECONDS + REPORT_SECONDS
                for reference in self.tasks:
                    ray.cancel(reference, force=False)
            if stop_at is not None and (len(signals.received) > 1 or time.monotonic() > stop_at):
                break
            self._look()
        if self.error is not None:
            raise self.error

    def _look(self) -> None:
        """Show how the running cells are getting on."""
        if time.monotonic() - self.looked < FILES_SECONDS:
            return
        self.looked = time.monotonic()
        short = {task.job.cell.cell_id[:12]: task for task in self.tasks.values()}
        for seen in running(self.store, lambda key: key[:12] in short):
            task = short[seen.key[:12]]
            if not seen.held:
                continue
            if not task.started:
                task.started, task.began = True, time.monotonic()
                self.display.cell_started(task.job)
            self.display.update(task.job, seen.progress)

    def _end(self, reference: Any, task: Task, stopping: bool) -> None:
        import ray

        try:
            answer = ray.get(reference)
        except ray.exceptions.TaskCancelledError:
            return  # it had not begun
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, ProcessDied):
                raise RuntimeError(f"{task.job.label} broke on its node:\n{error}") from error
            self._lost(task, error.cause, stopping)
            return
        except ray.exceptions.RayError as error:
            self._lost(task, error, stopping)
            return
        if "error" in answer:
            self.error = UserError(answer["error"])
        elif "broken" in answer:
            raise RuntimeError(f"{task.job.label} broke on its node:\n{answer['broken']}")
        else:
            self._reported(task, Report(**answer["report"]))

    def _reported(self, task: Task, report: Report) -> None:
        if report.directory is None:
            return  # stopped before it began
        entry = _entry(Path(report.directory))
        self.entries[task.job.key] = entry
        self.display.cell_finished(task.job, entry.record, time.monotonic() - task.began)

    def _lost(self, task: Task, error: Exception, stopping: bool) -> None:
        """A task whose node or process died: again, unless that has happened too often."""
        task.losses += 1
        again = task.losses <= RESTARTS and not stopping
        then = "it starts again" if again else "given up; the same command runs it again"
        self.display.message(
            f"{task.job.cell.cell_id[:12]} {task.job.label}: {_why(error)}; {then}"
        )
        if again:
            task.started = False
            self._start(task)
        else:
            self._keep_what_is_left(task)

    def _keep_what_is_left(self, task: Task) -> None:
        """Publish what the dead attempts of a cell have left, unless a runner has it."""
        short = task.job.cell.cell_id[:12]
        for key in {seen.key for seen in running(self.store, lambda key: key.startswith(short))}:
            with self.store.claim(key) as claimed:
                for entry in self.store.recover(key, finish_abandoned) if claimed else ():
                    self.entries[task.job.key] = entry


def _entry(directory: Path) -> Entry:
    """What a node has just published, once the shared file system shows it here."""
    until = time.monotonic() + SETTLE_SECONDS
    while not (directory / "record.json").exists() and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    return Entry(directory, read_record(directory / "record.json"))


def _why(error: Exception) -> str:
    """What died, in a few words."""
    from ray import exceptions

    if isinstance(error, exceptions.NodeDiedError):
        return "its node died"
    if isinstance(error, exceptions.OutOfMemoryError):
        return "Ray killed it as the node's memory ran out"
    said = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"its process died ({said[-1].strip() if said else type(error).__name__})"
