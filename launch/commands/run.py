"""`tunebench run`: on this machine, or on an engine that has several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from harness.system.platforms import need_linux
from launch.commands.console import print_error, print_json
from launch.commands.engine_options import (
    AccountOption,
    AddressOption,
    ConstraintOption,
    CpusPerTaskOption,
    GresOption,
    MemOption,
    OnOption,
    PartitionOption,
    QosOption,
    RequeuesOption,
    ResourceOption,
    TimeOption,
)
from launch.commands.options import (
    AllowBusyOption,
    JsonOption,
    MatrixArgument,
    NoPredictOption,
    PhaseTimeoutOption,
    ResultsOption,
    RetryOption,
    SeedsOption,
    SetOption,
    SideBySideOption,
    SkipOption,
    TimeoutOption,
)
from matrices.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.records.store import Entry
    from launch.cells.runner import Finished
    from launch.display.progress import Display
    from launch.engines.order import Order
    from launch.planning.plan import Job, Sweep
    from matrices.load import Matrix

# Statuses that say what a configuration does. After a run that left any other: exit code 3.
RESULTS = ("ok", "oom", "timeout", "diverged", "invalid")
EXIT_INCOMPLETE = 3
ENGINES = ("local", "slurm", "ray")


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
    from launch.planning.left_out import ProblemsFound
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
        if engine == "slurm":
            order = _order("slurm", sweep, limits, not no_predict, skip_predicted_oom)
            given |= {"requeues": requeues, "exclusive": side_by_side is False}
            jobs, finished = _on_slurm(sweep, order, display, given)
        elif engine == "ray":
            order = _order("ray", sweep, limits, not no_predict, skip_predicted_oom)
            jobs, finished = _on_ray(sweep, order, display, address, resource or [])
        else:
            jobs, finished = _here(
                sweep,
                display,
                limits,
                (bool(side_by_side), allow_busy),
                (no_predict, skip_predicted_oom),
            )
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
    _tell(jobs, finished, sweep.results, as_json)
    incomplete = len(finished.entries) < len(jobs) and finished.stopped_by is None
    code = exit_code(finished.entries, finished.stopped_by)
    raise typer.Exit(code or (EXIT_INCOMPLETE if incomplete else 0))


def _engine(on: str | None) -> str:
    if on is not None and on not in ENGINES:
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
    """What the options name: the matrix, its cells, and how many combinations gave them. Raises
    UserError."""
    from launch.commands.matrix_file import load
    from launch.planning.plan import Sweep, retried_statuses
    from matrices.expand import expand
    from matrices.rules.passed_through import merged

    statuses = retried_statuses(retry)
    matrix = load(source, overrides or [], seeds)
    expansion = merged(expand(matrix))
    for note in expansion.notes:
        print(f"tunebench: note: {note}", file=sys.stderr)
    directory = results or Path("results") / matrix.name
    sweep = Sweep(expansion.cells, directory, statuses, matrix.score_base, matrix.locate)
    return matrix, sweep, expansion.combinations


def _here(
    sweep: Sweep,
    display: Display,
    limits: tuple[float | None, float | None],
    devices: tuple[bool, bool],
    predicting: tuple[bool, bool],
) -> tuple[list[Job], Finished]:
    from functools import partial

    from harness.records.store import Store
    from launch.cells.devices import Slots
    from launch.cells.runner import Runner
    from launch.cells.start import devices_here
    from launch.display.prediction_progress import show_for_stderr
    from launch.planning.left_out import quickly_checked
    from launch.planning.plan import plan_jobs
    from launch.predict.before_run import foretell

    side_by_side, allow_busy = devices
    no_predict, skip_predicted_oom = predicting
    store = Store(sweep.results)
    slots = Slots(exclusive=not side_by_side, allow_busy=allow_busy)
    jobs = plan_jobs(
        sweep.cells,
        store.latest(),
        sweep.retry,
        sweep.score_base,
        cores=lambda cell: slots.cores(devices_here(cell)),
    )
    jobs = quickly_checked(jobs, display, sweep)
    runner = Runner(store, display, limits[0], phase_seconds=limits[1], slots=slots, sweep=sweep)
    if not no_predict:
        past = [job.entry.record for job in jobs if job.entry is not None]
        show = show_for_stderr()
        runner.foretell = partial(foretell, show=show, skip=skip_predicted_oom, past=past)
    finished = runner.run(jobs)
    return list(finished.jobs), finished


def _order(
    engine: Literal["slurm", "ray"],
    sweep: Sweep,
    limits: tuple[float | None, float | None],
    predict: bool,
    skip: bool,
) -> Order:
    from launch.engines.order import Order

    return Order(
        results=str(sweep.results.absolute()),
        cell="",
        engine=engine,
        timeout=limits[0],
        phase_timeout=limits[1],
        predict=predict,
        skip_predicted_oom=skip,
    )


def _on_slurm(
    sweep: Sweep, order: Order, display: Display, given: Mapping[str, Any]
) -> tuple[list[Job], Finished]:
    from launch.engines.slurm.engine import run_on_slurm
    from launch.engines.slurm.submit import Resources

    return run_on_slurm(sweep, order, Resources(**given), display)


def _on_ray(
    sweep: Sweep, order: Order, display: Display, address: str | None, resources: list[str]
) -> tuple[list[Job], Finished]:
    from launch.engines.ray.cluster import parse_resources
    from launch.engines.ray.engine import RayOptions, run_on_ray

    return run_on_ray(sweep, order, RayOptions(address, parse_resources(resources)), display)


def _tell(jobs: list[Job], finished: Finished, directory: Path, as_json: bool) -> None:
    from launch.display.tables import outcome_json, outcome_text

    if as_json:
        print_json([outcome_json(job, finished.entries.get(job.key)) for job in jobs])
    else:
        print(outcome_text(jobs, finished.entries, directory))
    if finished.stopped_by is not None:
        print("tunebench: stopped; run the same command again to go on", file=sys.stderr)


def exit_code(entries: Mapping[str, Entry], stopped_by: int | None) -> int:
    """Of a run that left these records."""
    if stopped_by is not None:
        return 128 + stopped_by
    complete = all(entry.record.status in RESULTS for entry in entries.values())
    return 0 if complete else EXIT_INCOMPLETE
