"""SLURM as an engine: an order is a task of a job array, which outlives this command."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from harness.records.store import Store
from launch.cells import start
from launch.cells.finish import last_line
from launch.display.progress import Display
from launch.engines.engine import NoAnswer, OrderState
from launch.engines.order import Order
from launch.engines.slurm import queue, submit
from launch.engines.slurm.queue import JobState, Partition
from launch.engines.slurm.submit import Array, JobResources
from launch.planning.plan import Job
from matrices.errors import UserError


class SlurmEngine:
    """One partition of a SLURM cluster. `tasks` gives a cell's array and index in it, `last_states`
    its last state in the queue. `numbers` are SLURM's ids of the submitted arrays."""

    name: start.EngineName = "slurm"
    title = "SLURM"
    poll_seconds = 5.0

    def __init__(
        self, results: Path, display: Display, partition: Partition, resources: JobResources
    ) -> None:
        self.results, self.store = results, Store(results)
        self.display, self.partition, self.resources = display, partition, resources
        self.tasks: dict[str, tuple[Array, int]] = {}
        self.last_states: dict[str, JobState] = {}
        self.numbers: dict[str, str] = {}

    @property
    def gpus(self) -> bool:
        return submit.on_gpu(self.partition)

    def check(self, jobs: Sequence[Job]) -> None:
        submit.check_fits(jobs, self.partition, self.resources)

    def queued(self, cells: Sequence[str]) -> dict[str, OrderState]:
        try:
            found = submit.queued(self.store, cells)
        except NoAnswer as error:
            raise UserError(f"SLURM does not answer: {error}") from error
        for cell, (array, state) in found.items():
            self.tasks[cell] = (array, array.cells.index(cell))
            self.last_states[cell] = state
        return {cell: _order_state(state) for cell, (_, state) in found.items()}

    def submission_lock(self) -> FileLock:
        return submit.submission_lock(self.store)

    def submit(self, orders: Mapping[str, Order]) -> dict[str, OrderState]:
        exclusive = self.resources.exclusive
        full = {c: dataclasses.replace(o, exclusive=exclusive) for c, o in orders.items()}
        for number, array in submit.submit(
            self.store, full, self.partition, self.resources
        ).items():
            self.numbers[array.name] = number
            self.tasks |= {cell: (array, index) for index, cell in enumerate(array.cells)}
            cells = f"{len(array.cells)} cell{'' if len(array.cells) == 1 else 's'}"
            self.display.message(
                f"submitted {cells} to partition {self.partition.name} as SLURM job {number}"
            )
        return {cell: OrderState("waiting", queue_text="submitted") for cell in orders}

    def poll(self) -> dict[str, OrderState]:
        states = queue.queue(array.name for array, _ in self.tasks.values())
        found = {}
        for cell, (array, index) in self.tasks.items():
            state = states.get((array.name, index))
            if state is not None:
                self.last_states[cell] = state
            found[cell] = _order_state(self.last_states.get(cell), gone=state is None)
        return found

    def cancel(self, cells: Sequence[str]) -> str:
        arrays = [
            self.last_states[cell].job.split("_")[0]
            if cell in self.last_states
            else self.numbers[self.tasks[cell][0].name]
            for cell in cells
            if cell in self.tasks
        ]
        return (
            "the SLURM jobs go on without this command: "
            f"'tunebench status {self.results}' shows them, "
            f"'scancel {' '.join(dict.fromkeys(arrays))}' cancels them, and the same command "
            "watches them again"
        )

    def ending(self, cell: str) -> tuple[str, str]:
        array, index = self.tasks[cell]
        state = self.last_states.get(cell)
        log = next(iter(submit.logs(self.store, array, index)), None)
        last = last_line(log) if log is not None else "it wrote no log: can the node see it all?"
        sentence = (
            f"SLURM job {state.job if state else array.name} ended as {how_ended(state)} without a "
            f"finished record{f' ({last})' if last else ''}"
        )
        return f"SLURM: {how_ended(state)}", sentence


def slurm_engine(results: Path, display: Display, resources: JobResources) -> SlurmEngine:
    """An engine on the partition of `resources`. Raises UserError without SLURM or without such a
    partition."""
    queue.require_slurm()
    return SlurmEngine(results, display, queue.partition(resources.partition), resources)


def _order_state(last: JobState | None, gone: bool = False) -> OrderState:
    """The state of an order, from the last state of its task in the queue. `gone`: the queue does
    not list the task any more."""
    if last is None:
        return OrderState("ended", queue_text="submitted")
    text = "running" if last.unfinished else "ended"
    if last.waiting:
        text = f"waiting ({last.reason})" if last.reason else "waiting"
    if gone or not last.unfinished:
        return OrderState("ended", last.job, text)
    return OrderState("waiting" if last.waiting else "running", last.job, text)


def how_ended(last: JobState | None) -> str:
    """SLURM's word for how a job ended, with its nodes."""
    if last is None:
        return "unknown to the queue"
    if last.unfinished:  # the queue does not list it any more
        found = queue.ended_states([last.job]).get(last.job)
        last = found or JobState(last.job, f"gone (last {last.state})", nodes=last.nodes)
    return f"{last.state} on {last.nodes}" if last.nodes else last.state
