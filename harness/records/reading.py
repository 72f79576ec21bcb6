"""Records of a results directory, as every command reads them.

A file that is no sound record is set aside with one line, and the rest goes on. What is not there,
or not there any more, is no record and needs no line.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Container, Iterator
from pathlib import Path

from harness.records.record import Record, read_record
from matrices.errors import SetAside, UserError

CELL, RECORD = "cell.json", "record.json"


def set_aside(error: UserError) -> None:
    """Say in one line that a file is passed over, and why."""
    text = " ".join(f"{error}; set aside".split())
    warnings.warn("".join(c if c.isprintable() else "\ufffd" for c in text), SetAside, stacklevel=2)


def read_valid(path: Path) -> Record | None:
    """The record in a file; none when there is no such file, or when it is set aside."""
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
    so is what lies within the directory of a record: a cell repeated there by hand."""
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
    """Names in a directory that do not start with a dot, sorted; none when it is not there."""
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        set_aside(UserError(f"cannot be listed: {error.strerror}", where=str(directory)))
        return []
