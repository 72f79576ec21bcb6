"""Completes the record of a cell whose processes have ended."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.ranks import state_files
from harness.ranks.progress_file import read_progress
from harness.records import provenance
from harness.records.memory import Memory
from harness.records.part import PHASES
from harness.records.ranks import Failure, RankState
from harness.records.reading import read_record
from harness.records.record import Record
from harness.system.child_process import signal_text
from launch.cells.watch import CellExit, RankFailure
from launch.processes.workers import LOST_EXIT_CODE
from matrices.errors import UserError

# Errors of gloo, NCCL and torch's store in a rank whose peer has ended.
LOST_CONNECTION = re.compile(
    r"connection (was |is )?(likely )?(closed|reset|refused)|broken pipe|socket (is )?closed"
    r"|remote process exited|ncclRemoteError|caused pair closure|timed out waiting"
    r"|remote (server|peer)|wait timeout|Read error",
    re.IGNORECASE,
)
# A larger share of the processors for other processes puts a cell's times in doubt.
FOREIGN_CPU_SHARE = 0.25


def finish_record(working: Path, outcome: CellExit) -> Record:
    """The record of a cell whose processes have ended.

    It keeps what they measured. Status, reason and failure are those of the rank that failed first,
    not of ranks that only lost their connection to it.
    """
    record = read_record(working / "record.json")
    ranks = _ranks(record, working, outcome)
    memory = record.memory if len(ranks) < 2 else _with_other_ranks(record, working, len(ranks))
    record = record.model_copy(update={"ranks": ranks, "memory": memory})
    finished = record.ended is not None and outcome.exit_code in (0, 1)
    first = _first_failure(outcome, {state.rank: state for state in ranks})
    if outcome.cause == "ended":
        if first is None or (first.rank == 0 and (finished or len(ranks) < 2)):
            return (
                record
                if finished
                else _with_end(record, working, _worker_death(record, working, outcome))
            )
        return _with_end(record, working, _failure_of(first, ranks, working, outcome))
    # A rank fails when its peer stops first.
    alone = len(ranks) < 2 or record.status not in ("failed", "interrupted")
    if finished and record.status != "interrupted" and alone:
        return record
    return _with_end(record, working, _stop_status(outcome))


def _with_end(record: Record, working: Path, changes: dict[str, Any]) -> Record:
    phase = record.phase or read_progress(working).phase
    ended = record.ended or provenance.now()
    return record.model_copy(update={"ended": ended, "phase": phase, **changes})


def _stop_status(outcome: CellExit) -> dict[str, Any]:
    """Status and reason of a cell that the runner ended."""
    if outcome.cause == "stopped":
        name = signal.Signals(outcome.stop_signal or signal.SIGTERM).name
        reason = f"the runner was stopped by {name}"
        return {"status": "interrupted", "reason": reason, "failure": None}
    reason = f"over its limit of {outcome.limit_seconds:g} s"
    if outcome.cause == "stuck":
        reason = f"no progress for {outcome.limit_seconds:g} s"
    if outcome.positions:
        reason += f": {outcome.positions}"
    return {"status": "timeout", "reason": reason, "failure": None}


def _first_failure(outcome: CellExit, states: Mapping[int, RankState]) -> RankFailure | None:
    """The failure that caused the others."""

    def order(failed: RankFailure) -> tuple[bool, float]:
        state = states.get(failed.rank)
        message = state.failure.message if state is not None and state.failure is not None else ""
        return bool(LOST_CONNECTION.search(message)), failed.at

    return min(outcome.failed, key=order, default=None)


def _failure_of(
    first: RankFailure, ranks: list[RankState], working: Path, outcome: CellExit
) -> dict[str, Any]:
    """Status, reason and failure of a rank that failed: its own, if it wrote any."""
    state = next((each for each in ranks if each.rank == first.rank), RankState(rank=first.rank))
    phase = state.phase or "starting"
    if first.why:
        failure = Failure(type="RankLost", message=first.why, phase=phase)
        return {"status": "failed", "reason": first.why, "failure": failure, "phase": phase}
    if state.status not in (None, "ok"):
        return {
            "status": state.status,
            "reason": f"rank {first.rank}: {state.reason}",
            "failure": state.failure,
            "phase": (state.failure.phase if state.failure else None) or phase,
        }
    code = outcome.exit_codes.get(first.rank, first.exit_code)
    return death_without_report(
        code if code is not None else outcome.exit_code,
        phase,
        state_files.log_path(working, first.rank),
        f"rank {first.rank}",
        outcome.memory_kills,
        " after it had finished" if state.status == "ok" else "",
    )


def _worker_death(record: Record, working: Path, outcome: CellExit) -> dict[str, Any]:
    """Status, reason and failure of a worker that died by itself."""
    phase = record.phase or read_progress(working).phase
    log = state_files.log_path(working, 0)
    return death_without_report(outcome.exit_code, phase, log, "", outcome.memory_kills)


def death_without_report(
    code: int, phase: str, log: Path, who: str, memory_kills: int, when: str = ""
) -> dict[str, Any]:
    """Status, reason and failure of a process that wrote none, from its exit code and its log."""
    if code in (-signal.SIGKILL, LOST_EXIT_CODE) and memory_kills > 0:
        message = f"the kernel killed {who or 'the worker'}: the machine's memory ran out"
        failure = Failure(type="HostOutOfMemory", message=message, phase=phase)
        return {"status": "oom", "reason": message, "failure": failure, "phase": phase}
    if code == LOST_EXIT_CODE:
        message = f"the process that {who or 'the worker'} was forked from died"
    elif code < 0:
        killed = f"killed by {signal_text(-code)}{when}"
        message = f"{who} was {killed}" if who else killed
    else:
        message = f"{who or 'the worker'} ended with exit code {code} and no finished record"
        last = last_line(log)
        message += f": {last}" if last else ""
    failure = Failure(type="WorkerDied", message=message, phase=phase)
    return {"status": "failed", "reason": message, "failure": failure, "phase": phase}


def last_line(log: Path) -> str:
    """The last line of a log that is not empty; empty without a log."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _ranks(record: Record, working: Path, outcome: CellExit) -> list[RankState]:
    """All ranks, from the record, from their own files and from the exits of their processes."""
    known = {state.rank: state for state in record.ranks}
    for state in state_files.read_states(working):
        written = state.model_dump(exclude_none=True)
        before = known[state.rank].model_dump(exclude_none=True) if state.rank in known else {}
        known[state.rank] = RankState.model_validate(before | written)
    for rank, last in outcome.last_states.items():
        # A frozen process runs for a moment to dump its stack.
        where = last.model_dump(include={"phase", "step", "beat", "progressed"})
        known[rank] = known[rank].model_copy(update=where)
    for rank, code in outcome.exit_codes.items():
        known.setdefault(rank, RankState(rank=rank))
        known[rank] = known[rank].model_copy(update={"exit_code": code})
    return [_with_stack(known[rank], working) for rank in sorted(known)]


def _with_stack(state: RankState, working: Path) -> RankState:
    path = state_files.stack_path(working, state.rank)
    if not path.exists() or path.stat().st_size == 0:
        return state
    return state.model_copy(update={"stack_file": str(path.relative_to(working))})


def _with_other_ranks(record: Record, working: Path, count: int) -> Memory:
    """The memory of all ranks, also after a failure that came before rank 0 had gathered it."""
    memory = record.memory
    if any(len(readings) > 1 for readings in memory.phases.values()):
        return memory
    others = [_memory_of(working, rank) for rank in range(1, count)]
    if None in others:
        return memory
    everybody = [memory, *(each for each in others if each is not None)]
    phases = {
        phase: [reading for each in everybody for reading in each.phases[phase]]
        for phase in PHASES
        if all(phase in each.phases for each in everybody)
    }
    highest = max(everybody, key=lambda each: each.peak_bytes or 0)
    return highest.model_copy(update={"phases": memory.phases | phases})


def _memory_of(working: Path, rank: int) -> Memory | None:
    try:
        return read_record(state_files.record_path(working, rank)).memory
    except UserError:  # the rank had measured nothing yet
        return None


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # a rank on another machine still replaces its files
        return 0.0


def contamination(record: Record) -> list[str]:
    """What the cell itself has measured that puts its times in doubt."""
    share = record.speed.foreign_cpu_share
    # A rank counts the other ranks as foreign, and a cell counts the cells beside it.
    alone = len(record.ranks) < 2 and record.placement.exclusive
    on_gpu = provenance.uses_gpu(record.stack, record.hardware)
    if on_gpu or share is None or share <= FOREIGN_CPU_SHARE or not alone:
        return []
    return [f"other processes used {share:.0%} of the processors during the timed steps"]


def finish_abandoned(working: Path, record: Record) -> Record:
    """The record of a cell whose runner died. An unfinished one is `interrupted`, and ended at the
    last change of its files."""
    record = record.model_copy(update={"ranks": _ranks(record, working, CellExit(0))})
    if record.ended is not None:
        return record
    last = max(_modified_at(path) for path in working.rglob("*"))
    return record.model_copy(
        update={
            "status": "interrupted",
            "reason": "the runner died",
            "phase": record.phase or read_progress(working).phase,
            "ended": datetime.fromtimestamp(last, UTC).isoformat(timespec="milliseconds"),
        }
    )
