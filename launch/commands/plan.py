"""`tunebench plan`: the cells of a matrix, what each needs, and what a run would do with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from harness.system.platforms import need_linux
from launch.commands.console import print_error, print_json, print_note
from launch.commands.options import (
    CheckOption,
    GpuOption,
    GpusFileOption,
    JsonOption,
    MatrixArgument,
    NoPredictOption,
    ResultsOption,
    RetryOption,
    SeedsOption,
    SetOption,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from harness.preflight.problems import Problem
    from harness.records.prediction import Prediction
    from launch.planning.plan import Job


def plan(
    matrix: MatrixArgument,
    results: ResultsOption = None,
    set_: SetOption = None,
    seeds: SeedsOption = None,
    retry: RetryOption = None,
    gpu: GpuOption = None,
    gpus_file: GpusFileOption = None,
    no_predict: NoPredictOption = False,
    check: CheckOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show the cells of a matrix, what each is predicted to need, and what would run.

    Each with its identity, and why it would run, be kept or be refused. Peak memory is predicted
    for this machine, or for the GPUs that are named, and remembered, so the next look is quick.
    What is wrong with a cell's arguments, model or data is told as far as no library has to be
    imported for it; --check makes every check of a run. Nothing is run or written to the results.

    \b
    tunebench plan quickstart
    tunebench plan my-sweep.yaml --gpu rtx-4090 --gpu a100-80gb
    tunebench plan my-sweep.yaml --no-predict
    tunebench plan my-sweep.yaml --check
    tunebench plan my-sweep.yaml --set rank=[8,64] --seeds 3
    tunebench plan my-sweep.yaml --json | jq '.[] | select(.action == "invalid")'
    """
    from harness.records.store import Store
    from launch.commands.run import sweep_of
    from launch.display.predictions import footer
    from launch.display.tables import plan_text
    from launch.planning.invalid_cells import has_nothing_left
    from launch.planning.plan import plan_jobs

    found, sweep, combinations = sweep_of(matrix, results, set_, seeds, retry)
    present = Store(sweep.results).latest()
    jobs = plan_jobs(sweep.cells, present, sweep.retry, sweep.score_base)
    jobs, problems = _checked(jobs, check)
    predictions = {} if no_predict else _predictions(jobs, gpu, gpus_file)
    if as_json:
        print_json([job.as_json(predictions.get(job.cell.cell_id)) for job in jobs])
    else:
        if found.question:
            print(f"{found.name}: {found.question}\n")
        print(plan_text(jobs, combinations, predictions))
        if predictions:
            print(footer(predictions.values()))
    if problems and has_nothing_left(jobs):
        for problem in problems:
            print_error(sweep.located(problem.error))
        raise typer.Exit(2)


def _checked(jobs: Sequence[Job], thoroughly: bool) -> tuple[list[Job], list[Problem]]:
    """The jobs as a plan shows them, and their problems: those of the quick checks, or with
    `thoroughly` all that a run would find, which imports the stack."""
    from harness.preflight import quick_checks
    from launch.display.progress import display_for_stderr
    from launch.planning.invalid_cells import cells_to_run, mark_invalid

    if thoroughly:
        need_linux("plan --check")
    found = quick_checks.problems(cells_to_run(jobs))
    after = mark_invalid(jobs, found)
    if thoroughly and cells_to_run(after):
        from launch.engines.remote_plan import problems

        display = display_for_stderr()
        try:
            more = problems(cells_to_run(after), display)
        finally:
            display.close()
        after, found = mark_invalid(after, more), found + more
    return after, found


def _predictions(
    jobs: Sequence[Job], gpu: Sequence[str] | None, gpus_file: Path | None
) -> dict[str, Prediction]:
    """Predictions for the trained cells of a plan, by cell id; cached ones are used.

    For the named GPUs, else for this machine and the cells that can run on it. When none can (an
    architecture without weights, for example), for the default GPU of `tunebench predict`.
    """
    import dataclasses

    from launch.display.predictions import failures
    from launch.display.progress import display_for_stderr
    from launch.predict.gpu_choice import named_gpus
    from launch.predict.predict import PredictionOptions
    from launch.predict.run_predictions import options_for_this_machine, predict_run

    judge = named_gpus(gpu or [], gpus_file)
    options = options_for_this_machine(judge[0] if judge else None)
    if judge:
        options = dataclasses.replace(options, judge=judge)
    possible = [job.cell for job in jobs if job.action != "invalid"]
    cells = possible if possible and not judge else [job.cell for job in jobs]
    if not possible and not judge:
        options = PredictionOptions()
    found = predict_run(cells, display_for_stderr(), options=options).predictions
    for reason in failures(list(found.values())):
        print_note(f"not predicted: {reason}")
    return dict(found)
