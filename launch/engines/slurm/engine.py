"""SLURM as an engine: an order is a task of a job array, which outlives this command."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from harness.records.store import Store
from launch.cells import start
from launch.display.progress import Display
from launch.engines.engine import NoAnswer, State
from launch.engines.order import Order
from launch.engines.slurm import queue, submit
from launch.engines.slurm.queue import JobState, Partition
from launch.engines.slurm.submit import Array, Resources
from launch.planning.plan import Job
from matrices.errors import UserError


class SlurmEngine:
    """One partition of a SLURM cluster. `tasks` are the arrays and places in them of the cells
    that were submitted or found, `seen` what the queue last told of them; `numbers` are SLURM's ids
    of what was submitted, by array."""

    name: start.Engine = "slurm"
    title = "SLURM"
    poll_seconds = 5.0

    def __init__(self, results: Path, display: Display, on: Partition, asked: Resources) -> None:
        self.results, self.store = results, Store(results)
        self.display, self.on, self.asked = display, on, asked
        self.tasks: dict[str, tuple[Array, int]] = {}
        self.seen: dict[str, JobState] = {}
        self.numbers: dict[str, str] = {}

    @property
    def gpus(self) -> bool:
        return submit.on_gpu(self.on)

    def check(self, jobs: Sequence[Job]) -> None:
        submit.check_fits(jobs, self.on, self.asked)

    def queued(self, cells: Sequence[str]) -> dict[str, State]:
        try:
            found = submit.queued(self.store, cells)
        except NoAnswer as error:
            raise UserError(f"SLURM does not answer: {error}") from error
        for cell, (array, state) in found.items():
            self.tasks[cell] = (array, array.cells.index(cell))
            self.seen[cell] = state
        return {cell: _state(state) for cell, (_, state) in found.items()}

    def adding(self) -> FileLock:
        return submit.submitting(self.store)

    def submit(self, orders: Mapping[str, Order]) -> dict[str, State]:
        exclusive = self.asked.exclusive
        full = {c: dataclasses.replace(o, exclusive=exclusive) for c, o in orders.items()}
        for number, array in submit.submit(self.store, full, self.on, self.asked).items():
            self.numbers[array.name] = number
            self.tasks |= {cell: (array, index) for index, cell in enumerate(array.cells)}
            cells = f"{len(array.cells)} cell{'' if len(array.cells) == 1 else 's'}"
            self.display.message(
                f"submitted {cells} to partition {self.on.name} as SLURM job {number}"
            )
        return {cell: State("waiting", told="submitted") for cell in orders}

    def poll(self) -> dict[str, State]:
        states = queue.queue(array.name for array, _ in self.tasks.values())
        found = {}
        for cell, (array, index) in self.tasks.items():
            state = states.get((array.name, index))
            if state is not None:
                self.seen[cell] = state
            found[cell] = _state(self.seen.get(cell), gone=state is None)
        return found

    def cancel(self, cells: Sequence[str]) -> str:
        arrays = [
            self.seen[cell].job.split("_")[0]
            if cell in self.seen
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
        seen = self.seen.get(cell)
        log = next(iter(submit.logs(self.store, array, index)), None)
        said = last_line(log) if log is not None else "it wrote no log: can the node see it all?"
        sentence = (
            f"SLURM job {seen.job if seen else array.name} ended as {how_ended(seen)} without a "
            f"finished record{f' ({said})' if said else ''}"
        )
        return f"SLURM: {how_ended(seen)}", sentence


def slurm_engine(results: Path, display: Display, asked: Resources) -> SlurmEngine:
    """The partition that is asked for. Raises UserError when SLURM is not here or it has none."""
    queue.require_slurm()
    return SlurmEngine(results, display, queue.partition(asked.partition), asked)


def _state(seen: JobState | None, gone: bool = False) -> State:
    """What the queue tells of a task, or last told before it had `gone`."""
    if seen is None:
        return State("ended", told="submitted")
    told = "running" if seen.unfinished else "ended"
    if seen.waiting:
        told = f"waiting ({seen.reason})" if seen.reason else "waiting"
    if gone or not seen.unfinished:
        return State("ended", seen.job, told)
    return State("waiting" if seen.waiting else "running", seen.job, told)


def how_ended(seen: JobState | None) -> str:
    """SLURM's word for how a job ended, with the nodes it was on."""
    if seen is None:
        return "unknown to the queue"
    if seen.unfinished:  # forgotten by the queue since it was last seen
        found = queue.ended_states([seen.job]).get(seen.job)
        seen = found or JobState(seen.job, f"gone (last {seen.state})", nodes=seen.nodes)
    return f"{seen.state} on {seen.nodes}" if seen.nodes else seen.state


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
