"""`tunebench report`: the tables of a results directory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matrices.errors import UserError

if TYPE_CHECKING:
    from reports.records.load import Result

FIRST_TABLE = "methods"


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
    from reports.output.render import check_format
    from reports.records.load import load_records

    check_format(format_)
    if table is not None:
        print(table_text(load_records(results), table, format_, baseline, metric or []))
        return
    if page is not None:
        paths = [write_page(results, page, baseline, metric or [])]
    else:
        output = output or results / "report"
        paths = write_all(results, output, baseline, format_, metric or [])
    for path in paths:
        print(f"tunebench: wrote {path}", file=sys.stderr)


def table_text(
    results: list[Result],
    name: str,
    format: str,
    baseline: str | None,
    metrics: Sequence[str] = (),
) -> str:
    """A table in a format, one for each model and stack. Raises UserError when it would have no
    rows."""
    from reports.output.render import render
    from reports.tables.build import TABLES, build

    tables = build(results, name, baseline, metrics)
    if not tables:
        needs = ", ".join(TABLES[name].needs)
        raise UserError(f"nothing for the table {name}: it is about cells of method {needs}")
    return "\n\n".join(render(table, format).rstrip("\n") for table in tables)


def write_page(
    results: Path, file: Path, baseline: str | None, metrics: Sequence[str] = ()
) -> Path:
    """Write the self-contained HTML page; its links are relative to the page."""
    from harness.system.files import write_atomically
    from reports.output.page import page
    from reports.records.load import load_records
    from reports.tables.build import build_all

    records = load_records(results)
    tables = build_all(records, baseline, metrics)
    text = page(records, tables, file.parent, results.resolve().name, metrics)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    except OSError as error:
        raise UserError(f"cannot write the page: {error.strerror}", where=str(file)) from error
    return file


def write_all(
    results: Path,
    output: Path,
    baseline: str | None,
    format: str,
    metrics: Sequence[str] = (),
) -> list[Path]:
    """Write the whole report, and print the method comparison if there is one."""
    from reports.output.render import render
    from reports.output.write import write_report

    paths, tables = write_report(results, output, baseline, metrics)
    for table in tables:
        if table.name == FIRST_TABLE:
            print(render(table, format))
    return paths
