"""Runs `harness.preflight.preflight` in a process of its own."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection

from harness.preflight.problems import Problem
from launch.processes.server import Server, end_with_runner
from launch.processes.workers import FORK_SERVER_NAME, kill_group, memory_kills, process_died
from matrices.cell import Cell
from matrices.errors import UserError

MODULE = "harness.preflight.preflight"
TITLE = "importing torch, transformers, trl and lm-eval; checking models, data and tasks"


def problems(server: Server, module: str, cells: Sequence[Cell]) -> list[Problem]:
    """The mistakes of the user's that stop cells, and which cells they stop.

    Waits for the fork server's imports. Raises UserError when no cell can start or the check is
    killed, and RuntimeError with the process's traceback when the check itself fails.
    """
    kills = memory_kills()
    receiver, sender = server.context.Pipe(duplex=False)
    try:
        process = server.start(_main, module, list(cells), sender)
    except (EOFError, OSError) as error:
        raise process_died(FORK_SERVER_NAME, None, server, kills) from error
    sender.close()
    try:
        found, wrong, broken = receiver.recv()
    except EOFError:
        process.join()
        who = "the check of models, data and tasks"
        raise process_died(who, process.exitcode, server, kills) from None
    except BaseException:
        # The user stopped it: its imports and downloads are useless now.
        kill_group(process)
        raise
    process.join()
    if broken:
        raise RuntimeError(f"preflight failed:\n{broken}")
    if wrong is not None:
        raise wrong
    return list(found)


def _main(module: str, cells: list[Cell], sender: Connection) -> None:
    end_with_runner()
    try:
        found = importlib.import_module(module).problems(cells)
    except UserError as error:
        sender.send(([], error, None))
    except Exception:
        sender.send(([], None, traceback.format_exc()))
    else:
        sender.send((found, None, None))
