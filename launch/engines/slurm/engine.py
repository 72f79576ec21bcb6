"""`tunebench run --on slurm`: plan here, check here, submit, and watch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from harness.records.store import Entry, Store
from launch.cells.runner import Finished, Runner
from launch.display.progress import Display
from launch.engines import remote_plan
from launch.engines.order import Order
from launch.engines.results_watch import Published
from launch.engines.slurm import queue, submit
from launch.engines.slurm.queue import JobState, NoAnswer, Partition
from launch.engines.slurm.submit import Array, Resources
from launch.engines.slurm.watch import Watched, Watcher, answers
from launch.planning.left_out import quickly_checked
from launch.planning.plan import Job, Sweep, plan_jobs
from launch.processes.stop_signals import stop_signals
from matrices.errors import UserError


def run_on_slurm(
    sweep: Sweep, order: Order, asked: Resources, display: Display
) -> tuple[list[Job], Finished]:
    """Run the cells of a sweep as SLURM jobs and wait for them.

    `order` is what all their orders have in common. Jobs outlive this process: the same call goes
    on with those that are still queued. Raises UserError and ProblemsFound before anything is
    submitted, and Stopped when stopped before that.
    """
    queue.require_slurm()
    order = dataclasses.replace(order, exclusive=asked.exclusive)
    on = queue.partition(asked.partition)
    store = Store(sweep.results)
    store.check()
    entries = Published(store).new()
    jobs = plan_jobs(
        sweep.cells,
        {entry.directory.name: entry for entry in entries},
        sweep.retry,
        sweep.score_base,
        submit.machine(on),
        counts=remote_plan.counting(submit.on_gpu(on)),
    )
    jobs = quickly_checked(jobs, display, sweep)
    to_run = [job for job in jobs if job.action in ("run", "retry")]
    submit.check_fits(to_run, on, asked)
    with stop_signals() as signals:
        if to_run:
            there = queued(store, to_run)
            new = [job for job in to_run if job.cell.cell_id not in there]
            jobs = remote_plan.check(jobs, new, display, sweep) if new else jobs
            to_run = [job for job in jobs if job.action in ("run", "retry")]
        signals.raising = False
        settled = Runner(store, display).run([job for job in jobs if job not in to_run])
        watcher = Watcher(store, display, on, {})
        if to_run and not signals.received:
            watcher.waiting = _submit(store, to_run, entries, order, on, asked, display)
        watcher.watch(signals)
    if signals.received and watcher.waiting:
        display.message(
            "the SLURM jobs go on without this command: "
            f"'tunebench status {sweep.results}' shows them, "
            f"'scancel {' '.join(watcher.jobs_left())}' cancels them, and the same command watches "
            "them again"
        )
    found = settled.entries | watcher.entries
    return jobs, Finished(found, next(iter(signals.received), settled.stopped_by))


def queued(store: Store, jobs: Sequence[Job]) -> dict[str, tuple[Array, JobState]]:
    """The jobs that are in the queue already, by cell_id. Raises UserError without an answer."""
    try:
        return submit.queued(store, [job.cell.cell_id for job in jobs])
    except NoAnswer as error:
        raise UserError(f"SLURM does not answer: {error}") from error


def _submit(
    store: Store,
    jobs: Sequence[Job],
    entries: Sequence[Entry],
    order: Order,
    on: Partition,
    asked: Resources,
    display: Display,
) -> dict[str, Watched]:
    """Submit what is not in the queue yet; everything to wait for, by cell_id."""
    attempts: dict[str, dict[str, int]] = {}
    for entry in entries:
        known = attempts.setdefault(entry.record.cell_id, {})
        key = entry.directory.name.split(".")[0]
        known[key] = max(known.get(key, 0), entry.record.attempt)
    with submit.submitting(store):
        there = queued(store, jobs)
        # A job that ended since the plan was made has published its record before it left.
        late = {
            entry.record.cell_id
            for entry in Published(store).new()
            if answers(entry, attempts.get(entry.record.cell_id, {}), on)
        }
        new = [job for job in jobs if job.cell.cell_id not in there.keys() | late]
        arrays = submit.submit(store, new, order, attempts, on, asked) if new else {}
    if there:
        display.message(f"{len(there)} cells are in SLURM's queue from an earlier run")
    for job_id, array in arrays.items():
        cells = f"{len(array.cells)} cell{'' if len(array.cells) == 1 else 's'}"
        display.message(f"submitted {cells} to partition {on.name} as SLURM job {job_id}")
    places = {
        cell: (array, index) for array in arrays.values() for index, cell in enumerate(array.cells)
    }
    places |= {cell: (array, array.cells.index(cell)) for cell, (array, _) in there.items()}
    numbers = {cell: job_id for job_id, array in arrays.items() for cell in array.cells}
    waiting = {}
    for job in jobs:
        cell_id = job.cell.cell_id
        array, index = places.get(cell_id, (Array("", (), ()), 0))
        state = there[cell_id][1] if cell_id in there else None
        seen = attempts.get(cell_id, {})
        waiting[cell_id] = Watched(job, array, index, seen, state, numbers.get(cell_id))
    return waiting
