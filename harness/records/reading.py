"""Reading records: one file, or those of a results directory, as every command does.

A file that is no valid record is set aside with one line, and the rest goes on. A missing file is
no record and needs no line.
"""

from __future__ import annotations

import json
import os
import re
import stat
import warnings
from collections.abc import Container, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.records.record import SCHEMA_VERSION, Record
from matrices.cell import SECTIONS, split_unknown
from matrices.errors import SetAside, UserError

CELL, RECORD = "cell.json", "record.json"


def set_aside(error: UserError) -> None:
    """Say in one line that a file is passed over, and why."""
    text = " ".join(f"{error}; set aside".split())
    warnings.warn("".join(c if c.isprintable() else "\ufffd" for c in text), SetAside, stacklevel=2)


def read_valid(path: Path) -> Record | None:
    """The record in a file; None when the file is missing or set aside."""
    try:
        return read_record(path)
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            set_aside(error)
        return None


def records_in(root: Path, known: Container[str] = ()) -> Iterator[tuple[Path, Record]]:
    """The sound records of one results directory with the directories they are in, by name.

    Names that start with a dot are work in progress; those in `known` are left out too.
    """
    for name in _names(root):
        if name not in known:
            record = read_valid(root / name / RECORD)
            if record is not None:
                yield root / name, record


def record_files(root: Path) -> Iterator[Path]:
    """Every `record.json` at any depth, sorted; directories that start with a dot are skipped, and
    so are directories within that of a record: a cell repeated by hand."""
    seen: set[str] = set()

    def walk(directory: Path) -> Iterator[Path]:
        real = os.path.realpath(directory)
        if real in seen:  # reached by a link before
            return
        seen.add(real)
        names = _names(directory)
        if RECORD in names:
            yield directory / RECORD
            if directory != root:
                return
        for name in names:
            if name != RECORD and os.path.isdir(directory / name):
                yield from walk(directory / name)

    yield from walk(root)


def _names(directory: Path) -> list[str]:
    """Names in a directory that do not start with a dot, sorted; none of a missing directory."""
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        set_aside(UserError(f"cannot be listed: {error.strerror}", where=str(directory)))
        return []


def read_record(path: Path) -> Record:
    """Read `record.json`; fields that this version does not know are kept.

    Raises UserError naming the file when it is not a record of this or an older schema, or when
    its cell does not hash to its `cell_id`: it was changed, or it has settings that this version
    does not know and that are not at their writer's defaults.
    """
    plain = _plain(path)
    unknown: dict[str, Any] = {}
    if isinstance(plain.get("cell"), dict):
        plain["cell"], unknown = split_unknown(plain["cell"])
    try:
        record = Record.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            first["msg"], where=str(path), key=".".join(str(part) for part in first["loc"])
        ) from error
    record._unknown_settings = unknown
    _check_identity(record, path)
    _check_formats(record, path)
    return record


def _plain(path: Path) -> dict[str, Any]:
    """The JSON object in a file, of a schema that this version reads."""
    try:
        # Reading a pipe would wait.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError("not a readable record: it is not a file", where=str(path))
        plain: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"not a readable record: {why}", where=str(path)) from error
    version = plain.get("schema_version") if isinstance(plain, dict) else None
    if type(version) is not int:
        raise UserError("not a record: it has no schema_version", where=str(path))
    if version > SCHEMA_VERSION:
        raise UserError(
            f"written by a newer tunebench: {version} is above {SCHEMA_VERSION}, the newest this "
            "one reads; upgrade tunebench",
            where=str(path),
            key="schema_version",
        )
    found: dict[str, Any] = plain
    return found


def _check_identity(record: Record, path: Path) -> None:
    hashed = record.cell.cell_id
    if hashed == record.cell_id:
        return
    names: list[str] = []
    for name, value in record._unknown_settings.items():
        names += [f"{name}.{leaf}" for leaf in value] if name in SECTIONS else [name]
    if names:
        raise UserError(
            "written by a newer tunebench, with settings that this one does not know "
            f"({', '.join(names)}); upgrade tunebench",
            where=str(path),
            key="cell",
        )
    raise UserError(
        f"{record.cell_id[:12]!r} is not the hash of this cell ({hashed[:12]}): the record was "
        "changed after it was written",
        where=str(path),
        key="cell_id",
    )


def _check_formats(record: Record, path: Path) -> None:
    """Raise UserError when a time or the stack_id, which names a directory, has a wrong format."""
    for key, value in (("started", record.started), ("ended", record.ended or record.started)):
        try:
            known = datetime.fromisoformat(value).tzinfo is not None
        except ValueError:
            known = False
        if not known:
            raise UserError(
                f"{value[:40]!r} is no moment in ISO 8601 with its time zone",
                where=str(path),
                key=key,
            )
    if not re.fullmatch("[0-9a-f]{8,64}", record.stack_id):
        raise UserError(
            f"{record.stack_id[:40]!r} is no hash, in hexadecimal", where=str(path), key="stack_id"
        )
