"""A rank with the real one's files, signals and exit codes, and none of its imports.

What it does is told by the cell's seed and its rank. It waits for its runner or for a file of the
test's, never for a time.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from stand_in_worker import _save, _wait_for, problems

from harness.ranks import launch_environment
from harness.ranks.state_files import Reporter
from harness.records.memory import Memory, PhaseMemory
from harness.records.ranks import Failure
from harness.records.reading import read_record
from harness.records.record import Record
from harness.records.speed import Tokens
from matrices.cell import Cell

__all__ = ["problems", "run"]

ALL_WELL, OOM_ON_ONE, LOST_CONNECTION_FIRST, WAITS, DIES_WITHOUT_A_WORD, STAYS = range(100, 106)
GIB = 2**30
LOST = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41234"


def _enter(arguments: Sequence[str], place: launch_environment.RankPosition) -> None:
    """`launch_environment.set_environment` without accelerate's part, which imports torch."""
    os.environ.update(launch_environment.torchrun_variables(place))
    os.environ["STAND_IN_ARGUMENTS"] = " ".join(arguments)


# This module is imported by the server that every rank is forked from.
launch_environment.set_environment = _enter


class Stopped(BaseException):
    pass


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def run(cell_path: Path, output_dir: Path) -> int:
    cell = Cell.model_validate_json(cell_path.read_text())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    reporter = Reporter(output_dir, rank, world_size)
    print(f"rank {rank} of {world_size} with {os.environ['OMP_NUM_THREADS']} threads")
    print(f"launched with {os.environ['STAND_IN_ARGUMENTS']}")
    signal.signal(signal.SIGTERM, _stop)
    record = read_record(output_dir / "record.json")
    record.memory = Memory(
        headline="ledger",
        peak_bytes=(rank + 1) * GIB,
        phases={"forward": [PhaseMemory(ledger_peak_bytes=(rank + 1) * GIB)]},
    )
    reporter.state.tokens = Tokens(all=10.0 + rank, non_padding=9.0, loss=8.0)
    reporter.progress(phase="train", step=3)
    _keep(output_dir, record, rank)
    try:
        return _act(cell.seed, rank, reporter, record, output_dir)
    except Stopped:
        changes = {"status": "interrupted", "reason": "SIGTERM", "phase": "train"}
        _keep(output_dir, record.model_copy(update=changes), rank, final=True)
        reporter.end("interrupted", "SIGTERM")
        return 1


def _act(seed: int, rank: int, reporter: Reporter, record: Record, output_dir: Path) -> int:
    never = output_dir / "never"
    if seed == OOM_ON_ONE and rank == 1:
        failure = Failure(
            type="OutOfMemoryError", message="no memory", phase="backward", requested_bytes=3 * GIB
        )
        return _fail("oom", "backward: no memory", failure, reporter)
    if seed == LOST_CONNECTION_FIRST:
        if rank == 0:
            failure = Failure(type="RuntimeError", message=LOST, phase="train")
            changes = {"status": "failed", "reason": LOST, "failure": failure}
            _keep(output_dir, record.model_copy(update=changes), rank, final=True)
            code = _fail("failed", LOST, failure, reporter)
            (output_dir / "lost").touch()
            return code
        _wait_for(output_dir / "lost")
        failure = Failure(type="ValueError", message="no", phase="train")
        return _fail("failed", "train: no", failure, reporter)
    if seed == DIES_WITHOUT_A_WORD and rank == 1:
        sys.exit("what rank 1 said last")
    if seed in (WAITS, OOM_ON_ONE, DIES_WITHOUT_A_WORD) or (seed == STAYS and rank == 1):
        if seed == STAYS:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _wait_for(Path(os.environ.get("STAND_IN_GO", never)))
    reporter.end("ok")
    _keep(output_dir, record.model_copy(update={"status": "ok", "reason": None}), rank, final=True)
    return 0


def _fail(status: str, reason: str, failure: Failure, reporter: Reporter) -> int:
    reporter.end(status, reason, failure)  # type: ignore[arg-type]
    return 1


def _keep(output_dir: Path, record: Record, rank: int, final: bool = False) -> None:
    if rank == 0:
        _save(output_dir, record, final, phase="train", step=3)
        return
    (output_dir / "ranks" / f"rank-{rank}.record.json").write_text(record.to_json())
