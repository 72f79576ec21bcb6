"""Repeat one recorded cell by `accelerate launch`, as a new attempt.

The cell comes from the record and is checked like a cell of a matrix. Its command and profile are
made from the cell: what a record says its command was is never run, as it may come from somebody
else.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.ranks import launch_command
from harness.ranks.launch_command import accelerate, threads_per_process
from harness.records import hub, provenance
from harness.records.reading import read_record
from harness.records.record import Record
from harness.records.store import Entry, Store, disk_errors
from launch.cells.devices import DevicePool
from launch.cells.finish import finish_abandoned
from launch.cells.runner import Runner
from launch.display.progress import Display
from launch.planning.plan import Job, key_of, this_machine
from launch.predict.run_predictions import RunPredictions
from launch.processes.stop_signals import Stopped
from launch.processes.workers import CommandProcess, Process, Ranks
from matrices.cell import Cell, label
from matrices.errors import UserError
from matrices.rules.verdicts import refusals

# Gives an argv. Arguments: the cell, whether it computes on GPUs, the threads of each process, the
# cell's directory, the directory of its record, and accelerate's own command.
MakeCommand = Callable[[Cell, bool, int, Path, Path, list[str]], list[str]]


@dataclass(frozen=True)
class RerunOptions:
    """How to repeat a cell. `predict` predicts it first. `trust_code` allows code that comes with
    its model or its tasks."""

    limit_seconds: float | None = None
    phase_seconds: float | None = None
    predict: Callable[[Sequence[Cell]], RunPredictions] | None = None
    trust_code: bool = False


def differences(record: Record) -> str:
    """The differences between this machine and the record's, in words; empty without any."""
    stack, hardware = provenance.stack(), provenance.hardware()
    was, now = dict(record.stack.packages), dict(stack.packages)
    was |= {"python": record.stack.python, "device": _device(record)}
    now |= {"python": stack.python, "device": hardware.accelerator or hardware.cpu}
    was |= {"commit": _commit(record.stack.commit, record.stack.dirty)}
    now |= {"commit": _commit(stack.commit, stack.dirty)}
    was |= record.provenance.environment
    now |= provenance.environment()
    # The new command sets the threads, and the runner sets the devices.
    set_anew = {"OMP_NUM_THREADS"} if provenance.recorded_threads(record) is not None else set()
    set_anew |= {"CUDA_VISIBLE_DEVICES"} if record.placement.devices else set()
    names = [name for name in (*was, *now) if was.get(name) != now.get(name)]
    names = [name for name in names if name not in set_anew]
    return ", ".join(
        f"{name} {was.get(name, '–')} -> {now.get(name, '–')}" for name in dict.fromkeys(names)
    )


def _device(record: Record) -> str:
    return record.hardware.accelerator or record.hardware.cpu


def _commit(commit: str | None, dirty: bool | None) -> str:
    return f"{commit[:12]}{' (dirty)' if dirty else ''}" if commit else "–"


def checked(record: Record, trust_code: bool) -> Cell:
    """The cell of a record, if it may run here. Raises UserError."""
    cell = record.cell
    if cell.cell_id != record.cell_id:
        raise UserError(
            f"the record's cell is {cell.cell_id[:12]} and not {record.cell_id[:12]}, as it says: "
            "it was changed after the run; run its matrix again instead"
        )
    if cell.nodes > 1:
        raise UserError(
            f"a cell on {cell.nodes} machines is not repeated from one of them; run its matrix "
            "again with --on slurm",
            key="nodes",
        )
    if refused := refusals(cell, this_machine()):
        raise UserError("; ".join(f"{each.rule}: {each.reason}" for each in refused))
    if trust_code:
        return cell
    for key, what in (
        ("model.trust_remote_code", cell.model.trust_remote_code and cell.model.name),
        ("evaluate.include_path", cell.evaluate.tasks and cell.evaluate.include_path),
    ):
        if what:
            raise UserError(
                f"the cell runs code that comes with {what}; say --trust-remote-code if you trust "
                "it",
                key=key,
            )
    return cell


def rerun(
    path: Path,
    display: Display,
    options: RerunOptions,
    command: MakeCommand = launch_command.command,
) -> tuple[Entry, int | None]:
    """Run the cell of a record again; gives the new record and the signal that stopped the run.

    The new record is beside the old one, and of the stack that is installed now. Raises UserError
    when the cell cannot run here, when another runner runs it, and when the directory cannot be
    written, and Stopped when a signal came before the cell began.
    """
    record = read_record(path)
    cell = checked(record, options.trust_code)
    if found := differences(record):
        display.message(f"the stack is not the recorded one: {found}")
    if changed := hub.changed_since(record):
        display.message(f"the model or the data is not the recorded one: {changed}")
    store = Store(path.absolute().parent.parent)
    store.prepare()
    threads = provenance.recorded_threads(record) or threads_per_process(cell)
    key = key_of(cell, threads)
    with store.claim(key) as claimed:
        if not claimed:
            raise UserError(f"{key} is running at this moment, started by another runner")
        store.recover(key, finish_abandoned)
    job = Job(cell, key, label(cell), "run", "rerun", store.next_attempt(key) - 1, None)
    runner = Runner(
        store,
        display,
        options.limit_seconds,
        preflight=None,
        predict=options.predict,
        phase_seconds=options.phase_seconds,
        devices=DevicePool(cores=threads * cell.ranks_per_node),
        start_processes=partial(_start, command, threads),
    )
    finished = runner.run([job])
    if key not in finished.entries:
        raise Stopped(finished.stopped_by or 0)
    return finished.entries[key], finished.stopped_by


def _start(
    command: MakeCommand, threads: int, cell: Cell, working: Path, worker_lock: Path, ranks: Ranks
) -> list[Process]:
    """Start the command; it holds the worker lock of its cell."""
    gpu = provenance.uses_gpu_here()
    argv = command(cell, gpu, threads, working, working, accelerate())
    with disk_errors(working.parent):
        hold = os.open(worker_lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(hold, fcntl.LOCK_EX)
        return [CommandProcess(argv, working / "log.txt", hold, ranks.environment)]
    finally:
        os.close(hold)
