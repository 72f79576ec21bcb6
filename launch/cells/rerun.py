"""Repeat one recorded cell by hand, as a new attempt.

The cell is taken from the record and checked as one of a matrix is. Its command and its profile are
made from it anew: a record, which may come from somebody else, is read and never run.
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
from launch.cells.devices import Slots
from launch.cells.finish import finish_abandoned
from launch.cells.runner import Runner
from launch.cells.start import devices_here
from launch.display.progress import Display
from launch.planning.plan import Job, key_of, this_machine
from launch.predict.run_predictions import RunPredictions
from launch.processes.stop_signals import Stopped
from launch.processes.workers import Launched, Process, Ranks
from matrices.cell import Cell, label
from matrices.errors import UserError
from matrices.rules.verdicts import refusals

# argv for a cell, whether it computes on GPUs, the threads of each process, the directory it is in,
# where its record goes, and accelerate's own command.
MakeCommand = Callable[[Cell, bool, int, Path, Path, list[str]], list[str]]


@dataclass(frozen=True)
class Options:
    """How to repeat a cell. `foretell` predicts it first, `trust_code` lets it run code that comes
    with its model or its tasks."""

    limit_seconds: float | None = None
    phase_seconds: float | None = None
    foretell: Callable[[Sequence[Cell]], RunPredictions] | None = None
    trust_code: bool = False


def record_path(named: Path) -> Path:
    """The record.json that a user names by it or by its directory. Raises UserError."""
    path = named / "record.json" if named.is_dir() else named
    if not path.is_file():
        raise UserError(f"{named}: no record here; name a record's directory or its record.json")
    return path


def differences(record: Record) -> str:
    """What this machine has other than the record's, in words; empty if nothing that matters."""
    stack, hardware = provenance.stack(), provenance.hardware()
    was, now = dict(record.stack.packages), dict(stack.packages)
    was |= {"python": record.stack.python, "device": _device(record)}
    now |= {"python": stack.python, "device": hardware.accelerator or hardware.cpu}
    was |= {"commit": _commit(record.stack.commit, record.stack.dirty)}
    now |= {"commit": _commit(stack.commit, stack.dirty)}
    was |= record.provenance.environment
    now |= provenance.environment()
    # The command names the threads, and the runner the devices it gives the command.
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
    """The cell of a record that may be run here. Raises UserError."""
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
    options: Options,
    command: MakeCommand = launch_command.command,
) -> tuple[Entry, int | None]:
    """Run the cell of a record again; gives the new record and the signal that stopped it.

    It is published beside the old one, on the stack that is installed now. Raises UserError when
    the cell cannot run here or is running elsewhere, or the directory cannot be written, and
    Stopped when stopped before it began.
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
        foretell=options.foretell,
        phase_seconds=options.phase_seconds,
        slots=Slots(cores=threads * (devices_here(cell) if cell.is_distributed else 1)),
        launch=partial(_launched, command, threads),
    )
    finished = runner.run([job])
    if key not in finished.entries:
        raise Stopped(finished.stopped_by or 0)
    return finished.entries[key], finished.stopped_by


def _launched(
    command: MakeCommand, threads: int, cell: Cell, working: Path, worker_lock: Path, ranks: Ranks
) -> list[Process]:
    """The command at work, holding the worker lock of its cell."""
    gpu = provenance.uses_gpu_here()
    argv = command(cell, gpu, threads, working, working, accelerate())
    with disk_errors(working.parent):
        hold = os.open(worker_lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(hold, fcntl.LOCK_EX)
        return [Launched(argv, working / "log.txt", hold, ranks.environment)]
    finally:
        os.close(hold)
