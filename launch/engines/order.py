"""One cell as a task on a machine that an engine chose: the same runner as `tunebench run` there.

The results directory is shared, so claims, attempts and records are those of every other runner of
that directory, whatever started it.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness.ranks.launch_command import threads_per_process
from harness.records.record import Record
from harness.records.store import Entry, Store
from launch.cells import start
from launch.cells.devices import given
from launch.cells.runner import Runner
from launch.cells.start import Rendezvous
from launch.display.progress import PlainDisplay
from launch.planning.plan import Job, key_of, plan_jobs, this_machine
from launch.predict.run_predictions import predict_run
from launch.processes.stop_signals import Stopped
from matrices.cell import Cell


@dataclass(frozen=True)
class Order:
    """One cell to run, as it travels to the machine: strings and numbers only.

    `attempts` are the attempts at the cell that were there when it was ordered, by key: one that
    has come since is a result and not repeated. `timeout` and `phase_timeout` are seconds, `cpus`
    the processors the engine gives the cell (none: all this process may use).
    """

    results: str
    cell: str
    engine: start.Engine = "local"
    job: str | None = None
    label: str = ""
    attempts: Mapping[str, int] = field(default_factory=dict)
    timeout: float | None = None
    phase_timeout: float | None = None
    predict: bool = True
    skip_predicted_oom: bool = False
    cpus: int | None = None
    exclusive: bool | None = None


@dataclass(frozen=True)
class Report:
    """What became of an order. `status` is none when there is no record of it: the runner was
    stopped before the cell began. `stopped_by` is the signal that stopped it."""

    cell_id: str
    host: str
    status: str | None = None
    reason: str | None = None
    directory: str | None = None
    stopped_by: int | None = None

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run_cell(
    order: Order,
    stopped: Callable[[Record], Record] | None = None,
    rendezvous: Rendezvous | None = None,
) -> Report:
    """Run the order's cell on this machine, unless it has been measured since it was ordered.

    Takes the place of `tunebench run` for one cell: call it in the main thread of its process, as
    it listens to SIGTERM while it runs. `stopped` writes into the record of a cell that was
    stopped why the engine did so, `rendezvous` is where the machines of a cell on several meet.
    Raises UserError when the results directory cannot be written from here.
    """
    cell = Cell.model_validate_json(order.cell)
    store = Store(Path(order.results))
    grant = given(order.cpus, bool(order.exclusive))
    job = _job(order, cell, store)
    display = PlainDisplay()
    runner = Runner(
        store,
        display,
        limit_seconds=order.timeout,
        preflight=None,  # models, data and tasks were checked, and fetched, before the order
        phase_seconds=order.phase_timeout,
        engine=order.engine,
        job=order.job,
        grant=grant,
        rendezvous=rendezvous,
        stopped=stopped,
    )
    if order.predict:
        runner.foretell = partial(predict_run, display=display, skip=order.skip_predicted_oom)
    try:
        finished = runner.run([job])
    except Stopped as signal:
        return Report(cell.cell_id, socket.gethostname(), stopped_by=signal.number)
    finally:
        display.close()
    return _report(cell, finished.entries.get(job.key), finished.stopped_by)


def _job(order: Order, cell: Cell, store: Store) -> Job:
    """The cell's job on this machine and stack. The attempt that was there when the cell was
    ordered is what the order repeats; a later one is its answer."""
    key = key_of(cell, threads_per_process(cell, order.cpus))
    last = store.latest_of(key)
    # The engine has gathered as many machines as the cell is for.
    machine = dataclasses.replace(this_machine(), nodes=cell.nodes)
    [job] = plan_jobs(
        [cell],
        {key: last} if last else {},
        score_base=False,
        machine=machine,
        cores=lambda _: order.cpus,
    )
    seen = order.attempts.get(key, 0)
    asked_again = job.action == "keep" and last is not None and last.record.attempt <= seen
    return dataclasses.replace(
        job,
        label=order.label or job.label,
        action="retry" if asked_again else job.action,
        seen_attempt=seen,
    )


def _report(cell: Cell, entry: Entry | None, stopped_by: int | None) -> Report:
    if entry is None:
        return Report(cell.cell_id, socket.gethostname(), stopped_by=stopped_by)
    record = entry.record
    return Report(
        cell.cell_id,
        socket.gethostname(),
        record.status,
        record.reason,
        str(entry.directory),
        stopped_by,
    )
