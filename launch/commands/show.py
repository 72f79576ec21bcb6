"""`tunebench show`: one record, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import JsonOption
from matrices.errors import UserError


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
    print(record_text(cell, results, as_json))


def record_text(cell: str, results: Path, as_json: bool) -> str:
    """One record as text for people, or as JSON. Raises UserError when there is none."""
    import os

    from harness.records.reading import RECORD, read_record, records_in
    from reports.records.load import Result, bases, by_commit, index
    from reports.show.record import show as shown

    path = find_record(cell, results)
    result = Result(by_commit(read_record(path)), path)
    if as_json:
        return path.read_text().rstrip("\n")
    beside = records_in(Path(os.path.normpath(path.parent / "..")))
    among = [Result(by_commit(record), directory / RECORD) for directory, record in beside]
    return shown(result, bases(result, index(among)))


def record_path(named: Path) -> Path:
    """The record.json that a user names by its path or its directory's. Raises UserError."""
    path = named / "record.json" if named.is_dir() else named
    if not path.is_file():
        raise UserError(f"{named}: no record here; name a record's directory or its record.json")
    return path


def find_record(cell: str, results: Path) -> Path:
    """The record.json of a path, or of the attempt in force of a cell, by the start of its id.

    Raises UserError when no cell matches, or several do.
    """
    from reports.records.load import index, load_records

    named = Path(cell)
    if named.exists() or "/" in cell:
        return record_path(named)
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
