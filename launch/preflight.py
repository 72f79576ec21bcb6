"""Ask `harness.preflight`, in a process of its own, what would fail before anything starts."""

from __future__ import annotations

import importlib
import os
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection

from harness.problems import Problem
from launch.server import Server, follow_parent
from matrices.cell import Cell
from matrices.errors import UserError


def problems(server: Server, module: str, cells: Sequence[Cell]) -> list[Problem]:
    """What the user has to put right, and before which of these cells can run.

    Waits for the fork server's imports first. Raises UserError when something keeps the run as a
    whole from starting, and RuntimeError with the process's own traceback when the check itself
    breaks.
    """
    receiver, sender = server.context.Pipe(duplex=False)
    process = server.context.Process(target=_main, args=(module, list(cells), sender))
    try:
        process.start()
    except (EOFError, OSError) as error:
        raise RuntimeError(f"the stack cannot be imported:\n{server.said()}") from error
    sender.close()
    try:
        found, wrong, broken = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        raise RuntimeError(f"preflight died with exit code {code}:\n{server.said()}") from None
    except BaseException:
        # Stopped by the user: whatever it is importing or downloading is of no use now.
        if process.pid is not None and process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
        raise
    process.join()
    if broken:
        raise RuntimeError(f"preflight failed:\n{broken}")
    if wrong is not None:
        raise wrong
    return list(found)


def _main(module: str, cells: list[Cell], sender: Connection) -> None:
    follow_parent()
    try:
        found = importlib.import_module(module).problems(cells)
    except UserError as error:
        sender.send(([], error, None))
    except Exception:
        sender.send(([], None, traceback.format_exc()))
    else:
        sender.send((found, None, None))
