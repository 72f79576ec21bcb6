"""Where the ranks of a cell stand when a limit has passed, and which of them holds up the rest."""

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
from launch.processes.workers import Process, family

# Heartbeats come every second; a process that is only busy misses a few.
SILENT_SECONDS = 10.0
# faulthandler writes at once, from the signal's handler.
STACK_SECONDS = 5.0
PY_SPY_SECONDS = 20.0
# The order of a cell's phases, for who lags behind whom; within training the step comes first.
ORDER = (
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
# What a frame tells of the part of a step: functions of torch and transformers.
_PARTS = (
    (re.compile(r"_engine_run_backward"), "backward"),
    (re.compile(r"torch/optim/\w+\.py"), "optimizer step"),
    (re.compile(r"compute_loss"), "forward"),
)


@dataclass(frozen=True)
class Standing:
    """One rank at that moment. `step` is the last it has ended, `silent_seconds` are since its last
    heartbeat, where that is long ago."""

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
        """What can be compared: the rank with the least holds up the others."""
        return self.step or 0, ORDER.index(self.phase) if self.phase in ORDER else 0


def look(
    processes: Mapping[int, Process],
    states: Mapping[int, RankState],
    silent: Mapping[int, float],
    working: Path,
) -> list[Standing]:
    """Ask every process here for the stacks of its threads, kept beside the record, and tell where
    each rank stands. Frozen ones go on after this. `silent` are seconds since the last heartbeat.
    """
    families = {rank: family(process) for rank, process in processes.items()}
    frozen = {rank for rank, members in families.items() if _any_frozen(members)}
    paths = {rank: state_files.stack_path(working, rank) for rank in {*states, *processes}}
    before = {rank: _size(path) for rank, path in paths.items()}
    _wanted(working).touch()
    for members in families.values():
        for member in members:
            _ask_for_stacks(member)
    asked = {rank for rank, path in paths.items() if path.exists()}
    _until_written({rank: paths[rank] for rank in asked}, before)
    for rank, members in families.items():
        if _size(paths[rank]) <= before[rank]:
            _py_spy(members, paths[rank])
    return [
        Standing(
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


def _until_written(paths: Mapping[int, Path], before: Mapping[int, int]) -> None:
    """Wait until every file has grown and grows no more."""
    until = time.monotonic() + STACK_SECONDS
    sizes: dict[int, int] = {}
    while time.monotonic() < until:
        time.sleep(0.1)
        last, sizes = sizes, {rank: _size(path) for rank, path in paths.items()}
        if last == sizes and all(sizes[rank] > before[rank] for rank in paths):
            return


def _wanted(working: Path) -> Path:
    """Its presence asks the other machines of a cell for the stacks of their ranks."""
    return working / state_files.DIRECTORY / "stacks-wanted"


def stacks_are_wanted(working: Path) -> bool:
    return _wanted(working).exists()


def _any_frozen(members: list[psutil.Process]) -> bool:
    return any(_status(member) in (psutil.STATUS_STOPPED, "tracing-stop") for member in members)


def _status(member: psutil.Process) -> str:
    try:
        return str(member.status())
    except psutil.NoSuchProcess:
        return ""


def _ask_for_stacks(member: psutil.Process) -> None:
    """SIGUSR1 to a process that has a handler for it, and a frozen one on its way again: what it
    was sent meanwhile comes before its next instruction."""
    try:
        if _catches(member.pid, signal.SIGUSR1):
            member.send_signal(signal.SIGUSR1)
        if _any_frozen([member]):
            member.resume()
    except psutil.NoSuchProcess:
        return


def _catches(pid: int, number: int) -> bool:
    """Whether a process handles a signal that would otherwise end it (proc(5), SigCgt)."""
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
    """The stacks of a process that does not answer, by py-spy where that is installed."""
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
    """The collective that a dumped stack is in; innermost frames come first."""
    if not path.exists():
        return None
    for direct, spied in _COLLECTIVE.findall(path.read_text(errors="replace")):
        name = direct or spied
        if name not in _WRAPPERS:
            return str(name)
    return None


def _part(path: Path) -> str | None:
    """The part of a step that a dumped stack is in, by its innermost frame that tells."""
    if not path.exists():
        return None
    for line in path.read_text(errors="replace").splitlines():
        for sign, name in _PARTS:
            if sign.search(line):
                return name
    return None


def describe(standings: list[Standing]) -> str:
    """`rank 1 stopped in forward of step 3 (process frozen); rank 0 waited in all_reduce in
    forward of step 3`, as far as it is known."""
    blamed = _blamed(standings)
    lines: dict[str, list[int]] = {}
    for standing in sorted(standings, key=lambda each: (each.rank not in blamed, each.rank)):
        lines.setdefault(_in_words(standing, blamed), []).append(standing.rank)
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {_listed(ranks)} {text}"
        for text, ranks in lines.items()
    )


def _blamed(standings: list[Standing]) -> set[int]:
    """The ranks that hold up the rest: frozen ones, else silent ones, else those that lag."""
    frozen = {each.rank for each in standings if each.frozen}
    silent = {each.rank for each in standings if each.silent_seconds is not None}
    if frozen or silent:
        return frozen or silent
    least = min((each.progress for each in standings), default=(0, 0))
    behind = {each.rank for each in standings if each.progress == least}
    return behind if len(behind) < len(standings) else set()


def _in_words(standing: Standing, blamed: set[int]) -> str:
    if standing.frozen:
        return f"stopped in {standing.place} (process frozen)"
    if standing.silent_seconds is not None:
        return f"stopped in {standing.place} (no sign of life for {standing.silent_seconds:.0f} s)"
    waits = f"{standing.waits_in} in {standing.place}" if standing.waits_in else standing.place
    if standing.rank in blamed:
        return f"lagged behind in {waits}"
    return f"waited in {waits}" if blamed else f"stood in {waits}"


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
