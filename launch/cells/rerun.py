"""Repeat one recorded cell by hand, as a new attempt.

The cell is taken from the record and checked as one of a matrix is. Its command and its profile are
made from it anew: a record, which may come from somebody else, is read and never run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.ranks.launch_command import is_spread, threads_of
from harness.ranks.launch_environment import Place
from harness.records import provenance
from harness.records.record import Record, read_record
from harness.records.store import Entry, Store, disk_errors
from launch.cells import accelerate_command
from launch.cells.devices import Grant, Lease, Slots
from launch.cells.finish import contamination, finish_abandoned, finish_record
from launch.cells.start import devices_here, first_record, placement
from launch.cells.watch import POLL_SECONDS, limits_for, watch
from launch.display.progress import Display
from launch.planning.plan import Job, key_of, this_machine
from launch.predict.run_predictions import RunPredictions, with_prediction
from launch.processes.stop_signals import stop_signals
from launch.processes.workers import Launched, Ranks
from matrices.cell import Cell, label
from matrices.errors import UserError
from matrices.rules.verdicts import refusals

# argv for a cell, the directory it is in, whether it computes on GPUs, where its record goes, and
# the threads of each process.
MakeCommand = Callable[[Cell, Path, bool, Path, int], list[str]]


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
    command: MakeCommand = accelerate_command.command_into,
) -> tuple[Entry, int | None]:
    """Run the cell of a record again; gives the new record and the signal that stopped it.

    It is published beside the old one, on the stack that is installed now. Raises UserError when
    the cell cannot run here or is running elsewhere, or the directory cannot be written.
    """
    # Forked workers have it set too: see launch.processes.server.start_server.
    os.environ.setdefault("OMP_NUM_THREADS", str(provenance.cpu_threads()))
    record = read_record(path)
    cell = checked(record, options.trust_code)
    if found := differences(record):
        display.message(f"the stack is not the recorded one: {found}")
    store = Store(path.absolute().parent.parent)
    store.prepare()
    threads = provenance.recorded_threads(record) or threads_of(cell)
    key = key_of(cell, threads)
    with contextlib.ExitStack() as held:
        signals = held.enter_context(stop_signals())
        if not held.enter_context(store.claim(key)):
            raise UserError(f"{key} is running at this moment, started by another runner")
        store.recover(key, finish_abandoned)
        foretold = options.foretell([cell]) if options.foretell is not None else RunPredictions()
        lease = _leased(Slots(), record, display)
        held.callback(lease.release)
        signals.raising = False
        placed = placement("local", None, lease.grant)
        first = partial(first_record, cell, grant=lease.grant, placed=placed, threads=threads)
        working = store.start(first, key)
        accelerate_command.write(cell, working)
        job = Job(cell, key, label(cell), "run", "rerun", 0, None)
        display.begin([job])
        display.cell_started(job)
        began = time.monotonic()
        gpu = provenance.uses_gpu(provenance.stack(), provenance.hardware())
        argv = command(cell, working, gpu, working, threads)
        process = _launched(argv, working, store.worker_lock(key), lease.grant)
        limits = limits_for(cell.devices, options.limit_seconds, options.phase_seconds)
        show = partial(display.update, job)
        ranks = Ranks(places=(Place(local_ranks=cell.devices if is_spread(cell) else 1),))
        outcome = watch([process], working, limits, lambda: signals.received, show, ranks)
        finished = finish_record(working, outcome)
        finished = finished.model_copy(update={"contaminated": contamination(finished)})
        predicted = foretold.predictions.get(cell.cell_id)
        entry = store.publish(working, with_prediction(finished, predicted))
        display.cell_finished(job, entry.record, time.monotonic() - began)
    return entry, next(iter(signals.received), None)


def _leased(slots: Slots, record: Record, display: Display) -> Lease:
    """The devices that the cell needs, as soon as no other runner has them."""
    while (lease := slots.ask(devices_here(record.cell))) is None:
        display.waiting([label(record.cell)], for_devices=True)
        time.sleep(POLL_SECONDS)
    return lease


def _launched(argv: list[str], working: Path, worker_lock: Path, grant: Grant) -> Launched:
    """The command at work, holding the worker lock of its cell."""
    with disk_errors(working.parent):
        hold = os.open(worker_lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(hold, fcntl.LOCK_EX)
        return Launched(argv, working / "log.txt", hold, grant.environment)
    finally:
        os.close(hold)
