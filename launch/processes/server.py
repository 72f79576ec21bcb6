"""The fork server: it imports the stack once, and all workers are forked from it.

Importing torch, transformers, trl and lm-eval takes 10 to 15 s; a fork from a server that has them
takes 0.05 s.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker, util
from multiprocessing.connection import Connection
from typing import IO, TYPE_CHECKING, Any

from harness.records import provenance
from harness.system.child_process import kill_group
from launch.processes.fork_server import GROUP_SIGNALS, RUNNER

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, ForkServerProcess

FORK_SERVER = "launch.processes.fork_server"


@dataclass
class Server:
    """The process that workers are forked from, and its output: what libraries print when they are
    imported, shown only if it fails."""

    context: ForkServerContext
    output: IO[bytes]
    group_killer: Connection | None = None

    def start(self, target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
        """Fork a process. It is killed when this process ends, even if it is frozen.

        Waits for the server's imports the first time, and after the server was killed. Raises
        EOFError or OSError when the server dies.
        """
        with _inherited(self.output.fileno()):
            forkserver.ensure_running()
        process = self.context.Process(target=target, args=arguments)
        process.start()
        self.keep(process.pid)
        return process

    def keep(self, pid: int | None) -> None:
        """Have a process group killed when this process ends. A worker does that itself
        (`end_with_runner`), unless it is frozen."""
        for _ in range(2):
            if self.group_killer is None:
                receiver, self.group_killer = self.context.Pipe(duplex=False)
                killer = self.context.Process(target=_kill_groups, args=(receiver,), daemon=True)
                killer.start()
                receiver.close()
                # Python waits at exit for the killer, which waits for this.
                util.Finalize(self, self.group_killer.close, exitpriority=10)
            try:
                self.group_killer.send(pid)
            except OSError:
                self.group_killer = None  # somebody killed it
            else:
                return

    def last_output(self) -> str:
        """The end of the output of the server and of processes without a log of their own."""
        self.output.seek(0)
        return self.output.read()[-4000:].decode(errors="replace").strip()


def start_server(preload: list[str]) -> Server:
    """Start the fork server with the `preload` modules imported.

    Returns at once; the first process that is started waits for the imports.
    """
    # Set here so that a forked worker and the recorded command compute with as many threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(provenance.cpu_threads()))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([FORK_SERVER, *preload])
    output = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as the server
    with _inherited(output.fileno()):
        forkserver.ensure_running()
    return Server(context, output)


@contextlib.contextmanager
def _written_to(output: int) -> Iterator[None]:
    """A process that is started in the block writes to `output`, a descriptor."""
    own = os.dup(1), os.dup(2)
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        yield
    finally:
        for number, kept in enumerate(own, 1):
            os.dup2(kept, number)
            os.close(kept)


@contextlib.contextmanager
def _inherited(output: int) -> Iterator[None]:
    """A server that is started in the block inherits an output, its runner's pid, a safe import
    path, and blocked stop signals, until it ignores them itself. A signal for the runner is
    delivered at the end of the block."""
    # A `harness.py` of the user's must not be imported.
    variables = {"PYTHONSAFEPATH": "1", RUNNER: str(os.getpid())}
    before = {name: os.environ.get(name) for name in variables}
    with _written_to(output):
        # Started before the signals are blocked, because its start unblocks them. Its warnings at
        # the end go to `output` too.
        resource_tracker.ensure_running()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def end_with_runner() -> None:
    """Make this process the leader of its own group, and end the group with the runner.

    `harness.system.parent_death` would end this process alone, when the fork server dies, and leave
    its children behind.
    """
    os.setsid()
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def die_with(sentinel: int) -> None:
        connection.wait([sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=die_with, args=(parent.sentinel,), daemon=True).start()


def _kill_groups(receiver: Connection) -> None:
    """Receive the pids of group leaders, and kill their groups when the sender has ended."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # multiprocessing ends it with the runner
    kept: dict[int, int] = {}
    while True:
        try:
            pid = receiver.recv()
        except (EOFError, OSError):
            break
        # The kernel may reuse a pid; a pidfd stays with the first process.
        for ended in [pid for pid, opened in kept.items() if connection.wait([opened], 0)]:
            os.close(kept.pop(ended))
        with contextlib.suppress(ProcessLookupError):
            kept[pid] = os.pidfd_open(pid)
    for pid, opened in kept.items():
        if not connection.wait([opened], 0):
            kill_group(pid)
