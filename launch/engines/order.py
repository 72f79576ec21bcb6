"""An order: one cell, run on a machine that an engine chose by the runner of `tunebench run`.

The machines share the results directory, so the runners share claims, attempts and records.
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
from launch.cells.devices import granted_devices
from launch.cells.runner import Runner
from launch.cells.start import Rendezvous
from launch.display.progress import PlainDisplay
from launch.planning.plan import Job, key_of, plan_jobs, this_machine
from launch.predict.run_predictions import predict_run
from launch.processes.stop_signals import Stopped
from matrices.cell import Cell


@dataclass(frozen=True)
class Order:
    """One cell to run, as sent to its machine: strings and numbers only.

    `attempts` are the numbers of the cell's attempts when it was ordered, by key: a later attempt
    is a result and is not repeated. `timeout` and `phase_timeout` are seconds. `cpus` are the
    processors that the engine gives the cell (none: all that the process may use).
    """

    results: str
    cell: str
    engine: start.EngineName = "local"
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
    """The result of an order. `status` is none without a record: the runner was stopped before the
    cell began. `stopped_by` is the signal that stopped it."""

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
    explain_stop: Callable[[Record], Record] | None = None,
    rendezvous: Rendezvous | None = None,
) -> Report:
    """Run the order's cell on this machine, unless it was measured after it was ordered.

    Call it in the main thread: it handles SIGTERM while it runs. `explain_stop` adds the engine's
    reason to the record of a cell that was stopped. `rendezvous` is where the machines of a cell on
    several nodes meet. Raises UserError when this machine cannot write the results directory.
    """
    cell = Cell.model_validate_json(order.cell)
    store = Store(Path(order.results))
    grant = granted_devices(order.cpus, bool(order.exclusive))
    job = _job(order, cell, store)
    display = PlainDisplay()
    runner = Runner(
        store,
        display,
        limit_seconds=order.timeout,
        preflight=None,  # the loop checked and fetched models, data and tasks
        phase_seconds=order.phase_timeout,
        engine=order.engine,
        job=order.job,
        grant=grant,
        rendezvous=rendezvous,
        explain_stop=explain_stop,
    )
    if order.predict:
        runner.predict = partial(predict_run, display=display, skip=order.skip_predicted_oom)
    try:
        finished = runner.run([job])
    except Stopped as signal:
        return Report(cell.cell_id, socket.gethostname(), stopped_by=signal.number)
    finally:
        display.close()
    return _report(cell, finished.entries.get(job.key), finished.stopped_by)


def _job(order: Order, cell: Cell, store: Store) -> Job:
    """The cell's job on this machine and stack. The order repeats an attempt that it knows of; a
    later attempt is its result."""
    key = key_of(cell, threads_per_process(cell, order.cpus))
    last = store.latest_of(key)
    # The engine has reserved as many nodes as the cell needs.
    machine = dataclasses.replace(this_machine(), nodes=cell.nodes)
    [job] = plan_jobs(
        [cell],
        {key: last} if last else {},
        score_base=False,
        machine=machine,
        cores=lambda _: order.cpus,
    )
    known = order.attempts.get(key, 0)
    is_repeated = job.action == "keep" and last is not None and last.record.attempt <= known
    return dataclasses.replace(
        job,
        label=order.label or job.label,
        action="retry" if is_repeated else job.action,
        known_attempt=known,
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
