"""Repeat one recorded cell through its recorded command, as a new attempt."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from harness import provenance
from harness.launched import Place
from harness.record import Placement, Record, read_record
from harness.store import Entry, Store, disk_errors, record_key
from launch import profile
from launch.finish import contamination, finish_abandoned, finish_record
from launch.foretelling import Foretold, with_prediction
from launch.plan import Job
from launch.process import Launched, Ranks
from launch.progress import Display
from launch.slots import Grant, Lease, Slots
from launch.starting import THREADS_OPTION, devices_here, first_record, placement
from launch.stopping import stop_signals
from launch.watching import POLL_SECONDS, limits_for, watch
from matrices.cell import Cell, label
from matrices.errors import UserError


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
    set_anew = {"OMP_NUM_THREADS"} if THREADS_OPTION in record.command else set()
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


def rerun(
    path: Path,
    display: Display,
    limit_seconds: float | None,
    foretell: Callable[[Sequence[Cell]], Foretold] | None = None,
) -> tuple[Entry, int | None]:
    """Run the cell of a record again; gives the new record and the signal that stopped it.

    `foretell` predicts it first. It is published beside the old one, on the stack that is
    installed now. Raises UserError when the cell is running elsewhere or the directory cannot be
    written.
    """
    # Forked workers have it set too: see launch.server.start_server.
    os.environ.setdefault("OMP_NUM_THREADS", str(provenance.cpu_threads()))
    record = read_record(path)
    if record.cell.nodes > 1:
        raise UserError(
            f"a cell on {record.cell.nodes} machines is not repeated from one of them; run its "
            "matrix again with --on slurm",
            key="nodes",
        )
    if found := differences(record):
        display.message(f"the stack is not the recorded one: {found}")
    store = Store(path.absolute().parent.parent)
    store.prepare()
    stack_id = provenance.stack_id(provenance.stack(), provenance.hardware())
    key = record_key(record.cell_id, stack_id)
    with contextlib.ExitStack() as held:
        signals = held.enter_context(stop_signals())
        if not held.enter_context(store.claim(key)):
            raise UserError(f"{key} is running at this moment, started by another runner")
        store.recover(key, finish_abandoned)
        foretold = foretell([record.cell]) if foretell is not None else Foretold()
        lease = _leased(Slots(), record, display)
        held.callback(lease.release)
        signals.raising = False
        placed = placement("local", None, lease.grant)
        first = partial(_first_record, record, grant=lease.grant, placed=placed)
        working = store.start(first, key)
        _copy_profile(path.parent, working)
        job = Job(record.cell, key, label(record.cell), "run", "rerun", 0, None)
        display.begin([job])
        display.cell_started(job)
        began = time.monotonic()
        process = _launched(record, working, store.worker_lock(key), lease.grant)
        limits = limits_for(record.cell.devices, limit_seconds, None)
        show = partial(display.update, job)
        count = record.cell.devices if profile.is_spread(record.cell) else 1
        ranks = Ranks(places=(Place(local_ranks=count),))
        outcome = watch([process], working, limits, lambda: signals.received, show, ranks)
        finished = finish_record(working, outcome)
        finished = finished.model_copy(update={"contaminated": contamination(finished)})
        predicted = foretold.predictions.get(record.cell_id)
        entry = store.publish(working, with_prediction(finished, predicted))
        display.cell_finished(job, entry.record, time.monotonic() - began)
    return entry, next(iter(signals.received), None)


def _leased(slots: Slots, record: Record, display: Display) -> Lease:
    """The devices that the cell needs, as soon as no other runner has them."""
    while (lease := slots.ask(devices_here(record.cell))) is None:
        display.waiting([label(record.cell)], for_devices=True)
        time.sleep(POLL_SECONDS)
    return lease


def _launched(record: Record, working: Path, worker_lock: Path, grant: Grant) -> Launched:
    """The recorded command at work, holding the worker lock of its cell."""
    with disk_errors(working.parent):
        hold = os.open(worker_lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(hold, fcntl.LOCK_EX)
        argv = [*_launcher(record, working), str(working / "cell.json"), str(working)]
        return Launched(argv, working / "log.txt", hold, grant.environment)
    finally:
        os.close(hold)


def _copy_profile(source: Path, working: Path) -> None:
    """The recorded profile, as it is now beside the record."""
    for name in (profile.PROFILE, profile.DEEPSPEED):
        if (source / name).exists():
            shutil.copyfile(source / name, working / name)


def _launcher(record: Record, place: Path) -> list[str]:
    """The recorded command without the two paths it ends in, with the profile of `place`. Raises
    UserError when its program is not on this machine."""
    program = record.command[0] if record.command else ""
    if shutil.which(program) is None:
        raise UserError(
            f"the recorded command starts {program!r}, which is not on this machine; run the "
            "matrix of this cell here instead"
        )
    of = f"{Path(record.command[-2]).parent}{os.sep}"
    return [
        f"{place}{os.sep}{part.removeprefix(of)}" if part.startswith(of) else part
        for part in record.command[:-2]
    ]


def _first_record(of: Record, place: Path, attempt: int, grant: Grant, placed: Placement) -> Record:
    fresh = first_record(of.cell, place, attempt, grant, placed)
    command = [*_launcher(of, place), *fresh.command[-2:]]
    return fresh.model_copy(update={"command": command})
