"""A runner process with the stand-in worker: `run_stand_in.py RESULTS [OPTIONS] SEED...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from harness.store import Store
from launch.cli import _exit_code
from launch.foretelling import Foretold
from launch.local import ProblemsFound, Runner, Stopped
from launch.plan import plan_jobs
from launch.progress import display_for_stderr
from matrices.cell import Cell, Evaluate, Model
from matrices.errors import UserError


def foretell(seed: int, cells: Sequence[Cell]) -> Foretold:
    """Predictions that name one cell to be skipped."""
    return Foretold(skipped={cell.cell_id: "predicted OOM" for cell in cells if cell.seed == seed})


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--limit", type=float)
    parser.add_argument("--model", default="stand-in")
    parser.add_argument("--predicted-oom", type=int, help="the seed of a cell to skip")
    asked = parser.parse_args()
    cells = [
        Cell(method="base", seed=seed, model=Model(name=asked.model), evaluate=Evaluate(tasks=()))
        for seed in asked.seeds
    ]
    store = Store(asked.results)
    display = display_for_stderr()
    runner = Runner(store, display, asked.limit, "stand_in_worker", "stand_in_worker")
    if asked.predicted_oom is not None:
        runner.foretell = partial(foretell, asked.predicted_oom)
    try:
        finished = runner.run(plan_jobs(cells, store.latest()))
    except ProblemsFound as found:
        print(*found.problems, sep="\n", file=sys.stderr)
        return 2
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped as stopped:
        return 128 + stopped.number
    finally:
        display.close()
    for entry in finished.entries.values():
        print(entry.record.cell.seed, entry.record.status, entry.directory.name)
    return _exit_code(finished.entries, finished.stopped_by)


if __name__ == "__main__":
    sys.exit(main())
