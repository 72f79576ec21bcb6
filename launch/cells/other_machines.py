"""A cell on several machines: all but the first start their ranks and follow the first."""

from __future__ import annotations

import contextlib
import socket
import time
from multiprocessing import connection
from pathlib import Path

from harness.ranks import state_files
from harness.ranks.launch_command import MODULE
from harness.records.ranks import RankState
from harness.records.reading import read_record
from harness.records.store import Store
from harness.system.files import write_atomically
from launch.cells import stalled_ranks, start
from launch.cells.devices import Grant
from launch.cells.finish import death_without_report
from launch.cells.start import Rendezvous
from launch.cells.watch import (
    PEER_GRACE_SECONDS,
    POLL_SECONDS,
    START_SECONDS,
    CellExit,
    Limits,
    RankProcesses,
)
from launch.processes.server import start_server
from launch.processes.stop_signals import Signals, stop_signals
from launch.processes.workers import Ranks, start_ranks
from matrices.cell import Cell
from matrices.errors import UserError


def follow(
    store: Store,
    cell: Cell,
    job: str,
    node_rank: int,
    grant: Grant,
    worker: str = MODULE,
) -> int:
    """Start this machine's ranks of the cell that the first machine measures, and wait for them.

    Waits until the first machine's runner has announced the working directory of this `job`. Ends
    the ranks on a stop signal, and when the first machine has finished the record or removed the
    directory. Returns 0 when all ranks here ended well, else 1. Raises UserError when there is no
    such directory after START_SECONDS.
    """
    with stop_signals() as signals:
        server = start_server([worker])
        key, working, meeting = _wait_for_first(store, cell, job)
        ranks = start.ranks(cell, working, grant, meeting, node_rank)
        signals.raising = False
        lock = store.worker_lock(key)
        processes = start_ranks(server, worker, working, lock, ranks)
        rank_processes = RankProcesses(processes, working, Limits(), ranks)
        outcome = _wait_for_end(rank_processes, working, signals)
        with contextlib.suppress(FileNotFoundError):  # the first machine has published the cell
            _write_exits(working, ranks, outcome)
    return 0 if not outcome.failed and outcome.cause == "ended" else 1


def _wait_for_first(store: Store, cell: Cell, job: str) -> tuple[str, Path, Rendezvous]:
    """The first machine's key of the cell, working directory and rendezvous. Its processors, and
    with them its key, may differ from this machine's."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        for key, working in store.abandoned():
            if key.startswith(cell.cell_id[:12]):
                found = start.announced(working)
                if found is not None and found.job == job:
                    return key, working, found
        time.sleep(POLL_SECONDS)
    raise UserError(
        f"the first machine has not begun {cell.cell_id[:12]} within {START_SECONDS:g} s; do all "
        f"machines of this cell see {store.root}?"
    )


def _wait_for_end(processes: RankProcesses, working: Path, signals: Signals) -> CellExit:
    over_at = float("inf")
    inspected = False
    while (outcome := processes.poll(signals.received)) is None:
        connection.wait(processes.sentinels, POLL_SECONDS)
        if not inspected and stalled_ranks.stacks_are_requested(working):
            with contextlib.suppress(FileNotFoundError):  # the first machine has published the cell
                stalled_ranks.inspect(processes.processes, processes.states, {}, working)
            inspected = True
        over_at = min(over_at, time.monotonic()) if _is_over(working) else float("inf")
        if time.monotonic() - over_at > PEER_GRACE_SECONDS:
            processes.kill()
    return outcome


def _is_over(working: Path) -> bool:
    """Whether the first machine has ended its work on the cell."""
    try:
        return read_record(working / "record.json").ended is not None
    except UserError:
        return not working.exists()


def _write_exits(working: Path, ranks: Ranks, outcome: CellExit) -> None:
    """Write how each process here ended into its rank's file, where the first machine reads it."""
    states = {state.rank: state for state in state_files.read_states(working)}
    for rank, code in outcome.exit_codes.items():
        state = states.get(rank, RankState(rank=rank, world_size=ranks.world_size))
        changes: dict[str, object] = {"exit_code": code}
        if state.status is None and code != 0:
            log = state_files.log_path(working, rank)
            who, phase = f"rank {rank}", state.phase or "starting"
            death = death_without_report(code, phase, log, who, outcome.memory_kills)
            # The first machine adds the rank's name.
            reason = death["reason"].removeprefix(f"{who} ").removeprefix("was ")
            reason += f" on {socket.gethostname()}"
            changes |= {"status": death["status"], "failure": death["failure"], "reason": reason}
        path = state_files.state_path(working, rank)
        write_atomically(path, state.model_copy(update=changes).model_dump_json(indent=1) + "\n")
