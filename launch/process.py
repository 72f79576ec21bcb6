"""One worker process: started, watched and stopped.

Runner and worker share files and an exit code, nothing else.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
from filelock import FileLock

from launch.server import Server, follow_parent

POLL_SECONDS = 0.5
# A worker told to stop writes its record in this time, or is killed.
GRACE_SECONDS = 15.0

ACCELERATE = "accelerate.commands.accelerate_cli"

Cause = Literal["ended", "timeout", "stopped"]


@dataclass(frozen=True)
class Progress:
    """What a worker is doing now: the content of `progress.json`."""

    phase: str = "starting"
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a worker process came to its end.

    `exit_code` is negative for a signal, as in multiprocessing. `memory_kills` counts the
    processes that the kernel killed for want of memory meanwhile.
    """

    exit_code: int
    cause: Cause = "ended"
    limit_seconds: float | None = None
    stop_signal: int | None = None
    memory_kills: int = 0


def _worker_main(module: str, working: str, worker_lock: str) -> None:
    follow_parent()
    log = os.open(Path(working) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # Held until this process is gone: a runner that dies gives up its claim a moment earlier.
    with FileLock(worker_lock, timeout=GRACE_SECONDS, thread_local=False):
        code = importlib.import_module(module).run(Path(working) / "cell.json", Path(working))
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)


class Process(Protocol):
    """A process to watch: multiprocessing's, or one that was launched by an argv."""

    @property
    def pid(self) -> int | None: ...
    @property
    def sentinel(self) -> int: ...
    @property
    def exitcode(self) -> int | None: ...
    def join(self) -> None: ...


def start_worker(server: Server, module: str, working: Path, worker_lock: Path) -> Process:
    """Fork a worker for the `cell.json` in a working directory, leader of its own session."""
    process = server.context.Process(
        target=_worker_main, args=(module, str(working), str(worker_lock))
    )
    process.start()
    return process


def watch(
    process: Process,
    working: Path,
    limit_seconds: float | None,
    stop: Callable[[], list[int]],
    show: Callable[[Progress], None],
) -> Outcome:
    """Wait for the end of a worker; `stop()` gives the signals received so far.

    The first of them, or the limit, asks the worker to finish its record; the second, or
    GRACE_SECONDS, kills its whole group.
    """
    kills = memory_kills()
    began = time.monotonic()
    cause: Cause = "ended"
    kill_at = float("inf")
    while not connection.wait([process.sentinel], POLL_SECONDS):
        show(read_progress(working))
        elapsed = time.monotonic() - began
        over = limit_seconds is not None and elapsed > limit_seconds
        if cause == "ended" and (stop() or over):
            cause = "stopped" if stop() else "timeout"
            kill_at = elapsed + GRACE_SECONDS
            _ask_to_end(process)
        if elapsed > kill_at or len(stop()) > 1:
            _kill_group(process)
    process.join()
    # Whatever it started itself must not disturb the next measurement.
    _kill_group(process)
    return Outcome(
        exit_code=process.exitcode if process.exitcode is not None else 255,
        cause=cause,
        limit_seconds=limit_seconds,
        stop_signal=next(iter(stop()), None),
        memory_kills=memory_kills() - kills,
    )


def _ask_to_end(process: Process) -> None:
    """SIGTERM to the worker, which is the process itself or what `accelerate launch` started."""
    try:
        first = psutil.Process(process.pid)
        behind = isinstance(process, Launched) and process.by_accelerate
        for worker in (first.children() if behind else []) or [first]:
            worker.terminate()
    except psutil.NoSuchProcess:
        return


def _kill_group(process: Process) -> None:
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class Launched:
    """A worker started by a command, as by hand, leader of its own session. Linux only."""

    def __init__(self, argv: list[str], log: Path, hold: int) -> None:
        """`hold` is a descriptor that the command keeps open for as long as it lives."""
        with log.open("ab") as file:
            self.popen = subprocess.Popen(  # noqa: S603 - an argv of our own making, no shell
                argv,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                pass_fds=(hold,),
                # `python -m` would look in the current directory first.
                env=os.environ | {"PYTHONSAFEPATH": "1"},
            )
        # accelerate itself only waits for the worker, and dies of a signal without passing it on.
        self.by_accelerate = Path(argv[0]).name == "accelerate" or ACCELERATE in argv
        self.pid: int | None = self.popen.pid
        self.sentinel = os.pidfd_open(self.popen.pid)

    @property
    def exitcode(self) -> int | None:
        return self.popen.returncode

    def join(self) -> None:
        self.popen.wait()
        os.close(self.sentinel)


def read_progress(working: Path) -> Progress:
    """The worker's `progress.json`, or the default before there is one."""
    try:
        plain: dict[str, Any] = json.loads((working / "progress.json").read_text())
    except FileNotFoundError:
        return Progress()
    known = Progress.__dataclass_fields__
    return Progress(**{name: value for name, value in plain.items() if name in known})


def memory_kills() -> int:
    """Processes the kernel has killed for want of memory: machine-wide, and in our cgroup."""
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
