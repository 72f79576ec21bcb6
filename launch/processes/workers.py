"""The worker processes of one cell: one, or one for each rank. `launch.cells.watch` watches them.

Runner and worker share only files and an exit code.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil
from filelock import FileLock

from harness.ranks import launch_environment, state_files
from harness.ranks.launch_command import runs_accelerate
from harness.ranks.launch_environment import RankPosition
from harness.system import child_process, parent_death
from launch.processes.server import Server, end_with_runner
from matrices.errors import UserError

# A worker writes its record within this time after SIGTERM, or is killed.
GRACE_SECONDS = 15.0

# multiprocessing's exit code of a process whose fork server died before it.
LOST_EXIT_CODE = 255
FORK_SERVER_NAME = "the process that imports the stack"


@dataclass(frozen=True)
class Ranks:
    """The processes of one cell on this machine.

    `launch_arguments` are those of the recorded `accelerate launch`, up to its `--module`; empty
    for a cell of one process. `environment` is set in every one of them before anything else.
    """

    places: tuple[RankPosition, ...] = (RankPosition(),)
    launch_arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def first_rank(self) -> int:
        return self.places[0].rank

    @property
    def world_size(self) -> int:
        return self.places[0].world_size


class Process(Protocol):
    """A process to watch: multiprocessing's, or one started by an argv."""

    @property
    def pid(self) -> int | None: ...
    @property
    def sentinel(self) -> int: ...
    @property
    def exitcode(self) -> int | None: ...
    def join(self) -> None: ...


def start_ranks(
    server: Server, module: str, working: Path, worker_lock: Path, ranks: Ranks
) -> list[Process]:
    """Fork a worker for every place, each the leader of its own session, for the `cell.json` in a
    working directory. Rank 0 holds the worker lock while it lives. Raises UserError when the fork
    server is killed."""
    (working / state_files.DIRECTORY).mkdir(exist_ok=True)
    kills = memory_kills()
    given = (module, str(working), str(worker_lock), ranks)
    try:
        return [server.start(_rank_main, *given, place) for place in ranks.places]
    except (EOFError, OSError) as error:
        raise process_died(FORK_SERVER_NAME, None, server, kills) from error


def process_died(who: str, code: int | None, server: Server, kills: int) -> UserError:
    """The error of a process that ended without an answer: what killed it, or its last output.
    `kills` are the memory_kills before its start."""
    if memory_kills() > kills:
        return UserError(
            f"the kernel killed {who}: the machine's memory ran out; free some memory and run the "
            "same command again"
        )
    how = child_process.describe_exit(code) if code not in (None, LOST_EXIT_CODE) else "died"
    lines = server.last_output().splitlines()
    last = f" ({lines[-1].strip()})" if lines else ""
    return UserError(
        f"{who} {how}{last}; run the same command again, and 'tunebench doctor' if it dies again"
    )


def _rank_main(
    module: str, working: str, worker_lock: str, ranks: Ranks, place: RankPosition
) -> None:
    end_with_runner()
    directory = Path(working)
    path = state_files.log_path(directory, place.rank)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.update(ranks.environment)
    # Held until this process has ended; a dying runner releases its claim earlier.
    lock = FileLock(worker_lock, timeout=GRACE_SECONDS, thread_local=False)
    with lock if place.rank == 0 else contextlib.nullcontext():
        if ranks.launch_arguments:
            launch_environment.set_environment(list(ranks.launch_arguments), place)
        code = importlib.import_module(module).run(directory / "cell.json", directory)
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)


def free_port(wanted: int = 0, address: str = "") -> int:
    """A TCP port that nothing listens on, or the wanted one. Raises UserError when that one is in
    use."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As torch's own server does: a port with closing connections only is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, wanted))
        except OSError as error:
            raise UserError(
                f"port {wanted} cannot be had ({error.strerror}); choose another, or 0 for any "
                "free one",
                key="main_process_port",
            ) from error
        return int(probe.getsockname()[1])


class CommandProcess:
    """Workers that a command starts; it is the leader of its own session. Linux only."""

    def __init__(
        self, argv: list[str], log: Path, hold: int, environment: Mapping[str, str] | None = None
    ) -> None:
        """`hold` is a descriptor that the command keeps open until it ends."""
        with log.open("ab") as file:
            # `python -m`, also accelerate's, would look in the current directory first.
            ours = {"PYTHONSAFEPATH": "1", parent_death.VARIABLE: "1"}
            self.popen = child_process.start(
                argv, file, file, {**ours, **(environment or {})}, [hold]
            )
        # accelerate does not pass a signal on to its workers.
        self.by_accelerate = runs_accelerate(argv)
        self.pid: int | None = self.popen.pid
        self.sentinel = os.pidfd_open(self.popen.pid)

    @property
    def exitcode(self) -> int | None:
        return self.popen.poll()

    def join(self) -> None:
        self.popen.wait()
        os.close(self.sentinel)


def process_tree(process: Process) -> list[psutil.Process]:
    """The process and its descendants that still exist."""
    try:
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def terminate_worker(process: Process) -> None:
    """Send SIGTERM to the worker: the process itself, or the children of `accelerate launch`."""
    try:
        first = psutil.Process(process.pid)
        has_workers = isinstance(process, CommandProcess) and process.by_accelerate
        for worker in (first.children() if has_workers else []) or [first]:
            worker.terminate()
    except psutil.NoSuchProcess:
        return


def kill_group(process: Process) -> None:
    """Kill the process, its group, and the sessions of its descendants."""
    if process.pid is None:
        return
    # torchrun puts each rank into a session of its own.
    members = process_tree(process)
    for pid in dict.fromkeys([process.pid, *(each.pid for each in members if _leads(each.pid))]):
        child_process.kill_group(pid)
    # A new fork is still in the group of this process.
    for each in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def kill_leftovers(pids: Iterable[int], working: Path) -> None:
    """Kill the processes that still work on a directory after their command has ended."""
    for pid in pids:
        try:
            ours = any(str(working) in part for part in psutil.Process(pid).cmdline())
        except psutil.Error:
            continue
        if ours and _leads(pid):
            child_process.kill_group(pid)


def _leads(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def memory_kills() -> int:
    """How many processes the kernel has killed because memory ran out, on the machine and in this
    cgroup."""
    sources = [Path("/proc/vmstat")]
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            sources.append(Path(f"/sys/fs/cgroup{path}/memory.events"))
        elif "memory" in controllers.split(","):
            sources.append(Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control"))
    return sum(_oom_kill_counter(source) for source in sources)


def _oom_kill_counter(source: Path) -> int:
    try:
        lines = source.read_text().splitlines()
    except OSError:  # not this kind of kernel or container
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
