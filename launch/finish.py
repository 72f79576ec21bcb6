"""The record of a worker that has ended, completed where it could not do so itself."""

from __future__ import annotations

import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import provenance
from harness.record import Failure, Record, read_record
from launch.process import Outcome, read_progress


def finish_record(working: Path, outcome: Outcome) -> Record:
    """The record of a worker that has ended, completed where it could not do so itself.

    What it measured is kept whatever happened.
    """
    record = read_record(working / "record.json")
    finished = record.ended is not None and outcome.exit_code in (0, 1)
    if finished and (outcome.cause == "ended" or record.status != "interrupted"):
        return record
    phase = record.phase or read_progress(working).phase
    changes: dict[str, Any] = {"ended": record.ended or provenance.now(), "phase": phase}
    if outcome.cause == "timeout":
        changes |= {"status": "timeout", "reason": f"over its limit of {outcome.limit_seconds:g} s"}
    elif outcome.cause == "stopped":
        name = signal.Signals(outcome.stop_signal or signal.SIGTERM).name
        changes |= {"status": "interrupted", "reason": f"the runner was stopped by {name}"}
    else:
        changes |= _death(working, outcome, phase)
    return record.model_copy(update=changes)


def _death(working: Path, outcome: Outcome, phase: str) -> dict[str, Any]:
    """Status, reason and failure of a worker that died without being told to."""
    code = outcome.exit_code
    if code == -signal.SIGKILL and outcome.memory_kills > 0:
        message = "the kernel killed the worker: the machine's memory ran out"
        failure = Failure(type="HostOutOfMemory", message=message, phase=phase)
        return {"status": "oom", "reason": message, "failure": failure}
    if code < 0:
        message = f"killed by signal {-code} ({signal.Signals(-code).name})"
    else:
        message = f"the worker ended with exit code {code} and no finished record"
        last = _last_line(working / "log.txt")
        message += f": {last}" if last else ""
    failure = Failure(type="WorkerDied", message=message, phase=phase)
    return {"status": "failed", "reason": message, "failure": failure}


def _last_line(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def finish_abandoned(working: Path, record: Record) -> Record:
    """The record of a cell whose runner died: as the worker left it, and `interrupted` unless it
    had finished. It ended when its files were last touched."""
    if record.ended is not None:
        return record
    last = max(path.stat().st_mtime for path in working.iterdir())
    return record.model_copy(
        update={
            "status": "interrupted",
            "reason": "the runner died",
            "phase": record.phase or read_progress(working).phase,
            "ended": datetime.fromtimestamp(last, UTC).isoformat(timespec="milliseconds"),
        }
    )
