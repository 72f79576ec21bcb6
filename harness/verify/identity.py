"""Check that local models and data have not changed since the cell was planned."""

from __future__ import annotations

from pathlib import Path

from matrices.cell import Cell
from matrices.files.fingerprint import fingerprint, is_unchanged


class ChangedError(RuntimeError):
    """A local model or data file differs from the fingerprint in the cell."""


def check(cell: Cell) -> None:
    """Hash the local model and data of a cell again. Raises ChangedError when a hash differs from
    the cell's fingerprint, UserError when a file cannot be read."""
    sources = [("model", cell.model.name, cell.model.fingerprint)]
    if cell.data is not None:
        sources.append(("data", cell.data.source, cell.data.fingerprint))
    for what, name, planned in sources:
        path = Path(name).expanduser()
        if planned is not None and not is_unchanged(path, planned):
            raise ChangedError(
                f"the {what} {path} changed after the cell was planned: sha256 was "
                f"{planned[:12]} and is {fingerprint(path)[:12]}; run the matrix again for what "
                "is there now"
            )
