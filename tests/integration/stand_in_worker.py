"""A worker with the real one's files and exit code, and none of its imports.

What it does is told by the cell's seed, so that a test scripts a run by its matrix. It writes
nothing but what the contract names, and waits for its runner or for a file of the test's, never
for a time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from harness.preflight.problems import Findings, Problem
from harness.ranks.progress_file import Progress
from harness.records.provenance import now
from harness.records.ranks import Failure
from harness.records.reading import read_record
from harness.records.record import Record
from harness.system.files import write_atomically
from matrices.cell import Cell
from matrices.errors import UserError

OK, FAILS, HANGS, DEAF, DIES, RAISES, SPAWNS, SEGFAULTS, WRONG = range(9)
LONGEST_SECONDS = 60.0

# Where a test is about what happens while the real worker's stack is imported.
time.sleep(float(os.environ.get("STAND_IN_IMPORT_SECONDS", "0")))


def problems(cells: list[Cell]) -> list[Problem]:
    """The stand-in for preflight: some models are not there."""
    name = cells[0].model.name
    if name == "broken":
        raise RuntimeError("a bug in preflight")
    if name.startswith("slow:"):
        Path(name.removeprefix("slow:")).write_text(str(os.getpid()))
        _wait_for(Path("never"))
    found = Findings()
    for cell in cells:
        if cell.model.name.startswith("missing"):
            found.add([cell], UserError(f"no such model: {cell.model.name}", key="model.name"))
        if cell.seed == WRONG:
            found.add([cell], UserError("is not a seed", key="seed"))
    return found.problems


def run(cell_path: Path, output_dir: Path) -> int:
    cell = Cell.model_validate_json(cell_path.read_text())
    record = read_record(output_dir / "record.json")
    print(f"seed {cell.seed} in {os.getpid()}")
    _save(output_dir, record, phase="forward", step=1)
    signal.signal(signal.SIGTERM, _stop(output_dir, record))
    if cell.seed == OK:
        _save(output_dir, record.model_copy(update={"status": "ok", "reason": None}), final=True)
        return 0
    if cell.seed == FAILS:
        failure = Failure(type="ValueError", message="no")
        changes = {"status": "failed", "reason": "no", "failure": failure}
        _save(output_dir, record.model_copy(update=changes), final=True)
        return 1
    if cell.seed == RAISES:
        raise ZeroDivisionError("a bug in the worker")
    if cell.seed == SEGFAULTS:
        os.kill(os.getpid(), signal.SIGSEGV)
    if cell.seed == DEAF:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if cell.seed == SPAWNS and os.fork() == 0:
        (output_dir / "child.pid").write_text(str(os.getpid()))
        _wait_for(output_dir / "never")
    (output_dir / "worker.pid").write_text(str(os.getpid()))
    _wait_for(Path(os.environ.get("STAND_IN_GO", output_dir / "never")))
    _save(output_dir, record.model_copy(update={"status": "ok", "reason": None}), final=True)
    return 0


def _wait_for(path: Path) -> None:
    end = time.monotonic() + LONGEST_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            sys.exit("nobody stopped the stand-in")
        time.sleep(0.02)


def _stop(output_dir: Path, record: Record) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        changes = {"status": "interrupted", "reason": "SIGTERM", "phase": "forward"}
        _save(output_dir, record.model_copy(update=changes), final=True)
        os._exit(1)

    return handle


def _save(
    output_dir: Path, record: Record, final: bool = False, phase: str = "forward", step: int = 0
) -> None:
    record.speed.step_seconds = [0.25, 0.5]
    ended = now() if final else None
    write_atomically(
        output_dir / "record.json",
        record.model_copy(update={"ended": ended, "phase": phase}).to_json(),
    )
    Progress(phase, step, 2, 2.5, 1234.0).write(output_dir)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), Path(sys.argv[2])))
