"""Finds where a cell's ranks are when a limit has passed, and which rank holds up the others."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.ranks import state_files
from harness.records.ranks import RankState
from harness.system.child_process import run
from launch.processes.workers import Process, process_tree

# Heartbeats come every second; a busy process misses a few.
SILENT_SECONDS = 10.0
# faulthandler writes at once, from the signal's handler.
STACK_SECONDS = 5.0
PY_SPY_SECONDS = 20.0
# The phases of a cell in order, to find the rank that lags.
PHASE_ORDER = (
    "starting",
    "load",
    "kbit_preparation",
    "data",
    "memory_steps",
    "train",
    "forward",
    "backward",
    "optimizer_step",
    "gather",
    "evaluation",
)
# A frame of faulthandler's or py-spy's in torch/distributed/distributed_c10d.py.
_COLLECTIVE = re.compile(
    r'(?:distributed_c10d\.py", line \d+ in (\w+))|(?:(\w+) \([^)]*distributed_c10d\.py:\d+\))'
)
_WRAPPERS = ("wrapper", "wait", "_do_wait")
# The part of a step that a frame belongs to: functions of torch and transformers.
_PARTS = (
    (re.compile(r"_engine_run_backward"), "backward"),
    (re.compile(r"torch/optim/\w+\.py"), "optimizer step"),
    (re.compile(r"compute_loss"), "forward"),
)


@dataclass(frozen=True)
class RankProgress:
    """The phase and step of one rank. `step` is the last that has ended. `silent_seconds` is the
    time since the last heartbeat, if it is more than SILENT_SECONDS."""

    rank: int
    phase: str | None
    step: int | None
    frozen: bool = False
    silent_seconds: float | None = None
    part: str | None = None
    waits_in: str | None = None

    @property
    def place(self) -> str:
        phase = (self.phase or "starting").replace("_", " ")
        if self.phase == "train" and self.step is not None:
            return f"{self.part or phase} of step {self.step + 1}"
        return f"{self.part} in {phase}" if self.part else phase

    @property
    def progress(self) -> tuple[int, int]:
        """Step and phase, for comparison: the rank with the least holds up the others."""
        return self.step or 0, PHASE_ORDER.index(self.phase) if self.phase in PHASE_ORDER else 0


def inspect(
    processes: Mapping[int, Process],
    states: Mapping[int, RankState],
    silent: Mapping[int, float],
    working: Path,
) -> list[RankProgress]:
    """The positions of all ranks. Has every process here write the stacks of its threads beside the
    record, and resumes frozen ones. `silent` are seconds since the last heartbeat.
    """
    process_trees = {rank: process_tree(process) for rank, process in processes.items()}
    frozen = {rank for rank, members in process_trees.items() if _any_frozen(members)}
    paths = {rank: state_files.stack_path(working, rank) for rank in {*states, *processes}}
    before = {rank: _size(path) for rank, path in paths.items()}
    _request_file(working).touch()
    for members in process_trees.values():
        for member in members:
            _ask_for_stacks(member)
    asked = {rank for rank, path in paths.items() if path.exists()}
    _wait_until_written({rank: paths[rank] for rank in asked}, before)
    for rank, members in process_trees.items():
        if _size(paths[rank]) <= before[rank]:
            _py_spy(members, paths[rank])
    return [
        RankProgress(
            rank,
            states[rank].phase if rank in states else None,
            states[rank].step if rank in states else None,
            rank in frozen,
            silent[rank] if silent.get(rank, 0.0) > SILENT_SECONDS else None,
            _part(paths[rank]),
            _collective(paths[rank]),
        )
        for rank in sorted(paths)
        if rank not in states or states[rank].status is None
    ]


def _wait_until_written(paths: Mapping[int, Path], before: Mapping[int, int]) -> None:
    """Wait until every file has grown and grows no more."""
    until = time.monotonic() + STACK_SECONDS
    sizes: dict[int, int] = {}
    while time.monotonic() < until:
        time.sleep(0.1)
        last, sizes = sizes, {rank: _size(path) for rank, path in paths.items()}
        if last == sizes and all(sizes[rank] > before[rank] for rank in paths):
            return


def _request_file(working: Path) -> Path:
    """A file that asks the other machines of a cell for the stacks of their ranks."""
    return working / state_files.DIRECTORY / "stacks-wanted"


def stacks_are_requested(working: Path) -> bool:
    return _request_file(working).exists()


def _any_frozen(members: list[psutil.Process]) -> bool:
    return any(_status(member) in (psutil.STATUS_STOPPED, "tracing-stop") for member in members)


def _status(member: psutil.Process) -> str:
    try:
        return str(member.status())
    except psutil.NoSuchProcess:
        return ""


def _ask_for_stacks(member: psutil.Process) -> None:
    """Send SIGUSR1 to a process that handles it, and resume a frozen one, which handles the signal
    first."""
    try:
        if _catches(member.pid, signal.SIGUSR1):
            member.send_signal(signal.SIGUSR1)
        if _any_frozen([member]):
            member.resume()
    except psutil.NoSuchProcess:
        return


def _catches(pid: int, number: int) -> bool:
    """Whether a process handles a signal (proc(5), SigCgt)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return bool(found and int(found.group(1), 16) >> (number - 1) & 1)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _py_spy(members: list[psutil.Process], path: Path) -> None:
    """Write the stacks of a process that does not answer, with py-spy if it is installed."""
    beside = Path(sys.executable).parent / "py-spy"
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return
    for member in members:
        argv = [program, "dump", "--pid", str(member.pid)]
        try:
            done = run(argv, PY_SPY_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            with path.open("a") as file:
                file.write(done.stdout)


def _collective(path: Path) -> str | None:
    """The collective in a dumped stack; innermost frames come first."""
    if not path.exists():
        return None
    for direct, spied in _COLLECTIVE.findall(path.read_text(errors="replace")):
        name = direct or spied
        if name not in _WRAPPERS:
            return str(name)
    return None


def _part(path: Path) -> str | None:
    """The part of a step in a dumped stack, by the innermost frame that has one."""
    if not path.exists():
        return None
    for line in path.read_text(errors="replace").splitlines():
        for pattern, name in _PARTS:
            if pattern.search(line):
                return name
    return None


def positions_text(positions: list[RankProgress]) -> str:
    """`rank 1 stopped in forward of step 3 (process frozen); rank 0 waited in all_reduce in
    forward of step 3`."""
    blamed = _blamed(positions)
    lines: dict[str, list[int]] = {}
    for position in sorted(positions, key=lambda each: (each.rank not in blamed, each.rank)):
        lines.setdefault(_position_text(position, blamed), []).append(position.rank)
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {_ranks_text(ranks)} {text}"
        for text, ranks in lines.items()
    )


def _blamed(positions: list[RankProgress]) -> set[int]:
    """The ranks that hold up the others: frozen ones, else silent ones, else those that lag."""
    frozen = {each.rank for each in positions if each.frozen}
    silent = {each.rank for each in positions if each.silent_seconds is not None}
    if frozen or silent:
        return frozen or silent
    least = min((each.progress for each in positions), default=(0, 0))
    behind = {each.rank for each in positions if each.progress == least}
    return behind if len(behind) < len(positions) else set()


def _position_text(position: RankProgress, blamed: set[int]) -> str:
    if position.frozen:
        return f"stopped in {position.place} (process frozen)"
    if position.silent_seconds is not None:
        return f"stopped in {position.place} (no sign of life for {position.silent_seconds:.0f} s)"
    waits = f"{position.waits_in} in {position.place}" if position.waits_in else position.place
    if position.rank in blamed:
        return f"lagged behind in {waits}"
    return f"waited in {waits}" if blamed else f"stood in {waits}"


def _ranks_text(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
