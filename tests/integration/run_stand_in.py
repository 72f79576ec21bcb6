"""A runner process with the stand-in worker: `run_stand_in.py RESULTS [--limit S] SEED...`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.store import Store
from launch.cli import _exit_code
from launch.local import ProblemsFound, Runner, Stopped
from launch.plan import plan_jobs
from launch.progress import display_for_stderr
from matrices.cell import Cell, Evaluate, Model
from matrices.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--limit", type=float)
    parser.add_argument("--model", default="stand-in")
    asked = parser.parse_args()
    cells = [
        Cell(method="base", seed=seed, model=Model(name=asked.model), evaluate=Evaluate(tasks=()))
        for seed in asked.seeds
    ]
    store = Store(asked.results)
    display = display_for_stderr()
    runner = Runner(store, display, asked.limit, "stand_in_worker", "stand_in_worker")
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
