"""The columns of a local data file, as far as its first row tells."""

from __future__ import annotations

import csv
import json
from pathlib import Path


def first_columns(path: Path) -> tuple[str, ...]:
    """Empty where the file does not tell; what is wrong with it is said elsewhere."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return tuple(parquet.read_schema(path).names)
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return tuple(next(csv.reader(file), ()))
            first = next((line for line in file if line.strip()), "").strip()
            # A list on one line, or lines that each begin or are an object.
            row = json.loads(first.removeprefix("[").removesuffix(",").removesuffix("]") or "{}")
    except (OSError, ValueError, csv.Error):
        return ()
    return tuple(row) if isinstance(row, dict) else ()
