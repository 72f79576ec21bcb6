"""`tunebench report` and `tunebench show`: from paths and options to what `reports` makes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from harness.records.reading import RECORD, records_in
from harness.records.record import read_record
from harness.system.files import write_atomically
from matrices.errors import UserError
from reports.output.page import page
from reports.output.render import render
from reports.output.write import write_report
from reports.records.load import Result, bases, by_commit, index, load_records
from reports.show.record import show
from reports.tables.build import TABLES, build, build_all

FIRST_TABLE = "methods"


def table_text(
    results: list[Result],
    name: str,
    format: str,
    baseline: str | None,
    metrics: Sequence[str] = (),
) -> str:
    """A table in a format, for each model and stack; a sentence when there are no rows for it."""
    tables = build(results, name, baseline, metrics)
    if not tables:
        needs = ", ".join(TABLES[name].needs)
        raise UserError(f"nothing for the table {name}: it is about cells of method {needs}")
    return "\n\n".join(render(table, format).rstrip("\n") for table in tables)


def print_table(
    results: Path, name: str, format: str, baseline: str | None, metrics: Sequence[str] = ()
) -> None:
    print(table_text(load_records(results), name, format, baseline, metrics))


def write_page(
    results: Path, file: Path, baseline: str | None, metrics: Sequence[str] = ()
) -> Path:
    """Write the self-contained HTML page; its links are relative to where it is."""
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
    paths = write_report(results, output, baseline, metrics)
    for table in build_all(load_records(results), baseline, metrics):
        if table.name == FIRST_TABLE:
            print(render(table, format))
    return paths


def record_text(cell: str, results: Path, as_json: bool) -> str:
    """One record for people, or as it is for machines. Raises UserError when there is none."""
    path = find_record(cell, results)
    result = Result(by_commit(read_record(path)), path)
    if as_json:
        return path.read_text().rstrip("\n")
    beside = records_in(Path(os.path.normpath(path.parent / "..")))
    among = [Result(by_commit(record), directory / RECORD) for directory, record in beside]
    return show(result, bases(result, index(among)))


def find_record(cell: str, results: Path) -> Path:
    """The record.json of a path, or of the cell whose id starts so: its attempt in force.

    Raises UserError when nothing matches, or cells of several identities do.
    """
    named = Path(cell)
    if named.is_dir() and (named / "record.json").is_file():
        return named / "record.json"
    if named.is_file():
        return named
    if named.exists() or "/" in cell:
        raise UserError(f"{cell}: no record here; name a record's directory or its record.json")
    found = [
        result
        for result in index(load_records(results)).values()
        if result.record.cell_id.startswith(cell) or result.directory.name.startswith(cell)
    ]
    if not found:
        raise UserError(f"no record in {results} has a cell id that starts with {cell!r}")
    if len(found) > 1:
        paths = ", ".join(str(result.directory) for result in found[:4])
        raise UserError(f"{len(found)} records match {cell!r}: name one, e.g. {paths}")
    return found[0].path
