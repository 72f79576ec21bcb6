"""The other machines of a cell on several: each starts its ranks and follows the first machine."""

from __future__ import annotations

import contextlib
import socket
import time
from multiprocessing import connection
from pathlib import Path

from harness.ranks import state_files
from harness.records.ranks import RankState
from harness.records.reading import read_record
from harness.records.store import Store
from harness.system.files import write_atomically
from launch.cells import stalled_ranks, start
from launch.cells.devices import Grant
from launch.cells.finish import sudden_end
from launch.cells.start import Rendezvous
from launch.cells.watch import PEER_GRACE_SECONDS, POLL_SECONDS, Limits, Outcome, Watched
from launch.processes.server import start_server
from launch.processes.stop_signals import Signals, stop_signals
from launch.processes.workers import start_ranks
from matrices.cell import Cell
from matrices.errors import UserError


def follow(
    store: Store,
    key: str,
    meeting: Rendezvous,
    node_rank: int,
    grant: Grant,
    worker: str = "harness.worker",
    wait_seconds: float = 600.0,
) -> int:
    """Start this machine's ranks of the cell that the first machine measures, and stay with them.

    Waits for the first machine's runner, given the same rendezvous, to make the working directory.
    Ends the ranks when the first machine's record is finished or its directory gone, and on a stop
    signal. Returns 0 when all ranks here ended well, else 1. Raises UserError when there is no
    such directory after `wait_seconds`.
    """
    with stop_signals() as signals:
        server = start_server([worker])
        working = _awaited(store, key, meeting, wait_seconds)
        cell = Cell.model_validate_json((working / "cell.json").read_text())
        ranks = start.ranks(cell, working, grant, meeting, node_rank)
        signals.raising = False
        lock = store.worker_lock(key)
        processes = start_ranks(server, worker, working, lock, ranks)
        watched = Watched(processes, working, Limits(), ranks)
        outcome = _to_the_end(watched, working, signals)
        with contextlib.suppress(FileNotFoundError):  # published meanwhile
            _write_down(working, watched, outcome)
    return 0 if not outcome.failed and outcome.cause == "ended" else 1


def _awaited(store: Store, key: str, meeting: Rendezvous, wait_seconds: float) -> Path:
    until = time.monotonic() + wait_seconds
    while time.monotonic() < until:
        for _, working in store.abandoned(key):
            if start.is_announced(working, meeting):
                return working
        time.sleep(POLL_SECONDS)
    raise UserError(
        f"the first machine has not begun {key} within {wait_seconds:g} s; do all machines of this "
        f"cell see {store.root}?"
    )


def _to_the_end(watched: Watched, working: Path, signals: Signals) -> Outcome:
    over_at = float("inf")
    asked = False
    while (outcome := watched.poll(signals.received)) is None:
        connection.wait(watched.sentinels, POLL_SECONDS)
        if not asked and stalled_ranks.stacks_are_wanted(working):
            with contextlib.suppress(FileNotFoundError):  # published meanwhile
                stalled_ranks.look(watched.processes, watched.states, {}, working)
            asked = True
        over_at = min(over_at, time.monotonic()) if _is_over(working) else float("inf")
        if time.monotonic() - over_at > PEER_GRACE_SECONDS:
            watched.kill()
    return outcome


def _is_over(working: Path) -> bool:
    """Whether the first machine is done with the cell, one way or another."""
    try:
        return read_record(working / "record.json").ended is not None
    except UserError:
        return not working.exists()


def _write_down(working: Path, watched: Watched, outcome: Outcome) -> None:
    """How each process here ended: the first machine learns it from the ranks' files alone."""
    states = {state.rank: state for state in state_files.read_states(working)}
    for rank, code in outcome.exit_codes.items():
        state = states.get(rank, RankState(rank=rank, world_size=watched.ranks.world_size))
        changes: dict[str, object] = {"exit_code": code}
        if state.status is None and code != 0:
            log = state_files.log_path(working, rank)
            who, phase = f"rank {rank}", state.phase or "starting"
            said = sudden_end(code, phase, log, who, outcome.memory_kills)
            # The first machine names the rank itself.
            reason = said["reason"].removeprefix(f"{who} ").removeprefix("was ")
            reason += f" on {socket.gethostname()}"
            changes |= {"status": said["status"], "failure": said["failure"], "reason": reason}
        path = state_files.state_path(working, rank)
        write_atomically(path, state.model_copy(update=changes).model_dump_json(indent=1) + "\n")
