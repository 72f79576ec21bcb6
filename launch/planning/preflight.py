"""Ask `harness.preflight.preflight`, in a process of its own, what would stop the cells."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection

from harness.preflight.problems import Problem
from launch.processes.server import Server, follow_parent
from launch.processes.workers import FORKS, died, kill_group, memory_kills
from matrices.cell import Cell
from matrices.errors import UserError


def problems(server: Server, module: str, cells: Sequence[Cell]) -> list[Problem]:
    """What the user has to put right, and before which of these cells can run.

    Waits for the fork server's imports first. Raises UserError when something keeps the run as a
    whole from starting or the check is killed, and RuntimeError with the process's own traceback
    when the check itself breaks.
    """
    kills = memory_kills()
    receiver, sender = server.context.Pipe(duplex=False)
    try:
        process = server.start(_main, module, list(cells), sender)
    except (EOFError, OSError) as error:
        raise died(FORKS, None, server, kills) from error
    sender.close()
    try:
        found, wrong, broken = receiver.recv()
    except EOFError:
        process.join()
        who = "the check of models, data and tasks"
        raise died(who, process.exitcode, server, kills) from None
    except BaseException:
        # Stopped by the user: whatever it is importing or downloading is of no use now.
        kill_group(process)
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
