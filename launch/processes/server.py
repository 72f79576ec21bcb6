"""The fork server: imports the heavy stack once, and every worker is forked from it.

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
    """The process that workers are forked from, and what it has written: libraries greet and warn
    when they are imported, which is of interest only if it fails."""

    context: ForkServerContext
    output: IO[bytes]
    keeper: Connection | None = None

    def start(self, target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
        """Fork a process. It is killed when this one is gone, even if something has frozen it.

        Waits for the server's imports, the first time and when it was killed meanwhile. Raises
        EOFError or OSError when the server dies.
        """
        with _inherited(self.output.fileno()):
            forkserver.ensure_running()
        process = self.context.Process(target=target, args=arguments)
        process.start()
        self.keep(process.pid)
        return process

    def keep(self, pid: int | None) -> None:
        """Have a process group killed when this process is gone, even one that is frozen.

        A worker sees to that itself (`follow_parent`), unless something has stopped it.
        """
        for _ in range(2):
            if self.keeper is None:
                receiver, self.keeper = self.context.Pipe(duplex=False)
                keeper = self.context.Process(target=_keep, args=(receiver,), daemon=True)
                keeper.start()
                receiver.close()
                # At exit the keeper is waited for, and it waits for this.
                util.Finalize(self, self.keeper.close, exitpriority=10)
            try:
                self.keeper.send(pid)
            except OSError:
                self.keeper = None  # somebody killed it
            else:
                return

    def said(self) -> str:
        """The end of what the server and the processes without a log of their own have written."""
        self.output.seek(0)
        return self.output.read()[-4000:].decode(errors="replace").strip()


def start_server(preload: list[str]) -> Server:
    """Start the process that all workers are forked from, with modules imported.

    Returns at once; the first process started waits for the imports.
    """
    # Explicit, so that a forked worker and the recorded command compute with equally many threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(provenance.cpu_threads()))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([FORK_SERVER, *preload])
    output = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as the server
    with _inherited(output.fileno()):
        forkserver.ensure_running()
    return Server(context, output)


@contextlib.contextmanager
def _written_to(output: int) -> Iterator[None]:
    """What a process started in the block writes goes to `output`, a descriptor."""
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
    """What a server started in the block inherits: an output, the name of its runner, a safe path,
    and stop signals blocked until it ignores them itself. One that comes to the runner meanwhile is
    delivered at the end of the block."""
    # A `harness.py` of the user's must not be imported.
    variables = {"PYTHONSAFEPATH": "1", RUNNER: str(os.getpid())}
    before = {name: os.environ.get(name) for name in variables}
    with _written_to(output):
        # Before the signals are blocked, as starting it unblocks them. What ranks leave to it, it
        # complains of at the end.
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


def follow_parent() -> None:
    """Make this process the leader of its own group, and the group die with the runner.

    The kernel's way, of `harness.system.parent_death`, would end this process alone, by the death
    of the fork server, and leave behind what it has started.
    """
    os.setsid()
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def die_with(sentinel: int) -> None:
        connection.wait([sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=die_with, args=(parent.sentinel,), daemon=True).start()


def _keep(receiver: Connection) -> None:
    """Kill the groups whose leaders' pids were sent, once the sender is gone."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # multiprocessing ends it with the runner
    kept: dict[int, int] = {}
    while True:
        try:
            pid = receiver.recv()
        except (EOFError, OSError):
            break
        # A pid may be given to another process, what it opened stays with the first.
        for ended in [pid for pid, opened in kept.items() if connection.wait([opened], 0)]:
            os.close(kept.pop(ended))
        with contextlib.suppress(ProcessLookupError):
            kept[pid] = os.pidfd_open(pid)
    for pid, opened in kept.items():
        if not connection.wait([opened], 0):
            kill_group(pid)
