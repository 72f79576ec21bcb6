"""A runner process with the stand-in worker: `run_stand_in.py RESULTS [OPTIONS] SEED...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from harness.records.store import Store
from launch.cells.devices import DevicePool, Grant
from launch.cells.other_machines import follow
from launch.cells.runner import Runner, RunResult
from launch.cells.start import Rendezvous
from launch.commands.run import exit_code
from launch.display.progress import Display, display_for_stderr
from launch.engines import order
from launch.engines.debug import DebugEngine
from launch.engines.engine import run_on
from launch.planning import preflight
from launch.planning.invalid_cells import ProblemsFound
from launch.planning.plan import Sweep, plan_jobs
from launch.predict.run_predictions import RunPredictions
from launch.processes.stop_signals import Stopped
from matrices.cell import Cell, Data, Evaluate, Model, Train
from matrices.errors import UserError
from matrices.rules.machine import Machine

TWO_DEVICES = Machine(has_gpu=False, devices=2, nodes=2)


def predict(seed: int, cells: Sequence[Cell]) -> RunPredictions:
    """Predictions that name one cell to be skipped."""
    return RunPredictions(
        skipped={cell.cell_id: "predicted OOM" for cell in cells if cell.seed == seed}
    )


def cell(asked: argparse.Namespace, seed: int) -> Cell:
    """A cell of one process, or of several ranks."""
    model = Model(name=asked.model)
    if asked.ranks == 1:
        return Cell(method="base", seed=seed, model=model, evaluate=Evaluate(tasks=()))
    profile = {"distributed_type": "MULTI_GPU", "main_process_port": asked.port}
    return Cell(
        method="full",
        seed=seed,
        model=model,
        data=Data(),
        train=Train(steps=8),
        evaluate=Evaluate(tasks=()),
        parallelism="ddp",
        devices=asked.ranks,
        nodes=2 if asked.meet else 1,
        profile=profile if asked.port else {},
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--limit", type=float)
    parser.add_argument("--model", default="stand-in")
    parser.add_argument("--predicted-oom", type=int, help="the seed of a cell to skip")
    parser.add_argument("--phase-limit", type=float)
    parser.add_argument("--granted", action="store_true", help="with devices of its own")
    parser.add_argument("--side-by-side", action="store_true")
    parser.add_argument("--ranks", type=int, default=1, help="each cell is spread over so many")
    parser.add_argument("--port", type=int, help="that the cells' profile asks for")
    parser.add_argument("--meet", help="where machines of a cell meet: the name of one start")
    parser.add_argument("--ordered", action="store_true", help="through an engine, in this process")
    parser.add_argument("--follow", action="store_true", help="as the second of two machines")
    asked = parser.parse_args()
    cells = [cell(asked, seed) for seed in asked.seeds]
    worker = "stand_in_worker" if asked.ranks == 1 else "stand_in_ranks"
    store = Store(asked.results)
    meeting = Rendezvous("127.0.0.1", 29511, asked.meet) if asked.meet else None
    if asked.follow and meeting is not None:
        [job] = plan_jobs(cells, {}, score_base=False, machine=TWO_DEVICES)
        return follow(store, job.cell, meeting.job, 1, Grant(("cpu:1",), {}, False, 1), worker)
    display = display_for_stderr()
    runner = Runner(
        store,
        display,
        asked.limit,
        worker,
        worker,
        phase_seconds=asked.phase_limit,
        grant=Grant(("cpu:0",), {}, exclusive=False) if asked.granted else None,
        devices=DevicePool(not asked.side_by_side, devices=("cpu:0", "cpu:1")),
        rendezvous=meeting,
    )
    if asked.predicted_oom is not None:
        runner.predict = partial(predict, asked.predicted_oom)
    try:
        if asked.ordered:
            finished = ordered(cells, asked.results, worker, display)
            return told(finished)
        pool = runner.devices or DevicePool()
        jobs = plan_jobs(
            cells,
            store.latest(),
            score_base=False,
            machine=TWO_DEVICES,
            cores=lambda cell: None if asked.granted else pool.cores(cell.devices_per_node),
        )
        finished = runner.run(jobs)
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
    return told(finished)


def ordered(cells: Sequence[Cell], results: Path, worker: str, display: Display) -> RunResult:
    """The cells as an engine runs them, each as on a node."""
    order.Runner = partial(Runner, worker=worker)  # type: ignore[assignment,misc]
    preflight.MODULE = worker
    sweep = Sweep(cells, results, score_base=False)
    return run_on(DebugEngine(), sweep, order.Order(str(results), "", predict=False), display)


def told(finished: RunResult) -> int:
    for entry in finished.entries.values():
        print(entry.record.cell.seed, entry.record.status, entry.directory.name)
    return exit_code(finished.entries, finished.stopped_by)


if __name__ == "__main__":
    sys.exit(main())
