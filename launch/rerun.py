"""Repeat one recorded cell through its recorded command, as a new attempt."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from harness import provenance
from harness.record import Record, read_record
from harness.store import Entry, Store, disk_errors, record_key
from launch.finish import finish_abandoned, finish_record
from launch.foretelling import Foretold, with_prediction
from launch.local import first_record, stop_signals
from launch.plan import Job
from launch.process import Launched, watch
from launch.progress import Display
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
    names = [name for name in (*was, *now) if was.get(name) != now.get(name)]
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
    if found := differences(record):
        display.message(f"the stack is not the recorded one: {found}")
    store = Store(path.absolute().parent.parent)
    store.prepare()
    stack_id = provenance.stack_id(provenance.stack(), provenance.hardware())
    key = record_key(record.cell_id, stack_id)
    with stop_signals() as signals, store.claim(key) as claimed:
        if not claimed:
            raise UserError(f"{key} is running at this moment, started by another runner")
        store.recover(key, finish_abandoned)
        foretold = foretell([record.cell]) if foretell is not None else Foretold()
        signals.raising = False
        working = store.start(partial(_first_record, record), key)
        job = Job(record.cell, key, label(record.cell), "run", "rerun", 0, None)
        display.begin([job])
        display.cell_started(job)
        began = time.monotonic()
        with disk_errors(store.root):
            hold = os.open(store.worker_lock(key), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(hold, fcntl.LOCK_EX)
            argv = [*_launcher(record), str(working / "cell.json"), str(working)]
            process = Launched(argv, working / "log.txt", hold)
        finally:
            os.close(hold)
        show = partial(display.update, job)
        outcome = watch(process, working, limit_seconds, lambda: signals.received, show)
        predicted = foretold.predictions.get(record.cell_id)
        finished = with_prediction(finish_record(working, outcome), predicted)
        entry = store.publish(working, finished)
        display.cell_finished(job, entry.record, time.monotonic() - began)
    return entry, next(iter(signals.received), None)


def _launcher(record: Record) -> list[str]:
    """The recorded command without the two paths it ends in. Raises UserError when its program is
    not on this machine."""
    program = record.command[0] if record.command else ""
    if shutil.which(program) is None:
        raise UserError(
            f"the recorded command starts {program!r}, which is not on this machine; run the "
            "matrix of this cell here instead"
        )
    return record.command[:-2]


def _first_record(of: Record, place: Path, attempt: int) -> Record:
    fresh = first_record(of.cell, place, attempt)
    command = [*_launcher(of), *fresh.command[-2:]]
    return fresh.model_copy(update={"command": command})
