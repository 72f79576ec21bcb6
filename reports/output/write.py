"""The report of a results directory: frame, Markdown and page."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from harness.system.files import TEMPORARY_PREFIX, sync_directory, write_atomically
from matrices.errors import UserError
from reports.output.page import page
from reports.output.render import escape_markdown, render
from reports.records.frame import frame, load_records
from reports.tables.build import build_all
from reports.tables.model import Table


def write_report(
    results: Path, output: Path, baseline: str | None = None, metrics: Sequence[str] = ()
) -> tuple[list[Path], list[Table]]:
    """Write `records.parquet`, `records.csv`, `report.md` and `report.html` into `output`, made if
    it is not there. Returns their paths and the tables. Each file is replaced whole or not at all.

    A table in which no row has the `baseline` keeps its default one; `metrics` are shown where a
    task has them. Raises UserError for results
    that cannot be read, a baseline that no table has or that selects several rows, and an output
    directory that cannot be written.
    """
    records = load_records(results)
    tables = build_all(records, baseline, metrics)
    name = results.resolve().name
    table = frame(records)
    links = [Path(os.path.relpath(result.path, output)).as_posix() for result in records]
    table = table.assign(record=links).astype({"record": "string"})
    parquet = BytesIO()
    table.to_parquet(parquet, index=False)
    texts = {
        "records.csv": table.to_csv(index=False, lineterminator="\n"),
        "report.md": markdown(tables, name, output),
        "report.html": page(records, tables, output, name, metrics),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        _write_bytes(output / "records.parquet", parquet.getvalue())
        for file, text in texts.items():
            write_atomically(output / file, text)
    except OSError as error:
        raise UserError(f"cannot write the report: {error}", where=str(output)) from error
    return [output / "records.parquet", *[output / file for file in texts]], tables


def markdown(tables: Sequence[Table], name: str, directory: Path) -> str:
    """All tables as one Markdown document whose links are relative to `directory`."""
    parts = [f"# {escape_markdown(name)}\n"]
    parts += [render(table, "md", directory) for table in tables]
    return "\n".join(parts)


def _write_bytes(path: Path, content: bytes) -> None:
    """Like `write_atomically`, for a file that is not text."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY_PREFIX)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
