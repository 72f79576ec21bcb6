"""The command line. Every heavy import is inside the command that needs it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.options import (
    JsonOption,
    MatrixArgument,
    ResultsOption,
    RetryOption,
    SeedsOption,
    SetOption,
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
    as_json: JsonOption = False,
) -> None:
    """Show the cells of a matrix and what would run.

    Each with its identity, and why it would run, be kept or be refused. Nothing is started or
    written.

    \b
    tunebench plan quickstart
    tunebench plan my-sweep.yaml --set rank=[8,64] --seeds 3
    tunebench plan my-sweep.yaml --json | jq '.[] | select(.action == "invalid")'
    """
    from launch.listing import plan_text

    found, _, jobs, combinations = _jobs(matrix, results, set_, seeds, retry)
    if as_json:
        _print_json([job.as_json() for job in jobs])
        return
    if found.question:
        print(f"{found.name}: {found.question}\n")
    print(plan_text(jobs, combinations))


@app.command()
def run(
    matrix: MatrixArgument,
    results: ResultsOption = None,
    set_: SetOption = None,
    seeds: SeedsOption = None,
    retry: RetryOption = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the cells of a matrix that are not measured yet.

    Finished cells are kept, so the same command goes on where the last one stopped. Ctrl-C lets
    the running cell write down what it has measured; a second one ends it at once.

    \b
    tunebench run quickstart
    tunebench run method-comparison --set model=Qwen/Qwen3-1.7B --seeds 3
    tunebench run my-sweep.yaml --results /shared/sweep --timeout 3600
    tunebench run my-sweep.yaml --retry oom
    """
    from harness.store import Store
    from launch.listing import outcome_json, outcome_text
    from launch.local import ProblemsFound, Runner, Stopped
    from launch.progress import display_for_stderr

    found, directory, jobs, _ = _jobs(matrix, results, set_, seeds, retry)
    display = display_for_stderr()
    runner = Runner(Store(directory), display, timeout or found.timeout_seconds)
    try:
        finished = runner.run(jobs)
    except ProblemsFound as error:
        # Cells share models, data and tasks, so they share problems.
        for problem in {str(each): each for each in error.problems}.values():
            _print_error(_located(problem, found))
        raise typer.Exit(2) from None
    except Stopped as stopped:
        print("tunebench: stopped before the first cell", file=sys.stderr)
        raise typer.Exit(128 + stopped.number) from None
    finally:
        display.close()
    if as_json:
        _print_json([outcome_json(job, finished.entries.get(job.key)) for job in jobs])
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
def report(
    results: Annotated[Path, typer.Argument(help="A results directory.")],
    table: Annotated[
        str | None, typer.Option("--table", help="Print this table only, and write nothing.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="Of the printed table: text, md, csv, html or latex.")
    ] = "text",
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Write the HTML page only.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Where to write.  [default: RESULTS/report]"),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="KEY=VALUE,...", help="The row that differences are against."
        ),
    ] = None,
) -> None:
    """Write and print the tables of a results directory.

    With units, intervals and differences to a baseline. Without options the frame (parquet, CSV),
    all tables (Markdown) and a page (HTML) are written, and the method comparison is printed.

    \b
    tunebench report results/quickstart
    tunebench report results/ --table quantization --format md
    tunebench report results/ --table rank-targets --baseline rank=8,target_modules=qv
    tunebench report results/ --page report.html
    """
    from launch.reporting import print_table, write_all, write_page

    if table is not None:
        print_table(results, table, format_, baseline)
        return
    if page is not None:
        paths = [write_page(results, page, baseline)]
    else:
        paths = write_all(results, output or results / "report", baseline, format_)
    for path in paths:
        print(f"tunebench: wrote {path}", file=sys.stderr)


@app.command()
def show(
    cell: Annotated[
        str,
        typer.Argument(
            metavar="CELL", help="A record's directory, its record.json, or the start of a cell id."
        ),
    ],
    results: Annotated[Path, typer.Option("--results", help="Where to look for a cell id.")] = Path(
        "results"
    ),
    as_json: JsonOption = False,
) -> None:
    """Print one record readably.

    What ran, memory by phase, speed, scores beside the base model's, and the command.

    \b
    tunebench show 4f0c22
    tunebench show results/quickstart/4f0c22d9a1b3-494adca8
    """
    from launch.reporting import record_text

    print(record_text(cell, results, as_json))


@app.command()
def rerun(
    record: Annotated[Path, typer.Argument(help="A record's directory or its record.json.")],
    timeout: TimeoutOption = None,
) -> None:
    """Repeat one recorded cell by its recorded command.

    The new record is the next attempt beside the old one, which stays as it is. Its path is
    printed.

    \b
    tunebench rerun results/quickstart/4f0c22d9a1b3-494adca8
    """
    from launch.local import Stopped
    from launch.progress import display_for_stderr
    from launch.rerun import record_path
    from launch.rerun import rerun as repeat

    display = display_for_stderr()
    try:
        entry, stopped_by = repeat(record_path(record), display, timeout)
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
        _print_json([finding.as_json() for finding in found])
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
        _print_json([{"name": m.name, "question": m.question, "path": str(m.path)} for m in found])
    else:
        print(aligned(("matrix", "question"), [(m.name, m.question) for m in found]))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _located(error: UserError, matrix: Matrix) -> UserError:
    if error.where is None and error.key is not None:
        return UserError(error.message, key=error.key, where=matrix.locate(error.key))
    return error


def _print_error(error: UserError) -> None:
    print(f"tunebench: error: {' '.join(str(error).split())}", file=sys.stderr)


def main() -> None:
    """Entry point: the one place where a user's mistake becomes a line and an exit code."""
    try:
        app()
    except UserError as error:
        _print_error(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
