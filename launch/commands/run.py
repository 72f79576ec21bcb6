"""`tunebench run`: run the cells of a matrix on this machine or on an engine."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from harness.system.platforms import need_linux
from launch.commands.console import (
    EXIT_INCOMPLETE,
    load_matrix,
    print_error,
    print_json,
    print_note,
)
from launch.commands.options import (
    AccountOption,
    AddressOption,
    AllowBusyOption,
    ConstraintOption,
    CpusPerTaskOption,
    GresOption,
    JsonOption,
    MatrixArgument,
    MemOption,
    NoPredictOption,
    OnOption,
    PartitionOption,
    PhaseTimeoutOption,
    QosOption,
    RequeuesOption,
    ResourceOption,
    ResultsOption,
    RetryOption,
    SeedsOption,
    SetOption,
    SideBySideOption,
    SkipOption,
    TimeOption,
    TimeoutOption,
)
from matrices.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from harness.records.store import Entry
    from launch.cells.runner import RunResult
    from launch.display.progress import Display
    from launch.engines.engine import Engine
    from launch.planning.plan import Sweep
    from matrices.load import Matrix

# Statuses that are results. A run that leaves any other ends with exit code 3.
RESULTS = ("ok", "oom", "timeout", "diverged", "invalid")
ENGINES = ("local", "slurm", "ray")
# For developers: orders run in this process.
DEBUG = "debug"


def run(
    matrix: MatrixArgument,
    results: ResultsOption = None,
    set_: SetOption = None,
    seeds: SeedsOption = None,
    retry: RetryOption = None,
    timeout: TimeoutOption = None,
    phase_timeout: PhaseTimeoutOption = None,
    side_by_side: SideBySideOption = None,
    allow_busy: AllowBusyOption = False,
    skip_predicted_oom: SkipOption = False,
    no_predict: NoPredictOption = False,
    on: OnOption = None,
    partition: PartitionOption = None,
    time: TimeOption = None,
    account: AccountOption = None,
    qos: QosOption = None,
    constraint: ConstraintOption = None,
    gres: GresOption = None,
    cpus_per_task: CpusPerTaskOption = None,
    mem: MemOption = None,
    requeues: RequeuesOption = 1,
    address: AddressOption = None,
    resource: ResourceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the cells of a matrix that are not measured yet.

    What runs is predicted first, and every record tells how far off the prediction was. Finished
    cells are kept, so the same command goes on where the last one stopped. Ctrl-C lets
    the running cells write down what they have measured; a second one ends them at once. Jobs in
    a cluster's queue go on without this command, and the same command watches them again.

    \b
    tunebench run quickstart
    tunebench run method-comparison --set model=Qwen/Qwen3-1.7B --seeds 3
    tunebench run my-sweep.yaml --results /shared/sweep --timeout 3600
    tunebench run my-sweep.yaml --retry oom
    tunebench run my-sweep.yaml --skip-predicted-oom
    tunebench run my-sweep.yaml --results /shared/sweep --on slurm --partition gpu --time 4:00:00
    tunebench run my-sweep.yaml --results /shared/sweep --on ray --address 10.0.0.1:6379
    """
    from launch.display.progress import display_for_stderr
    from launch.planning.invalid_cells import ProblemsFound
    from launch.processes.stop_signals import Stopped

    need_linux("run")
    if no_predict and skip_predicted_oom:
        raise UserError("--skip-predicted-oom needs the predictions that --no-predict leaves out")
    engine = _engine(on)
    given: dict[str, Any] = {
        "partition": partition,
        "time": time,
        "account": account,
        "qos": qos,
        "constraint": constraint,
        "gres": gres,
        "cpus_per_task": cpus_per_task,
        "mem": mem,
    }
    _only_on("slurm", engine, given)
    _only_on("ray", engine, {"address": address, "resource": resource})
    found, sweep, _ = sweep_of(matrix, results, set_, seeds, retry)
    limits = (timeout or found.timeout_seconds, phase_timeout or found.phase_timeout_seconds)
    display = display_for_stderr()
    try:
        predicting = (no_predict, skip_predicted_oom)
        if engine == "local":
            devices = (bool(side_by_side), allow_busy)
            finished = _run_here(sweep, display, limits, devices, predicting)
        else:
            given |= {"requeues": requeues, "exclusive": side_by_side is False}
            with _connected(engine, sweep, display, given, address, resource or []) as machines:
                finished = _run_on_engine(machines, sweep, display, limits, predicting)
    except ProblemsFound as error:
        # Cells share models, data and tasks, so they share problems.
        for problem in {str(each): each for each in error.problems}.values():
            print_error(problem)
        raise typer.Exit(2) from None
    except UserError as error:
        raise sweep.located(error) from error
    except Stopped as stopped:
        print("tunebench: stopped before the first cell", file=sys.stderr)
        raise typer.Exit(128 + stopped.number) from None
    finally:
        display.close()
    _print_outcome(finished, sweep.results, as_json)
    incomplete = len(finished.entries) < len(finished.jobs) and finished.stopped_by is None
    code = exit_code(finished.entries, finished.stopped_by)
    raise typer.Exit(code or (EXIT_INCOMPLETE if incomplete else 0))


def _engine(on: str | None) -> str:
    if on is not None and on not in (*ENGINES, DEBUG):
        raise UserError(
            f"no such engine{nearest(on, ENGINES)}; there are {', '.join(ENGINES)}",
            where=f"--on {on}",
        )
    return on or "local"


def _only_on(engine: str, chosen: str, given: Mapping[str, Any]) -> None:
    """Raises UserError when options of an engine are given for another."""
    if engine == chosen:
        return
    for name, value in given.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is for --on {engine}, and this would run on {chosen}")


def sweep_of(
    source: str,
    results: Path | None,
    overrides: list[str] | None,
    seeds: int | None,
    retry: str | None,
) -> tuple[Matrix, Sweep, int]:
    """The matrix, its sweep, and the number of combinations that the options give. Raises
    UserError."""
    from launch.planning.plan import Sweep, retried_statuses
    from matrices.expand import expand
    from matrices.rules.passed_through import merged

    statuses = retried_statuses(retry)
    matrix = load_matrix(source, overrides or [], seeds)
    expansion = merged(expand(matrix))
    for note in expansion.notes:
        print_note(note)
    directory = results or Path("results") / matrix.name
    sweep = Sweep(expansion.cells, directory, statuses, matrix.score_base, matrix.locate)
    return matrix, sweep, expansion.combinations


def _run_here(
    sweep: Sweep,
    display: Display,
    limits: tuple[float | None, float | None],
    devices: tuple[bool, bool],
    predicting: tuple[bool, bool],
) -> RunResult:
    from functools import partial

    from harness.records.store import Store
    from launch.cells.devices import DevicePool
    from launch.cells.runner import Runner
    from launch.planning.invalid_cells import check_quickly
    from launch.planning.plan import plan_jobs
    from launch.predict.run_predictions import predict_run

    side_by_side, allow_busy = devices
    no_predict, skip_predicted_oom = predicting
    store = Store(sweep.results)
    pool = DevicePool(exclusive=not side_by_side, allow_busy=allow_busy)
    jobs = plan_jobs(
        sweep.cells,
        store.latest(),
        sweep.retry,
        sweep.score_base,
        cores=lambda cell: pool.cores(cell.devices_per_node),
    )
    jobs = check_quickly(jobs, display.message, sweep)
    runner = Runner(store, display, limits[0], phase_seconds=limits[1], devices=pool, sweep=sweep)
    if not no_predict:
        past = [job.entry.record for job in jobs if job.entry is not None]
        runner.predict = partial(predict_run, display=display, skip=skip_predicted_oom, past=past)
    return runner.run(jobs)


def _run_on_engine(
    engine: Engine,
    sweep: Sweep,
    display: Display,
    limits: tuple[float | None, float | None],
    predicting: tuple[bool, bool],
) -> RunResult:
    from launch.engines.engine import run_on
    from launch.engines.order import Order

    no_predict, skip_predicted_oom = predicting
    order = Order(
        results=str(sweep.results.absolute()),
        cell="",
        timeout=limits[0],
        phase_timeout=limits[1],
        predict=not no_predict,
        skip_predicted_oom=skip_predicted_oom,
    )
    return run_on(engine, sweep, order, display)


@contextlib.contextmanager
def _connected(
    engine: str,
    sweep: Sweep,
    display: Display,
    options: Mapping[str, Any],
    address: str | None,
    resources: Sequence[str],
) -> Iterator[Engine]:
    """The engine of `--on`, connected for the length of the block. Raises UserError."""
    if engine == "slurm":
        from launch.engines.slurm.engine import slurm_engine
        from launch.engines.slurm.submit import JobResources

        yield slurm_engine(sweep.results, display, JobResources(**options))
    elif engine == "ray":
        from launch.engines.ray.cluster import parse_resources
        from launch.engines.ray.engine import ray_engine

        with ray_engine(sweep.results, address, parse_resources(resources)) as cluster:
            yield cluster
    else:
        from launch.engines.debug import DebugEngine

        yield DebugEngine()


def _print_outcome(finished: RunResult, directory: Path, as_json: bool) -> None:
    from launch.display.tables import outcome_json, outcome_text

    jobs = list(finished.jobs)
    if as_json:
        print_json([outcome_json(job, finished.entries.get(job.key)) for job in jobs])
    else:
        print(outcome_text(jobs, finished.entries, directory))
    if finished.stopped_by is not None:
        print("tunebench: stopped; run the same command again to go on", file=sys.stderr)


def exit_code(entries: Mapping[str, Entry], stopped_by: int | None) -> int:
    """The exit code of a run with these records."""
    if stopped_by is not None:
        return 128 + stopped_by
    complete = all(entry.record.status in RESULTS for entry in entries.values())
    return 0 if complete else EXIT_INCOMPLETE
