"""The task of a SLURM job: it runs one cell, and puts the job back into the queue when the cell is
cut short.

submitit pickles the task by the name of its class, and starts it with
`python -m submitit.core._submit` on every node of the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from harness.records import provenance
from harness.records.record import Record
from harness.records.store import Store
from launch.cells.devices import granted_devices
from launch.cells.other_machines import follow
from launch.cells.start import Rendezvous
from launch.engines.order import Order, run_cell
from launch.engines.slurm import queue
from launch.engines.slurm.queue import NoAnswer, minutes, run_command
from launch.processes.workers import free_port
from matrices.cell import Cell
from matrices.errors import UserError

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

# submitit's default: SLURM sends a signal this long before the job's limit (seconds).
NOTICE_SECONDS = 90
# man sbatch, --signal: SLURM may send it up to 60 seconds earlier.
EARLY_SECONDS = 60
FIRST_PORT, PORTS = 10_000, 20_000


class CellTask:
    """Runs the cell of one order. A time-out may put the job back into the queue `requeues` more
    times; preemption always does."""

    def __init__(self, order: str, requeues: int) -> None:
        self.order = order
        self.requeues = requeues

    def __call__(self) -> dict[str, Any]:
        """The report of the cell. Does not return when the job goes back into the queue."""
        own = {"job": job_name(os.environ), "cpus": cpus_given(os.environ)}
        order = Order(**json.loads(self.order) | own)
        nodes, node = int(os.environ["SLURM_JOB_NUM_NODES"]), int(os.environ["SLURM_NODEID"])
        if node > 0:
            return {"exit_code": join(order, node)}
        notice = EndNotice(self.requeues)
        submitit_handler = signal.signal(signal.SIGUSR2, notice.handle)
        report = run_cell(order, notice.explain, rendezvous(order) if nodes > 1 else None)
        if notice.received and notice.goes_on and callable(submitit_handler):
            self.requeues -= notice.timed_out
            # submitit pickles the task again (`checkpoint`), has SLURM requeue the job, and exits.
            # The record of this attempt is published already.
            submitit_handler(signal.SIGUSR2, None)
        if report.status is None:
            print("tunebench: the job was ended before the cell began", file=sys.stderr)
        return report.as_json()

    def checkpoint(self) -> DelayedSubmission:
        """The task of the requeued job (submitit calls this)."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(CellTask(self.order, self.requeues))


class EndNotice:
    """SLURM's SIGUSR2: the job has to end, because its time is up or it is preempted."""

    def __init__(self, requeues: int) -> None:
        self.requeues = requeues
        self.received = False
        self.timed_out = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            return
        self.received = True
        self.timed_out = time_is_up()
        os.kill(os.getpid(), signal.SIGTERM)  # the runner's own signal to stop

    @property
    def goes_on(self) -> bool:
        return not self.timed_out or self.requeues > 0

    def explain(self, record: Record) -> Record:
        """The record of a stopped cell, with the reason."""
        if not self.received:
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
    """Threads for the cell on this node: SLURM's number for the job, or less if the user or the
    cores of the machine limit them."""
    return min(int(environment["SLURM_CPUS_ON_NODE"]), provenance.cpu_threads())


def rendezvous(order: Order) -> Rendezvous:
    """The rendezvous of this job's machines: this node, by SLURM's address of it. Raises UserError
    when SLURM does not answer or no port is free."""
    try:
        first = queue.first_node(os.environ["SLURM_JOB_NODELIST"])
        address = queue.node_address(first)
    except NoAnswer as error:
        raise UserError(f"SLURM does not give the address of this node: {error}") from error
    number = int(os.environ["SLURM_JOB_ID"])
    # Below the ports that Linux gives to outgoing connections.
    for port in (FIRST_PORT + (number + step) % PORTS for step in range(PORTS)):
        with contextlib.suppress(UserError):
            return Rendezvous(address, free_port(port), order.job or "")
    raise UserError(f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free")


def join(order: Order, node: int) -> int:
    """Run this node's ranks of a cell on several nodes; gives 0 when they ended well. Raises
    UserError when the first node does not begin."""
    cell = Cell.model_validate_json(order.cell)
    grant = granted_devices(order.cpus, bool(order.exclusive))
    return follow(Store(Path(order.results)), cell, order.job or "", node, grant)


def time_is_up() -> bool:
    """Whether this job is about to reach its time limit. Yes if SLURM does not answer, so that no
    cell is requeued for ever."""
    try:
        left = run_command(
            "squeue", "--noheader", "--job", os.environ["SLURM_JOB_ID"], "-o", "%L"
        ).strip()
    except NoAnswer as error:
        print(f"tunebench: {error}", file=sys.stderr)
        return True
    if not left[:1].isdigit():
        return left != "UNLIMITED"
    return minutes(left) * 60 <= NOTICE_SECONDS + EARLY_SECONDS
