"""Local data files: rows of JSON, and errors of a file with their rows.

Light (no torch, no datasets), so that a plan can check the first rows.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TextIO

from harness.data.rows import BadValue, shorten, standard_row
from matrices.cell import Data
from matrices.errors import UserError, first_line
from matrices.files.data_format import RowLayout, layout_of

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# How many rows give the columns of a JSON file; a plan checks as many.
FIRST_ROWS = 1000
# Cells of a CSV that pandas takes for missing values (its documented na_values).
MISSING_VALUES = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND"),
        *("1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)
NUMBER = re.compile(r"\s*-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?\s*")
OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}
GZIP = b"\x1f\x8b"
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def check_first_rows(data: Data) -> None:
    """Check the first rows of a local file. Preflight checks the other rows, and all other data.

    Raises UserError with the row, counted from 1 (the line of a JSONL file), the column and the
    value.
    """
    path = Path(data.source).expanduser()
    if path.suffix not in READERS or not path.is_file():
        return
    if READERS[path.suffix] == "csv":
        check_csv(data, FIRST_ROWS)
    limit = min(FIRST_ROWS, data.max_samples or FIRST_ROWS)
    rows = list(islice(_read_rows(path), limit))
    layout = infer_layout(data, rows)
    for number, row in rows:
        standardize_row(data.source, number, row, layout)


def infer_layout(data: Data, rows: Sequence[tuple[int, dict[str, Any]]]) -> RowLayout:
    """The layout of a file, from its first rows. Raises UserError."""
    if not rows:
        raise UserError(f"{data.source} has no rows", key="data.source")
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    if not columns:
        raise UserError(f"{data.source}: row {rows[0][0]} has no columns", key="data.source")
    first = next((row for _, row in rows if row), {})
    return layout_of(data, columns, first)


def standardize_row(
    source: str, number: int, row: dict[str, Any], layout: RowLayout
) -> dict[str, Any]:
    """`standard_row`, whose BadValue becomes a UserError with file and row."""
    try:
        return standard_row(row, layout)
    except BadValue as error:
        said = str(error)
        path = Path(source).expanduser()
        if error.is_null and path.suffix == ".csv" and path.is_file():
            written = csv_cell(path, number, error.column)
            what = f"holds {written!r}, which is read as a missing value" if written else "is empty"
            said = f"column {error.column!r} {what}; write its text or remove the row"
        raise UserError(f"{source}: row {number}: {said}", key="data.source") from error


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    read = {"csv": _first_csv_rows, "parquet": _parquet_rows, "json": json_rows}
    return read[READERS[path.suffix]](path)


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of each row: objects on lines of their own (the number is the line), any
    other sequence of objects, or one list of objects or texts (the number is the place in it).

    Raises UserError for what is none of these.
    """
    with _open_text(path) as file:
        for number, value in _json_values(path, file):
            if not isinstance(value, dict):
                said = f"row {number}: {shorten(value)} is not a JSON object"
                raise _file_error(path, f'{said}; write one such as {{"text": "..."}}')
            yield number, value


class _DuplicateKey(Exception):
    """An object has a key twice; JSON readers use either of the two."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateKey(f"has the key {twice!r} twice; rename or remove one")
    return found


def _json_values(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    lines = _decode_lines(path, file)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            yield from _json_list(path, line + "".join(lines), number)
            return
        try:
            value = json.loads(line.strip(), object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            # An object over several lines, or a broken one.
            yield from _json_stream(path, line + "".join(lines), number, error)
            return
        except _DuplicateKey as error:
            raise _file_error(path, f"row {number} {error}") from error
        yield number, value


def _json_list(path: Path, text: str, line: int) -> Iterator[tuple[int, Any]]:
    try:
        values = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise _json_error(path, error, line) from error
    except _DuplicateKey as error:
        raise _file_error(path, f"a row {error}") from error
    for number, value in enumerate(values, 1):
        yield number, {"text": value} if isinstance(value, str) else value


def _json_stream(
    path: Path, text: str, line: int, failed: json.JSONDecodeError
) -> Iterator[tuple[int, Any]]:
    """Consecutive objects from this line on; `failed` is the error of parsing the line alone."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    space, at, first = re.compile(r"\s*"), 0, True
    while (at := space.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            one_per_line = first and line > 1
            raise _json_error(path, failed if one_per_line else error, line) from error
        except _DuplicateKey as error:
            raise _file_error(path, f"row {line + text.count(chr(10), 0, at)} {error}") from error
        yield line + text.count("\n", 0, at), value
        at, first = end, False


def _json_error(path: Path, error: json.JSONDecodeError, line: int) -> UserError:
    at = line + error.lineno - 1
    shown = error.doc.splitlines()[error.lineno - 1 : error.lineno] or [""]
    said = f"row {at} is not JSON: {error.msg} (character {error.colno} of {shorten(shown[0])})"
    return _file_error(path, f"{said}; correct this line")


def _file_error(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}", key="data.source")


def _open_text(path: Path) -> TextIO:
    """The file as text; a gzip is unpacked, as datasets does. Raises UserError."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start.startswith(UTF16):
            raise _file_error(path, "is UTF-16; save it as UTF-8")
        if start.startswith(GZIP):
            return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
        return path.open(encoding="utf-8-sig", newline="\n")
    except OSError as error:
        raise _file_error(path, f"cannot be read: {error.strerror}") from error


def _decode_lines(path: Path, lines: Iterable[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise _encoding_error(path) from error
    except (OSError, EOFError) as error:
        raise _file_error(path, f"cannot be read: {error}") from error


def _encoding_error(path: Path) -> UserError:
    before = 0
    for number, line in enumerate(_raw_lines(path), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            byte = line[error.start]
            what = (
                f"{_row_of_line(path, number)}: byte {before + error.start + 1} of the file is "
                f"0x{byte:02x} ({bytes([byte]).decode('latin-1')!r} in latin-1), which is not "
                "UTF-8; save it as UTF-8"
            )
            return _file_error(path, what)
        before += len(line)
    return _file_error(path, "is not UTF-8; save it as UTF-8")


def _raw_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        zipped = file.read(2) == GZIP
    with gzip.open(path) if zipped else path.open("rb") as lines:
        yield from lines


def _row_of_line(path: Path, line: int) -> str:
    """The row of a line: the same in JSON, while a CSV has a header and rows of several lines."""
    if path.suffix != ".csv":
        return f"row {line}"
    reader = csv.reader(line.decode("latin-1") for line in _raw_lines(path))
    records = next(at for at, _ in enumerate(filter(None, reader)) if reader.line_num >= line)
    return f"row {records} (line {line})" if records else f"the header (line {line})"


def check_csv(data: Data, limit: int | None = None) -> None:
    """Raise UserError for a CSV that pandas would silently misread: another delimiter, a column
    name that occurs twice, or a row with more fields than the header."""
    path = Path(data.source).expanduser()
    records = _csv_records(path)
    header = next(records, [])
    if not header:
        raise _file_error(path, "has no rows")
    if len(header) == 1:
        for delimiter, name in OTHER_DELIMITERS.items():
            if delimiter in header[0]:
                what = f"is separated by {name} ({shorten(header[0])} would be one column)"
                raise _file_error(path, f"{what}; save it with commas")
    for column in layout_of(data, header, {}).columns:
        if header.count(column) > 1:
            raise _file_error(path, f"has the column {column!r} twice; rename or remove one")
    for number, record in enumerate(islice(records, limit), 1):
        # R writes row names without a column name; pandas reads them correctly.
        row_names = len(record) == len(header) + 1 and record[0] == str(number)
        if len(record) > len(header) and not row_names:
            what = f"row {number} has {len(record)} fields and the header {len(header)}"
            raise _file_error(path, f"{what}; put a field that holds a comma in quotes")


def csv_cell(path: Path, row: int, column: str) -> str | None:
    """The text of a cell, rows counted from 1; None where the row has no such field."""
    records = _csv_records(path)
    at = next(records).index(column)
    record = next(islice(records, row - 1, None), [])
    return record[at] if at < len(record) else None


def _csv_records(path: Path) -> Iterator[list[str]]:
    """The header and the rows, without blank lines."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with _open_text(path) as file:
            for record in csv.reader(_decode_lines(path, file)):
                if record:
                    yield record
    except csv.Error as error:
        raise _file_error(path, f"cannot be read as CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _first_csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The first rows with pandas' conversions: missing values, and columns of numbers alone if the
    file is short."""
    records = _csv_records(path)
    header = next(records, [])
    width = len(header)
    # Row names written by R come before the columns.
    rows = [record[-width:] for record in islice(records, FIRST_ROWS + 1)]
    is_short = len(rows) <= FIRST_ROWS
    numbers = {at for at in range(width) if is_short and _all_numbers(rows, at)}
    for number, row in enumerate(rows[:FIRST_ROWS], 1):
        fields: list[Any] = [None if field in MISSING_VALUES else field for field in row]
        for at in numbers.intersection(range(len(row))):
            fields[at] = fields[at] and json.loads(fields[at].strip())
        yield number, dict(zip_longest(header, fields))


def _all_numbers(rows: Sequence[Sequence[str]], at: int) -> bool:
    values = [row[at] for row in rows if at < len(row) and row[at] not in MISSING_VALUES]
    return bool(values) and all(NUMBER.fullmatch(cell) for cell in values)


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            batch = next(file.iter_batches(batch_size=FIRST_ROWS), None)
    except (pyarrow.ArrowException, OSError) as error:
        raise _file_error(path, f"cannot be read as parquet: {first_line(error)}") from error
    yield from enumerate([] if batch is None else batch.to_pylist(), 1)
