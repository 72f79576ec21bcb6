"""`tunebench rerun` with the stand-in worker: `run_stand_in_rerun.py ARGV`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from launch import entry
from launch.cells import rerun
from matrices.cell import Cell


def command(
    cell: Cell, gpu: bool, threads: int, directory: Path, output: Path, program: list[str]
) -> list[str]:
    return [sys.executable, "-m", "stand_in_worker", str(directory / "cell.json"), str(output)]


if __name__ == "__main__":
    rerun.rerun = partial(rerun.rerun, command=command)  # type: ignore[assignment]
    entry.main()
