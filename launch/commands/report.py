"""The commands that read results: tables, one record, and how right the predictions were."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import JsonOption


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
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="Show this metric of the tasks that have it (acc_norm); may be given again.",
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
    tunebench report results/ --metric acc_norm --metric acc
    tunebench report results/ --page report.html
    """
    from launch.commands.reporting import print_table, write_all, write_page
    from reports.output.render import check_format

    check_format(format_)
    if table is not None:
        print_table(results, table, format_, baseline, metric or [])
        return
    if page is not None:
        paths = [write_page(results, page, baseline, metric or [])]
    else:
        output = output or results / "report"
        paths = write_all(results, output, baseline, format_, metric or [])
    for path in paths:
        print(f"tunebench: wrote {path}", file=sys.stderr)


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
    from launch.commands.reporting import record_text

    print(record_text(cell, results, as_json))


def calibration(
    results: Annotated[Path, typer.Argument(help="A results directory.")],
    as_json: JsonOption = False,
) -> None:
    """Say how far predictions were from what was measured, family by family.

    A family is a kind of model, method, 4-bit format, optimizer and way to spread, on one device.
    The error is predicted / measured - 1.

    \b
    tunebench calibration results/
    tunebench calibration results/my-sweep --json | jq '.[].memory.worst'
    """
    from launch.commands.console import print_json
    from reports.predictions.errors import calibration_text, families
    from reports.records.load import load_records

    found = families(load_records(results))
    if as_json:
        print_json([family.as_json() for family in found])
    else:
        print(calibration_text(found))
