"""The command line. Every heavy import is inside the command that needs it."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli_claims import claims
from launch.cli_predict import fit, predict
from launch.cli_results import calibration, report, show
from launch.console import print_error, print_json
from launch.options import (
    GpuOption,
    GpusFileOption,
    JsonOption,
    MatrixArgument,
    NoPredictOption,
    ResultsOption,
    RetryOption,
    SeedsOption,
    SetOption,
    SkipOption,
    TimeoutOption,
)
from matrices.errors import UserError

if TYPE_CHECKING:
    from harness.store import Entry
    from launch.plan import Job
    from matrices.load import Matrix

app = typer.Typer(
    name="tunebench",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # rich would double the time to the first line of help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Statuses that say what a configuration does. After a run that left any other: exit code 3.
RESULTS = ("ok", "oom", "timeout", "diverged", "invalid")
EXIT_INCOMPLETE = 3


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tunebench {importlib.metadata.version('tunebench')}")
        raise typer.Exit


@app.callback()
def tunebench(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Measure what fine-tuning configurations cost and what they buy.

    A matrix (YAML) names models, data and settings; its lists are axes. Every combination is a
    cell, run in a process of its own: memory, speed, and lm-eval scores against the base model.

    \b
    tunebench doctor                    what can run on this machine
    tunebench predict quickstart        the memory each cell needs, on any GPU, without one
    tunebench plan quickstart           what would run, and why
    tunebench run quickstart            run it; Ctrl-C any time, run again to go on
    tunebench report results/quickstart tables

    Exit codes: 0 all is well; 1 a bug (with its traceback); 2 something to put right (one line
    says what); 3 a run ended with failed cells; 130 and 143 stopped by Ctrl-C and SIGTERM.
    """


def _jobs(
    source: str,
    results: Path | None,
    overrides: list[str] | None,
    seeds: int | None,
    retry: str | None,
) -> tuple[Matrix, Path, list[Job], int]:
    from harness.store import Store
    from launch.plan import plan_jobs, retried_statuses
    from matrices.expand import expand
    from matrices.load import load

    statuses = retried_statuses(retry)
    matrix = load(source, overrides or [], seeds)
    expansion = expand(matrix)
    for note in expansion.notes:
        print(f"tunebench: note: {note}", file=sys.stderr)
    directory = results or Path("results") / matrix.name
    present = Store(directory).latest()
    jobs = plan_jobs(expansion.cells, present, statuses, matrix.score_base)
    return matrix, directory, jobs, expansion.combinations


@app.command()
def plan(
    matrix: MatrixArgument,
    results: ResultsOption = None,
    set_: SetOption = None,
    seeds: SeedsOption = None,
    retry: RetryOption = None,
    gpu: GpuOption = None,
    gpus_file: GpusFileOption = None,
    no_predict: NoPredictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show the cells of a matrix, what each is predicted to need, and what would run.

    Each with its identity, and why it would run, be kept or be refused. Peak memory is predicted
    for this machine, or for the GPUs that are named, and remembered, so the next look is quick.
    Nothing is run or written to the results.

    \b
    tunebench plan quickstart
    tunebench plan my-sweep.yaml --gpu rtx-4090 --gpu a100-80gb
    tunebench plan my-sweep.yaml --no-predict
    tunebench plan my-sweep.yaml --set rank=[8,64] --seeds 3
    tunebench plan my-sweep.yaml --json | jq '.[] | select(.action == "invalid")'
    """
    from launch.cli_predict import predictions_of
    from launch.listing import plan_text
    from launch.prediction_listing import footer

    found, _, jobs, combinations = _jobs(matrix, results, set_, seeds, retry)
    predictions = {} if no_predict else predictions_of(jobs, gpu, gpus_file)
    if as_json:
        print_json([job.as_json(predictions.get(job.cell.cell_id)) for job in jobs])
        return
    if found.question:
        print(f"{found.name}: {found.question}\n")
    print(plan_text(jobs, combinations, predictions))
    if predictions:
        print(footer(predictions.values()))


@app.command()
def run(
    matrix: MatrixArgument,
    results: ResultsOption = None,
    set_: SetOption = None,
    seeds: SeedsOption = None,
    retry: RetryOption = None,
    timeout: TimeoutOption = None,
    skip_predicted_oom: SkipOption = False,
    no_predict: NoPredictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the cells of a matrix that are not measured yet.

    What runs is predicted first, and every record tells how far off the prediction was. Finished
    cells are kept, so the same command goes on where the last one stopped. Ctrl-C lets
    the running cell write down what it has measured; a second one ends it at once.

    \b
    tunebench run quickstart
    tunebench run method-comparison --set model=Qwen/Qwen3-1.7B --seeds 3
    tunebench run my-sweep.yaml --results /shared/sweep --timeout 3600
    tunebench run my-sweep.yaml --retry oom
    tunebench run my-sweep.yaml --skip-predicted-oom
    """
    from functools import partial

    from harness.store import Store
    from launch.foretelling import foretell
    from launch.listing import outcome_json, outcome_text
    from launch.local import ProblemsFound, Runner, Stopped
    from launch.prediction_progress import show_for_stderr
    from launch.progress import display_for_stderr

    if no_predict and skip_predicted_oom:
        raise UserError("--skip-predicted-oom needs the predictions that --no-predict leaves out")
    found, directory, jobs, _ = _jobs(matrix, results, set_, seeds, retry)
    display = display_for_stderr()
    runner = Runner(Store(directory), display, timeout or found.timeout_seconds)
    if not no_predict:
        past = [job.entry.record for job in jobs if job.entry is not None]
        show = show_for_stderr()
        runner.foretell = partial(foretell, show=show, skip=skip_predicted_oom, past=past)
    try:
        finished = runner.run(jobs)
    except ProblemsFound as error:
        # Cells share models, data and tasks, so they share problems.
        for problem in {str(each): each for each in error.problems}.values():
            print_error(_located(problem, found))
        raise typer.Exit(2) from None
    except Stopped as stopped:
        print("tunebench: stopped before the first cell", file=sys.stderr)
        raise typer.Exit(128 + stopped.number) from None
    finally:
        display.close()
    if as_json:
        print_json([outcome_json(job, finished.entries.get(job.key)) for job in jobs])
    else:
        print(outcome_text(jobs, finished.entries, directory))
    if finished.stopped_by is not None:
        print("tunebench: stopped; run the same command again to go on", file=sys.stderr)
    raise typer.Exit(_exit_code(finished.entries, finished.stopped_by))


def _exit_code(entries: dict[str, Entry], stopped_by: int | None) -> int:
    if stopped_by is not None:
        return 128 + stopped_by
    complete = all(entry.record.status in RESULTS for entry in entries.values())
    return 0 if complete else EXIT_INCOMPLETE


@app.command()
def rerun(
    record: Annotated[Path, typer.Argument(help="A record's directory or its record.json.")],
    timeout: TimeoutOption = None,
    no_predict: NoPredictOption = False,
) -> None:
    """Repeat one recorded cell by its recorded command.

    The new record is the next attempt beside the old one, which stays as it is. Its path is
    printed.

    \b
    tunebench rerun results/quickstart/4f0c22d9a1b3-494adca8
    """
    from functools import partial

    from launch.foretelling import foretell
    from launch.local import Stopped
    from launch.prediction_progress import show_for_stderr
    from launch.progress import display_for_stderr
    from launch.rerun import record_path
    from launch.rerun import rerun as repeat

    display = display_for_stderr()
    predicting = None if no_predict else partial(foretell, show=show_for_stderr())
    try:
        entry, stopped_by = repeat(record_path(record), display, timeout, predicting)
    except Stopped as stopped:
        raise typer.Exit(128 + stopped.number) from None
    finally:
        display.close()
    print(entry.directory / "record.json")
    raise typer.Exit(_exit_code({"": entry}, stopped_by))


@app.command()
def doctor(
    network: Annotated[
        bool, typer.Option("--network", help="Also ask whether the model hub answers.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine can run, and why not the rest.

    \b
    tunebench doctor
    tunebench doctor --json | jq '.[] | select(.state == "no")'
    """
    from launch.doctor import findings
    from launch.listing import findings_text

    found = findings(network)
    if as_json:
        print_json([finding.as_json() for finding in found])
    else:
        print(findings_text(found))


@app.command()
def matrices(as_json: JsonOption = False) -> None:
    """List the matrices that come with tunebench.

    \b
    tunebench matrices
    tunebench plan method-comparison
    """
    from launch.listing import aligned
    from matrices.load import load, shipped

    found = [load(name) for name in shipped()]
    if as_json:
        print_json([{"name": m.name, "question": m.question, "path": str(m.path)} for m in found])
    else:
        print(aligned(("matrix", "question"), [(m.name, m.question) for m in found]))


def _located(error: UserError, matrix: Matrix) -> UserError:
    if error.where is None and error.key is not None:
        return UserError(error.message, key=error.key, where=matrix.locate(error.key))
    return error


for command in (predict, fit, report, show, calibration, claims):
    app.command()(command)


def main() -> None:
    """Entry point: the one place where a user's mistake becomes a line and an exit code."""
    try:
        app()
    except UserError as error:
        print_error(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
