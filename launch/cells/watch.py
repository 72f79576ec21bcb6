"""Watches the processes of one cell from their start to their end.

A cell has one process, or one for each rank. The runner signals the processes of this machine, and
reads the files of the ranks on other machines.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from socket import gethostname
from typing import Literal

from harness.meters.gpu_processes import occupants
from harness.ranks import state_files
from harness.records.ranks import RankState
from launch.cells import stalled_ranks
from launch.processes.workers import (
    GRACE_SECONDS,
    CommandProcess,
    Process,
    Ranks,
    kill_group,
    kill_leftovers,
    memory_kills,
    process_tree,
    terminate_worker,
)

POLL_SECONDS = 0.5
STATE_SECONDS = 1.0
# Ranks have this time to end after another has failed; then SIGTERM, then SIGKILL.
PEER_GRACE_SECONDS = 5.0
PEER_KILL_SECONDS = 3.0
# A rank on another machine is lost after this time without a heartbeat.
LOST_SECONDS = 60.0
# Other machines have this time to start.
START_SECONDS = 600.0
# Longest wait for the GPUs to free the memory of killed processes.
RELEASE_SECONDS = 60.0
# Default limits without progress: of ranks, which wait for each other, and of one process, where a
# step on a processor, or reading a large model, may take hours.
PHASE_SECONDS = 1800.0
SINGLE_PHASE_SECONDS = 4 * 3600.0
# Exit codes that another rank's failure does not cause. Such a process died soon after its last
# heartbeat, before its peers noticed.
SUDDEN = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)

ExitCause = Literal["ended", "timeout", "stopped", "stuck"]


@dataclass(frozen=True)
class Limits:
    """Longest times: of the whole cell, and of a rank without progress (a new phase or step). The
    limit without progress holds for evaluation only with `of_evaluation`."""

    cell_seconds: float | None = None
    phase_seconds: float | None = None
    of_evaluation: bool = True


def limits_for(devices: int, cell_seconds: float | None, phase_seconds: float | None) -> Limits:
    """The limits of a cell on so many devices; a phase has one even if the user sets none."""
    if phase_seconds is not None:
        return Limits(cell_seconds, phase_seconds)
    default = PHASE_SECONDS if devices > 1 else SINGLE_PHASE_SECONDS
    return Limits(cell_seconds, default, of_evaluation=False)


@dataclass(frozen=True)
class RankFailure:
    """A rank that failed by itself. `at` is in seconds since the epoch. `exit_code` is none where
    only the rank's file is known. `why` is the runner's reason for a rank that left none."""

    rank: int
    at: float
    exit_code: int | None = None
    why: str = ""


@dataclass(frozen=True)
class CellExit:
    """How the processes of a cell ended.

    `exit_code`, the first process's, is negative for a signal, as in multiprocessing.
    `memory_kills` counts the processes that the kernel killed during the cell because memory ran
    out. `positions` says in words where the ranks were when a limit had passed, and `last_states`
    are their states then.
    """

    exit_code: int
    cause: ExitCause = "ended"
    limit_seconds: float | None = None
    stop_signal: int | None = None
    memory_kills: int = 0
    exit_codes: Mapping[int, int] = field(default_factory=dict)
    failed: tuple[RankFailure, ...] = ()
    positions: str = ""
    last_states: Mapping[int, RankState] = field(default_factory=dict)


class RankProcesses:
    """The processes of one cell on this machine. Call `poll` until it gives a CellExit."""

    def __init__(
        self, processes: Sequence[Process], working: Path, limits: Limits, ranks: Ranks
    ) -> None:
        self.working, self.limits, self.ranks = working, limits, ranks
        self.processes = {ranks.first_rank + i: each for i, each in enumerate(processes)}
        # One command starts all ranks.
        is_command = isinstance(processes[0], CommandProcess)
        here = ranks.world_size if is_command else len(processes)
        self.remote = set(range(ranks.world_size)) - set(
            range(ranks.first_rank, ranks.first_rank + here)
        )
        self.states: dict[int, RankState] = {}
        self.failed: dict[int, RankFailure] = {}
        self.cause: ExitCause = "ended"
        self.positions, self.last_states = "", dict[int, RankState]()
        self._began = self._read_at = time.monotonic()
        self._progressed: dict[int, tuple[object, float]] = {}
        self._heartbeats: dict[int, tuple[object, float]] = {}
        self._memory_kills = memory_kills()
        self._term_at = self._kill_at = self._released_by = float("inf")
        self._ending = False
        self._ended_here: float | None = None
        self._killed_pids: set[int] = set()
        self._group_killed: set[int] = set()

    @property
    def sentinels(self) -> list[int]:
        """For `connection.wait`: a sentinel is ready when its process has ended."""
        return [each.sentinel for each in self.processes.values() if each.exitcode is None]

    def pids(self) -> set[int]:
        """The pids of all processes on this machine, with their descendants."""
        return {each.pid for process in self.processes.values() for each in process_tree(process)}

    def poll(self, stop: Sequence[int]) -> CellExit | None:
        """Check all processes; gives the result when all have ended. `stop` are the signals
        received: after the first the ranks have GRACE_SECONDS to finish, the second kills them."""
        now = time.monotonic()
        self._read_ranks(now)
        if self._all_ended(now):
            return None if self._holds_gpu_memory(now) else self._outcome(stop)
        if self._kill_at == float("inf"):
            self._set_deadlines(now, stop)
        if len(stop) > 1:
            self.kill()
        if now >= self._term_at:
            self._term_at, self._ending = float("inf"), True
            for process in self._living():
                terminate_worker(process)
        if now >= self._kill_at:
            self._fail_overdue()
            self.kill()
        return None

    def kill(self) -> None:
        """Kill every process here and its descendants."""
        self._ending = True
        self._killed_pids |= self.pids()
        for process in self.processes.values():
            kill_group(process)

    def _fail_overdue(self) -> None:
        """Note ranks as failed that still run long after rank 0 has ended well."""
        if self.cause != "ended" or self.failed:
            return
        for rank, process in self.processes.items():
            if process.exitcode is None:
                why = f"rank {rank} did not end within {GRACE_SECONDS:g} s of rank 0"
                self.failed[rank] = RankFailure(rank, time.time(), None, why)

    def _living(self) -> list[Process]:
        return [each for each in self.processes.values() if each.exitcode is None]

    def _read_ranks(self, now: float) -> None:
        """Read the ranks' files, and note the ranks that have failed."""
        ended = [rank for rank, each in self.processes.items() if each.exitcode is not None]
        if now - self._read_at >= STATE_SECONDS or len(ended) == len(self.processes):
            self._read_at = now
            for state in state_files.read_states(self.working):
                self._note_state(state, now)
        for rank in ended:
            if rank not in self._group_killed:
                # Its children must not go on without it.
                kill_group(self.processes[rank])
                self._group_killed.add(rank)
            code = self.processes[rank].exitcode
            if code != 0 and rank not in self.failed and not self._ending:
                at = time.time()
                if rank in self.states and code in SUDDEN:
                    at = self.states[rank].beat or at
                self.failed[rank] = RankFailure(rank, at, code)

    def _note_state(self, state: RankState, now: float) -> None:
        rank = state.rank
        self.states[rank] = state
        for changes, value in (
            (self._progressed, (state.phase, state.step, state.progressed)),
            (self._heartbeats, state.beat),
        ):
            if rank not in changes or changes[rank][0] != value:
                changes[rank] = (value, now)
        if state.status in (None, "ok") or (self._ending and rank not in self.failed):
            return
        code = self.failed[rank].exit_code if rank in self.failed else state.exit_code
        self.failed[rank] = RankFailure(rank, state.beat or time.time(), code)

    def _set_deadlines(self, now: float, stop: Sequence[int]) -> None:
        """Set the times of SIGTERM and SIGKILL, if the processes must end."""
        limit = self.limits.cell_seconds
        if stop:
            self.cause, self._term_at, self._kill_at = "stopped", now, now + GRACE_SECONDS
        elif limit is not None and now - self._began > limit:
            self.cause, self._term_at, self._kill_at = "timeout", now, now + GRACE_SECONDS
            if self.ranks.world_size > 1:
                self.positions = self._inspect_ranks()
        elif self._is_stuck(now):
            self.cause, self._kill_at = "stuck", now
            self.positions = self._inspect_ranks()
        elif self.failed or self._has_lost_rank(now):
            self._term_at = now + PEER_GRACE_SECONDS
            self._kill_at = self._term_at + PEER_KILL_SECONDS
        elif 0 in self.processes and self.processes[0].exitcode is not None:
            self._kill_at = now + GRACE_SECONDS

    def _is_stuck(self, now: float) -> bool:
        limit = self.limits.phase_seconds
        if limit is None:
            return False
        running = [rank for rank, each in self.processes.items() if each.exitcode is None]
        return any(
            now - self._progressed.get(rank, (None, self._began))[1] > limit
            for rank in running
            if self.limits.of_evaluation or not self._evaluates(rank)
        )

    def _evaluates(self, rank: int) -> bool:
        return rank in self.states and self.states[rank].phase == "evaluation"

    def _has_lost_rank(self, now: float) -> bool:
        """Whether a rank on another machine has no heartbeat any more; notes it as failed."""
        for rank in self.remote:
            state = self.states.get(rank)
            if state is not None and state.status is not None:
                continue
            since = self._heartbeats[rank][1] if rank in self._heartbeats else self._began
            if now - since > (LOST_SECONDS if state is not None else START_SECONDS):
                where = f" on {state.host}" if state is not None else ""
                why = f"rank {rank}{where} has shown no sign of life for {now - since:.0f} s"
                beat = state.beat if state is not None else None
                self.failed[rank] = RankFailure(rank, beat or time.time(), None, why)
        return not self.remote.isdisjoint(self.failed)

    def _inspect_ranks(self) -> str:
        now = time.monotonic()
        silent = {rank: now - seen for rank, (_, seen) in self._heartbeats.items()}
        for state in state_files.read_states(self.working):
            self.states[state.rank] = state
        self.last_states = dict(self.states)
        return stalled_ranks.positions_text(
            stalled_ranks.inspect(self.processes, self.last_states, silent, self.working)
        )

    def _all_ended(self, now: float) -> bool:
        if self._living():
            return False
        if self._ended_here is None:
            self._ended_here = now
        # The machine of rank 0 writes the record, and waits for the other machines' files.
        missing = [
            rank
            for rank in self.remote - set(self.failed)
            if rank not in self.states or self.states[rank].exit_code is None
        ]
        return not (missing and 0 in self.processes and now - self._ended_here < GRACE_SECONDS)

    def _holds_gpu_memory(self, now: float) -> bool:
        """Whether a GPU still holds the memory of a killed process."""
        if not self._killed_pids or now > self._released_by:
            return False
        if self._released_by == float("inf"):
            self._released_by = now + RELEASE_SECONDS
        gpus = {state.device for state in self.states.values() if state.device}
        held = occupants([gpu for gpu in gpus if gpu.startswith("GPU-")])
        return any(occupant.pid in self._killed_pids for occupant in held)

    def _outcome(self, stop: Sequence[int]) -> CellExit:
        for process in self.processes.values():
            process.join()
            if isinstance(process, CommandProcess):
                own = [each.pid for each in self.states.values() if each.host == gethostname()]
                kill_leftovers([pid for pid in own if pid is not None], self.working)
        codes = {
            rank: 255 if process.exitcode is None else process.exitcode
            for rank, process in self.processes.items()
        }
        limit = {"timeout": self.limits.cell_seconds, "stuck": self.limits.phase_seconds}
        whole = len(codes) == self.ranks.world_size - len(self.remote)
        return CellExit(
            exit_code=next(iter(codes.values())),
            cause=self.cause,
            limit_seconds=limit.get(self.cause),
            stop_signal=next(iter(stop), None) if self.cause == "stopped" else None,
            memory_kills=memory_kills() - self._memory_kills,
            exit_codes=codes if whole else {},
            failed=tuple(self.failed.values()),
            positions=self.positions,
            last_states=self.last_states,
        )
