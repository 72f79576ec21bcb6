"""The record of a cell whose processes have ended, completed where they could not do so."""

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
from launch.cells.watch import Failed, Outcome
from launch.processes.workers import LOST
from matrices.errors import UserError

# What a rank says whose peer has gone: gloo, NCCL and torch's store, in their words.
CONSEQUENCE = re.compile(
    r"connection (was |is )?(likely )?(closed|reset|refused)|broken pipe|socket (is )?closed"
    r"|remote process exited|ncclRemoteError|caused pair closure|timed out waiting"
    r"|remote (server|peer)|wait timeout|Read error",
    re.IGNORECASE,
)
# Times of cells during which others had more than this share of the processors are in doubt.
FOREIGN_CPU_SHARE = 0.25


def finish_record(working: Path, outcome: Outcome) -> Record:
    """The record of a cell whose processes have ended.

    What they measured is kept whatever happened. Status, reason and failure are those of the rank
    that failed first, not of those that only lost the connection to it.
    """
    record = read_record(working / "record.json")
    ranks = _ranks(record, working, outcome)
    memory = record.memory if len(ranks) < 2 else _with_other_ranks(record, working, len(ranks))
    record = record.model_copy(update={"ranks": ranks, "memory": memory})
    finished = record.ended is not None and outcome.exit_code in (0, 1)
    first = _first(outcome, {state.rank: state for state in ranks})
    if outcome.cause == "ended":
        if first is None or (first.rank == 0 and (finished or len(ranks) < 2)):
            return record if finished else _ended(record, working, _death(record, working, outcome))
        return _ended(record, working, _blamed(first, ranks, working, outcome))
    # A rank whose peer is stopped first says that it has failed.
    alone = len(ranks) < 2 or record.status not in ("failed", "interrupted")
    if finished and record.status != "interrupted" and alone:
        return record
    return _ended(record, working, _stopped(outcome))


def _ended(record: Record, working: Path, changes: dict[str, Any]) -> Record:
    phase = record.phase or read_progress(working).phase
    ended = record.ended or provenance.now()
    return record.model_copy(update={"ended": ended, "phase": phase, **changes})


def _stopped(outcome: Outcome) -> dict[str, Any]:
    """Status and reason of a cell that was told to end."""
    if outcome.cause == "stopped":
        name = signal.Signals(outcome.stop_signal or signal.SIGTERM).name
        reason = f"the runner was stopped by {name}"
        return {"status": "interrupted", "reason": reason, "failure": None}
    reason = f"over its limit of {outcome.limit_seconds:g} s"
    if outcome.cause == "stuck":
        reason = f"no progress for {outcome.limit_seconds:g} s"
    if outcome.standing:
        reason += f": {outcome.standing}"
    return {"status": "timeout", "reason": reason, "failure": None}


def _first(outcome: Outcome, states: Mapping[int, RankState]) -> Failed | None:
    """The rank whose failure brought the others down."""

    def order(failed: Failed) -> tuple[bool, float]:
        state = states.get(failed.rank)
        said = state.failure.message if state is not None and state.failure is not None else ""
        return bool(CONSEQUENCE.search(said)), failed.at

    return min(outcome.failed, key=order, default=None)


def _blamed(
    first: Failed, ranks: list[RankState], working: Path, outcome: Outcome
) -> dict[str, Any]:
    """What the record says of a rank that failed, in its own words where it left some."""
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
    return sudden_end(
        code if code is not None else outcome.exit_code,
        phase,
        state_files.log_path(working, first.rank),
        f"rank {first.rank}",
        outcome.memory_kills,
        " after it had finished" if state.status == "ok" else "",
    )


def _death(record: Record, working: Path, outcome: Outcome) -> dict[str, Any]:
    """Status, reason and failure of a worker that died without being told to."""
    phase = record.phase or read_progress(working).phase
    log = state_files.log_path(working, 0)
    return sudden_end(outcome.exit_code, phase, log, "", outcome.memory_kills)


def sudden_end(
    code: int, phase: str, log: Path, who: str, memory_kills: int, when: str = ""
) -> dict[str, Any]:
    """A process that left no word: what its exit code and its log say."""
    if code in (-signal.SIGKILL, LOST) and memory_kills > 0:
        message = f"the kernel killed {who or 'the worker'}: the machine's memory ran out"
        failure = Failure(type="HostOutOfMemory", message=message, phase=phase)
        return {"status": "oom", "reason": message, "failure": failure, "phase": phase}
    if code == LOST:
        message = f"the process that {who or 'the worker'} was forked from died"
    elif code < 0:
        killed = f"killed by {signal_text(-code)}{when}"
        message = f"{who} was {killed}" if who else killed
    else:
        message = f"{who or 'the worker'} ended with exit code {code} and no finished record"
        last = _last_line(log)
        message += f": {last}" if last else ""
    failure = Failure(type="WorkerDied", message=message, phase=phase)
    return {"status": "failed", "reason": message, "failure": failure, "phase": phase}


def _last_line(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _ranks(record: Record, working: Path, outcome: Outcome) -> list[RankState]:
    """Every rank: what the record knows, what its own file says, and how its process ended."""
    known = {state.rank: state for state in record.ranks}
    for state in state_files.read_states(working):
        said = state.model_dump(exclude_none=True)
        before = known[state.rank].model_dump(exclude_none=True) if state.rank in known else {}
        known[state.rank] = RankState.model_validate(before | said)
    for rank, stood in outcome.stood.items():
        # A frozen process goes on for the moment it takes to dump its stack.
        where = stood.model_dump(include={"phase", "step", "beat", "progressed"})
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
    """The memory of all ranks, where a failure came before rank 0 had gathered it."""
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
    except UserError:  # it had measured nothing yet
        return None


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # a rank on another machine goes on for a moment
        return 0.0


def contamination(record: Record) -> list[str]:
    """What puts the times of a finished cell in doubt, as far as it has measured that itself."""
    share = record.speed.foreign_cpu_share
    # A rank counts the others as foreign, and a cell those beside it.
    alone = len(record.ranks) < 2 and record.placement.exclusive
    on_gpu = provenance.uses_gpu(record.stack, record.hardware)
    if on_gpu or share is None or share <= FOREIGN_CPU_SHARE or not alone:
        return []
    return [f"other processes used {share:.0%} of the processors during the timed steps"]


def finish_abandoned(working: Path, record: Record) -> Record:
    """The record of a cell whose runner died: as the worker left it, and `interrupted` unless it
    had finished. It ended when its files were last touched."""
    record = record.model_copy(update={"ranks": _ranks(record, working, Outcome(0))})
    if record.ended is not None:
        return record
    last = max(_touched(path) for path in working.rglob("*"))
    return record.model_copy(
        update={
            "status": "interrupted",
            "reason": "the runner died",
            "phase": record.phase or read_progress(working).phase,
            "ended": datetime.fromtimestamp(last, UTC).isoformat(timespec="milliseconds"),
        }
    )
