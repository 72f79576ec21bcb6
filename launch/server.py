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
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from typing import IO

from harness import provenance

GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Server:
    """The process that workers are forked from, and what it has written: libraries greet and warn
    when they are imported, which is of interest only if it fails."""

    context: ForkServerContext
    output: IO[bytes]

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
    context.set_forkserver_preload(preload)
    output = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as the server
    with _inherited(output.fileno()):
        forkserver.ensure_running()
    return Server(context, output)


@contextlib.contextmanager
def _inherited(output: int) -> Iterator[None]:
    """What a process started in the block inherits: an output, deafness to stop signals, a safe
    path."""
    # Ctrl-C, `timeout` and a closed terminal signal a whole process group: the server must live on
    # to report how the worker ended. And a `harness.py` of the user's must not be imported.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in GROUP_SIGNALS}
    safe_path = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    own = os.dup(1), os.dup(2)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        yield
    finally:
        os.dup2(own[0], 1)
        os.dup2(own[1], 2)
        os.close(own[0])
        os.close(own[1])
        for number, handler in before.items():
            signal.signal(number, handler)
        if safe_path is None:
            del os.environ["PYTHONSAFEPATH"]


def follow_parent() -> None:
    """Make this process the leader of its own group, and the group die with the runner.

    The parent-death signal of Linux would not do: the parent of a forked worker is the fork
    server, which lives for as long as its children do.
    """
    os.setsid()
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def die_with(sentinel: int) -> None:
        connection.wait([sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=die_with, args=(parent.sentinel,), daemon=True).start()
