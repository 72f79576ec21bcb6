"""The command line. Every heavy import is inside the command that needs it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer

from harness.system.platforms import need_linux
from launch.commands.claims import claims
from launch.commands.console import print_error, print_json, show_set_aside
from launch.commands.options import (
    CheckOption,
    GpuOption,
    GpusFileOption,
    JsonOption,
    MatrixArgument,
    NoPredictOption,
    PhaseTimeoutOption,
    ResultsOption,
    RetryOption,
    SeedsOption,
    SetOption,
    TimeoutOption,
)
from launch.commands.predict import fit, predict
from launch.commands.profiles import profiles
from launch.commands.report import calibration, report, show
from launch.commands.run import exit_code, run, sweep_of
from launch.commands.status import status

app = typer.Typer(
    name="tunebench",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # rich would double the time to the first line of help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    tunebench status results/quickstart what runs, waits and has ended, on whatever machine
    tunebench report results/quickstart tables

    Exit codes: 0 all is well; 1 a bug (with its traceback); 2 something to put right (one line
    says what); 3 a run ended with failed cells; 130 and 143 stopped by Ctrl-C and SIGTERM.
    """
    show_set_aside()


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
    from launch.commands.plan_check import checked
    from launch.commands.predict import predictions_of
    from launch.display.predictions import footer
    from launch.display.tables import plan_text
    from launch.planning.left_out import nothing_left
    from launch.planning.plan import plan_jobs

    found, sweep, combinations = sweep_of(matrix, results, set_, seeds, retry)
    present = Store(sweep.results).latest()
    jobs = plan_jobs(sweep.cells, present, sweep.retry, sweep.score_base)
    jobs, problems = checked(jobs, check)
    predictions = {} if no_predict else predictions_of(jobs, gpu, gpus_file)
    if as_json:
        print_json([job.as_json(predictions.get(job.cell.cell_id)) for job in jobs])
    else:
        if found.question:
            print(f"{found.name}: {found.question}\n")
        print(plan_text(jobs, combinations, predictions))
        if predictions:
            print(footer(predictions.values()))
    if problems and nothing_left(jobs):
        for problem in problems:
            print_error(sweep.located(problem.error))
        raise typer.Exit(2)


@app.command()
def rerun(
    record: Annotated[Path, typer.Argument(help="A record's directory or its record.json.")],
    timeout: TimeoutOption = None,
    phase_timeout: PhaseTimeoutOption = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Let the cell run code that comes with its model or its evaluation tasks.",
        ),
    ] = False,
    no_predict: NoPredictOption = False,
) -> None:
    """Repeat one recorded cell by `accelerate launch`, as by hand.

    The command is made from the record's cell. The new record is the next attempt beside the old
    one, which stays as it is. Its path is printed.

    \b
    tunebench rerun results/quickstart/4f0c22d9a1b3-494adca8
    """
    from functools import partial

    need_linux("rerun")
    from launch.cells.rerun import Options, record_path
    from launch.cells.rerun import rerun as repeat
    from launch.display.prediction_progress import show_for_stderr
    from launch.display.progress import display_for_stderr
    from launch.predict.before_run import foretell

    display = display_for_stderr()
    predicting = None if no_predict else partial(foretell, show=show_for_stderr())
    try:
        options = Options(timeout, phase_timeout, predicting, trust_remote_code)
        entry, stopped_by = repeat(record_path(record), display, options)
    finally:
        display.close()
    print(entry.directory / "record.json")
    raise typer.Exit(exit_code({"": entry}, stopped_by))


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
    from launch.commands.doctor import findings, findings_text

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
    from launch.display.tables import aligned
    from matrices.load import load, shipped

    found = [load(name) for name in shipped()]
    if as_json:
        print_json([{"name": m.name, "question": m.question, "path": str(m.path)} for m in found])
    else:
        print(aligned(("matrix", "question"), [(m.name, m.question) for m in found]))


for command in (run, status, predict, fit, report, show, calibration, claims, profiles):
    app.command()(command)
