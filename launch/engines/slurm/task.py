"""What runs on the nodes of a SLURM job: one cell, put back into the queue when it is cut short.

submitit pickles the task by the name of its class, with strings and numbers in it, and starts it
with `python -m submitit.core._submit` on every node of the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from harness.records import provenance
from harness.records.record import Record
from harness.records.store import Store
from launch.cells.devices import given
from launch.cells.other_machines import follow
from launch.cells.start import RENDEZVOUS_FILE, Rendezvous
from launch.engines.order import Order, run_cell
from launch.engines.slurm import queue
from launch.engines.slurm.queue import NoAnswer, ask, minutes
from launch.processes.server import start_server
from launch.processes.workers import free_port
from matrices.cell import Cell
from matrices.errors import UserError

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

# submitit's default: the job is told this long before its limit that it is to end (seconds).
NOTICE_SECONDS = 90
# man sbatch, --signal: SLURM may send it up to 60 seconds earlier.
EARLY_SECONDS = 60
# Longest wait for the first node of a job to begin.
START_SECONDS = 600.0
FIRST_PORT, PORTS = 10_000, 20_000


class CellTask:
    """Runs the cell of one order. `requeues` counts how often a time-out may still put the job
    back into the queue; having to make way always does."""

    def __init__(self, order: str, requeues: int) -> None:
        self.order = order
        self.requeues = requeues

    def __call__(self) -> dict[str, Any]:
        """What became of the cell. Does not return when the job goes back into the queue."""
        ours = {"job": job_name(os.environ), "cpus": cpus_given(os.environ)}
        order = Order(**json.loads(self.order) | ours)
        nodes, node = int(os.environ["SLURM_JOB_NUM_NODES"]), int(os.environ["SLURM_NODEID"])
        if node > 0:
            return {"exit_code": join(order, node)}
        notice = Notice(self.requeues)
        submitits = signal.signal(signal.SIGUSR2, notice.handle)
        report = run_cell(order, notice.stopped, rendezvous(order) if nodes > 1 else None)
        if notice.came and notice.goes_on and callable(submitits):
            self.requeues -= notice.timed_out
            # submitit writes the task down anew (`checkpoint`), asks SLURM to requeue the job and
            # leaves; the record of the attempt is published by now.
            submitits(signal.SIGUSR2, None)
        if report.status is None:
            print("tunebench: the job was ended before the cell began", file=sys.stderr)
        return report.as_json()

    def checkpoint(self) -> DelayedSubmission:
        """The task that the requeued job starts with (submitit calls it)."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(CellTask(self.order, self.requeues))


def announced(store: Store, cell: Cell, job: str) -> tuple[str, Rendezvous] | None:
    """Where the first node of this start of the job waits, once it does, and its key of the cell:
    it may have other processors than this one."""
    for key, working in store.abandoned():
        if not key.startswith(cell.cell_id[:12]):
            continue
        try:
            found = Rendezvous(**json.loads((working / RENDEZVOUS_FILE).read_text()))
        except (OSError, ValueError):
            continue  # not written yet, or published meanwhile
        if found.job == job:
            return key, found
    return None


class Notice:
    """SIGUSR2, by which SLURM says that the job has to end: its time is up, or another job needs
    the node."""

    def __init__(self, requeues: int) -> None:
        self.requeues = requeues
        self.came = False
        self.timed_out = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            return
        self.came = True
        self.timed_out = time_is_up()
        os.kill(os.getpid(), signal.SIGTERM)  # the runner's own signal to stop

    @property
    def goes_on(self) -> bool:
        return not self.timed_out or self.requeues > 0

    def stopped(self, record: Record) -> Record:
        """The record of a cell that was stopped, with why."""
        if not self.came:
            return record.model_copy(update={"reason": "the SLURM job was ended (SIGTERM)"})
        if not self.timed_out:
            why = "the SLURM job has to make way: back in the queue"
            return record.model_copy(update={"reason": why})
        if self.goes_on:
            why = "the time limit of the SLURM job is reached: back in the queue"
            return record.model_copy(update={"reason": why})
        why = "the time limit of the SLURM job is reached, not for the first time"
        return record.model_copy(update={"status": "timeout", "reason": why})


def job_name(environment: Mapping[str, str]) -> str:
    """SLURM's name of this start of a job: `12_0`, and `12_0.1` once it was requeued."""
    array, index = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    name = f"{array}_{index}" if array and index else environment["SLURM_JOB_ID"]
    restarts = environment.get("SLURM_RESTART_COUNT", "0")
    return name if restarts == "0" else f"{name}.{restarts}"


def cpus_given(environment: Mapping[str, str]) -> int:
    """Threads for the cell on this node: of what SLURM has given to the job, or less if the user
    or the cores of the machine say so."""
    return min(int(environment["SLURM_CPUS_ON_NODE"]), provenance.cpu_threads())


def rendezvous(order: Order) -> Rendezvous:
    """Where this job's machines meet: on this one, by SLURM's address of it, since the names of
    nodes need not resolve. Raises UserError when SLURM does not tell or no port is free."""
    try:
        first = queue.first_node(os.environ["SLURM_JOB_NODELIST"])
        address = queue.node_address(first)
    except NoAnswer as error:
        raise UserError(f"the address of this node is not to be had: {error}") from error
    number = int(os.environ["SLURM_JOB_ID"])
    # Below the ports that Linux gives to outgoing connections.
    for port in (FIRST_PORT + (number + step) % PORTS for step in range(PORTS)):
        with contextlib.suppress(UserError):
            return Rendezvous(address, free_port(port), order.job or "")
    raise UserError(f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free")


def join(order: Order, node: int) -> int:
    """Run this node's ranks of a cell on several; 0 when they ended well. Raises UserError when
    the first node has not begun within START_SECONDS."""
    cell = Cell.model_validate_json(order.cell)
    store = Store(Path(order.results))
    start_server(["harness.worker"])  # imports the stack while the first node does the same
    until = time.monotonic() + START_SECONDS
    while (found := announced(store, cell, order.job or "")) is None:
        if time.monotonic() > until:
            raise UserError(
                f"the first node has not begun {cell.cell_id[:12]} within {START_SECONDS:g} s; do "
                f"all nodes see {store.root}?"
            )
        time.sleep(1.0)
    key, meeting = found
    return follow(store, key, meeting, node, given(order.cpus, bool(order.exclusive)))


def time_is_up() -> bool:
    """Whether this job is about to reach its time limit. Without an answer: yes, so that a cell
    does not come back for ever."""
    try:
        left = ask("squeue", "--noheader", "--job", os.environ["SLURM_JOB_ID"], "-o", "%L").strip()
    except NoAnswer as error:
        print(f"tunebench: {error}", file=sys.stderr)
        return True
    if not left[:1].isdigit():
        return left != "UNLIMITED"
    return minutes(left) * 60 <= NOTICE_SECONDS + EARLY_SECONDS
