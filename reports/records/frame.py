"""The tidy frame: one row per record, one column per figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matrices.files.text import visible
from reports.records.columns import COLUMNS
from reports.records.derived import quality_keys
from reports.records.load import Index, Result, bases, index, load_records
from reports.records.samples import difference
from reports.statistics.intervals import NotComparable

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["frame", "load_records", "read_csv"]

QUALITY_PARTS = {
    "": "Float64",
    ".stderr": "Float64",
    ".n": "Int64",
    ".minus_untouched": "Float64",
    ".minus_untouched_low": "Float64",
    ".minus_untouched_high": "Float64",
    ".minus_quantized": "Float64",
    ".minus_quantized_low": "Float64",
    ".minus_quantized_high": "Float64",
}


def frame(records: Sequence[Result]) -> pd.DataFrame:
    """One row per record. Units are in the names (`_bytes`, `_seconds`); what was not measured is
    NA. Quality is `quality.TASK.METRIC` with `.stderr`, `.n` and the paired differences to the
    base model (`.minus_untouched`, `.minus_quantized`) with their 95 % interval over documents.
    `superseded` marks attempts that a newer one of the same cell and stack replaces; `record` is
    the path of the record as it was found.
    """
    import pandas as pd

    newest = index(records)
    in_force = {id(result) for result in newest.values()}
    keys = quality_keys(result.record for result in records)
    rows = []
    for result in records:
        row = {column.name: column.value(result.record) for column in COLUMNS}
        row |= {"superseded": id(result) not in in_force, "record": result.path.as_posix()}
        for task, metric in keys:
            row |= _quality(result, newest, task, metric)
        rows.append({name: visible(v) if isinstance(v, str) else v for name, v in row.items()})
    dtypes = _dtypes(keys)
    table = pd.DataFrame(rows, columns=list(dtypes))
    return table.astype(dtypes)


def _dtypes(keys: Iterable[tuple[str, str]]) -> dict[str, str]:
    fixed = {column.name: column.dtype for column in COLUMNS}
    quality = {
        f"quality.{task}.{metric}{part}": dtype
        for task, metric in keys
        for part, dtype in QUALITY_PARTS.items()
    }
    return {**fixed, "superseded": "boolean", "record": "string", **quality}


def _quality(result: Result, newest: Index, task: str, metric: str) -> dict[str, Any]:
    score = result.record.quality.tasks.get(task)
    if score is None or metric not in score.metrics:
        return {}
    name = f"quality.{task}.{metric}"
    row: dict[str, Any] = {
        name: score.metrics[metric].value,
        f"{name}.stderr": score.metrics[metric].stderr,
        f"{name}.n": score.n,
    }
    for role, base in bases(result, newest).items():
        try:
            estimate = difference([(result, base)], task, metric)
        except NotComparable:
            continue  # The table and `show` give the reason; here it is an absent figure.
        row |= {
            f"{name}.minus_{role}": estimate.value,
            f"{name}.minus_{role}_low": estimate.low,
            f"{name}.minus_{role}_high": estimate.high,
        }
    return row


def read_csv(path: Path) -> pd.DataFrame:
    """Read a frame back from its CSV with the dtypes it had."""
    import pandas as pd

    names = pd.read_csv(path, nrows=0).columns
    fixed = {column.name: column.dtype for column in COLUMNS}
    fixed |= {"superseded": "boolean", "record": "string"}
    dtypes = {
        name: fixed.get(name) or ("Int64" if name.endswith(".n") else "Float64") for name in names
    }
    return pd.read_csv(
        path,
        dtype=dtypes,
        keep_default_na=False,
        na_values=[""],
    )
