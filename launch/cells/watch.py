"""The processes of one cell, watched from their start to their end.

A cell has one process, or one for each rank. Those of this machine are processes that can be
signalled; ranks on other machines are known by their files.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from socket import gethostname
from typing import Literal

from harness.meters.gpu_processes import occupants
from harness.ranks import state_files
from harness.ranks.progress_file import Progress, read_progress
from harness.records.ranks import RankState
from launch.cells import stalled_ranks
from launch.processes.workers import (
    GRACE_SECONDS,
    Launched,
    Process,
    Ranks,
    ask_to_end,
    family,
    kill_group,
    kill_strays,
    memory_kills,
)

POLL_SECONDS = 0.5
STATE_SECONDS = 1.0
# What ranks get to end by themselves after another has failed; then SIGTERM, then SIGKILL.
PEER_GRACE_SECONDS = 5.0
PEER_KILL_SECONDS = 3.0
# A rank on another machine that has not shown a sign of life for so long is lost.
LOST_SECONDS = 60.0
# What other machines get to start, and to end after this one.
START_SECONDS = 600.0
# Longest wait for the GPUs to give back what killed processes held.
RELEASE_SECONDS = 60.0
# Longest time without progress unless the user says another: of ranks, which wait for each other,
# and of one process, where a step on a processor or reading a large model may take hours.
PHASE_SECONDS = 1800.0
SINGLE_PHASE_SECONDS = 4 * 3600.0
# Exit codes of processes that no other rank's failure brought down; they died soon after their last
# heartbeat, before their peers could notice.
SUDDEN = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)

Cause = Literal["ended", "timeout", "stopped", "stuck"]


@dataclass(frozen=True)
class Limits:
    """Longest times: of the whole cell, and of a rank without progress (a phase entered, a step
    ended). Scoring, which one process does alone, only counts as lack of progress with
    `of_evaluation`."""

    cell_seconds: float | None = None
    phase_seconds: float | None = None
    of_evaluation: bool = True


def limits_for(devices: int, cell_seconds: float | None, phase_seconds: float | None) -> Limits:
    """The limits of a cell on so many devices. Without one of the user's, a phase has a default."""
    if phase_seconds is not None:
        return Limits(cell_seconds, phase_seconds)
    default = PHASE_SECONDS if devices > 1 else SINGLE_PHASE_SECONDS
    return Limits(cell_seconds, default, of_evaluation=False)


@dataclass(frozen=True)
class Failed:
    """A rank that ended badly, by itself. `at` is in seconds since the epoch; `exit_code` is none
    where only its own word is known; `why` is the runner's, where the rank left none."""

    rank: int
    at: float
    exit_code: int | None = None
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """How the processes of a cell came to their end.

    `exit_code`, the first process's, is negative for a signal, as in multiprocessing.
    `memory_kills` counts the processes that the kernel killed for want of memory meanwhile.
    `standing` says where the ranks stood when a limit had passed, and `stood` is their own word.
    """

    exit_code: int
    cause: Cause = "ended"
    limit_seconds: float | None = None
    stop_signal: int | None = None
    memory_kills: int = 0
    exit_codes: Mapping[int, int] = field(default_factory=dict)
    failed: tuple[Failed, ...] = ()
    standing: str = ""
    stood: Mapping[int, RankState] = field(default_factory=dict)


class Watched:
    """The processes of one cell on this machine. `poll` them until it gives an Outcome."""

    def __init__(
        self, processes: Sequence[Process], working: Path, limits: Limits, ranks: Ranks
    ) -> None:
        self.working, self.limits, self.ranks = working, limits, ranks
        self.processes = {ranks.first_rank + i: each for i, each in enumerate(processes)}
        # One command stands for all the ranks that it starts.
        whole = isinstance(processes[0], Launched)
        here = len(processes) if not whole else ranks.world_size
        self.remote = set(range(ranks.world_size)) - set(
            range(ranks.first_rank, ranks.first_rank + here)
        )
        self.states: dict[int, RankState] = {}
        self.failed: dict[int, Failed] = {}
        self.cause: Cause = "ended"
        self.standing, self.stood = "", dict[int, RankState]()
        self._began = self._looked = time.monotonic()
        self._progressed: dict[int, tuple[object, float]] = {}
        self._beaten: dict[int, tuple[object, float]] = {}
        self._memory_kills = memory_kills()
        self._term_at = self._kill_at = self._released_by = float("inf")
        self._told = False
        self._ended_here: float | None = None
        self._killed_pids: set[int] = set()
        self._swept: set[int] = set()

    @property
    def sentinels(self) -> list[int]:
        """To wait for, with a time limit: one is ready when its process has ended."""
        return [each.sentinel for each in self.processes.values() if each.exitcode is None]

    def pids(self) -> set[int]:
        """Of all the processes on this machine."""
        return {each.pid for process in self.processes.values() for each in family(process)}

    def poll(self, stop: Sequence[int]) -> Outcome | None:
        """Look once; gives the outcome when all have ended. `stop` are the signals received: the
        first asks the ranks to finish, the second, or GRACE_SECONDS, kills them."""
        now = time.monotonic()
        self._look(now)
        if self._all_ended(now):
            return None if self._memory_is_held(now) else self._outcome(stop)
        if self._kill_at == float("inf"):
            self._judge(now, stop)
        if len(stop) > 1:
            self.kill()
        if now >= self._term_at:
            self._term_at, self._told = float("inf"), True
            for process in self._living():
                ask_to_end(process)
        if now >= self._kill_at:
            self._note_overdue()
            self.kill()
        return None

    def kill(self) -> None:
        """SIGKILL to every process here and to what it started."""
        self._told = True
        self._killed_pids |= self.pids()
        for process in self.processes.values():
            kill_group(process)

    def _note_overdue(self) -> None:
        """Ranks that are still there long after rank 0 has ended well have not done so."""
        if self.cause != "ended" or self.failed:
            return
        for rank, process in self.processes.items():
            if process.exitcode is None:
                why = f"rank {rank} did not end within {GRACE_SECONDS:g} s of rank 0"
                self.failed[rank] = Failed(rank, time.time(), None, why)

    def _living(self) -> list[Process]:
        return [each for each in self.processes.values() if each.exitcode is None]

    def _look(self, now: float) -> None:
        """Read the ranks' files, and note which have failed."""
        ended = [rank for rank, each in self.processes.items() if each.exitcode is not None]
        if now - self._looked >= STATE_SECONDS or len(ended) == len(self.processes):
            self._looked = now
            for state in state_files.read_states(self.working):
                self._note(state, now)
        for rank in ended:
            if rank not in self._swept:
                # Whatever it started itself must not go on without it.
                kill_group(self.processes[rank])
                self._swept.add(rank)
            code = self.processes[rank].exitcode
            if code != 0 and rank not in self.failed and not self._told:
                at = time.time()
                if rank in self.states and code in SUDDEN:
                    at = self.states[rank].beat or at
                self.failed[rank] = Failed(rank, at, code)

    def _note(self, state: RankState, now: float) -> None:
        rank = state.rank
        self.states[rank] = state
        for seen, mark in (
            (self._progressed, (state.phase, state.step, state.progressed)),
            (self._beaten, state.beat),
        ):
            if rank not in seen or seen[rank][0] != mark:
                seen[rank] = (mark, now)
        if state.status in (None, "ok") or (self._told and rank not in self.failed):
            return
        code = self.failed[rank].exit_code if rank in self.failed else state.exit_code
        self.failed[rank] = Failed(rank, state.beat or time.time(), code)

    def _judge(self, now: float, stop: Sequence[int]) -> None:
        """Decide whether the processes are to end, and when."""
        limit = self.limits.cell_seconds
        if stop:
            self.cause, self._term_at, self._kill_at = "stopped", now, now + GRACE_SECONDS
        elif limit is not None and now - self._began > limit:
            self.cause, self._term_at, self._kill_at = "timeout", now, now + GRACE_SECONDS
            if self.ranks.world_size > 1:
                self.standing = self._ask_where()
        elif self._stuck(now):
            self.cause, self._kill_at = "stuck", now
            self.standing = self._ask_where()
        elif self.failed or self._lost(now):
            self._term_at = now + PEER_GRACE_SECONDS
            self._kill_at = self._term_at + PEER_KILL_SECONDS
        elif 0 in self.processes and self.processes[0].exitcode is not None:
            self._kill_at = now + GRACE_SECONDS

    def _stuck(self, now: float) -> bool:
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

    def _lost(self, now: float) -> bool:
        """Whether a rank on another machine has gone silent; it is noted as failed."""
        for rank in self.remote:
            state = self.states.get(rank)
            if state is not None and state.status is not None:
                continue
            since = self._beaten[rank][1] if rank in self._beaten else self._began
            if now - since > (LOST_SECONDS if state is not None else START_SECONDS):
                where = f" on {state.host}" if state is not None else ""
                why = f"rank {rank}{where} has shown no sign of life for {now - since:.0f} s"
                beat = state.beat if state is not None else None
                self.failed[rank] = Failed(rank, beat or time.time(), None, why)
        return not self.remote.isdisjoint(self.failed)

    def _ask_where(self) -> str:
        now = time.monotonic()
        silent = {rank: now - seen for rank, (_, seen) in self._beaten.items()}
        for state in state_files.read_states(self.working):
            self.states[state.rank] = state
        self.stood = dict(self.states)
        return stalled_ranks.describe(
            stalled_ranks.look(self.processes, self.stood, silent, self.working)
        )

    def _all_ended(self, now: float) -> bool:
        if self._living():
            return False
        if self._ended_here is None:
            self._ended_here = now
        # Only the machine of rank 0 keeps the record, and waits for what the others have to say.
        unheard = [
            rank
            for rank in self.remote - set(self.failed)
            if rank not in self.states or self.states[rank].exit_code is None
        ]
        return not (unheard and 0 in self.processes and now - self._ended_here < GRACE_SECONDS)

    def _memory_is_held(self, now: float) -> bool:
        """Whether a GPU has not yet given back what a killed process held."""
        if not self._killed_pids or now > self._released_by:
            return False
        if self._released_by == float("inf"):
            self._released_by = now + RELEASE_SECONDS
        gpus = {state.device for state in self.states.values() if state.device}
        held = occupants([gpu for gpu in gpus if gpu.startswith("GPU-")])
        return any(occupant.pid in self._killed_pids for occupant in held)

    def _outcome(self, stop: Sequence[int]) -> Outcome:
        for process in self.processes.values():
            process.join()
            if isinstance(process, Launched):
                own = [each.pid for each in self.states.values() if each.host == gethostname()]
                kill_strays([pid for pid in own if pid is not None], self.working)
        codes = {
            rank: 255 if process.exitcode is None else process.exitcode
            for rank, process in self.processes.items()
        }
        limit = {"timeout": self.limits.cell_seconds, "stuck": self.limits.phase_seconds}
        whole = len(codes) == self.ranks.world_size - len(self.remote)
        return Outcome(
            exit_code=next(iter(codes.values())),
            cause=self.cause,
            limit_seconds=limit.get(self.cause),
            stop_signal=next(iter(stop), None) if self.cause == "stopped" else None,
            memory_kills=memory_kills() - self._memory_kills,
            exit_codes=codes if whole else {},
            failed=tuple(self.failed.values()),
            standing=self.standing,
            stood=self.stood,
        )


def watch(
    processes: Sequence[Process],
    working: Path,
    limits: Limits,
    stop: Callable[[], list[int]],
    show: Callable[[Progress], None],
    ranks: Ranks | None = None,
) -> Outcome:
    """Wait for the end of one cell's processes; `stop()` gives the signals received so far."""
    watched = Watched(processes, working, limits, ranks or Ranks())
    while (outcome := watched.poll(stop())) is None:
        connection.wait(watched.sentinels, POLL_SECONDS)
        show(read_progress(working))
    return outcome
