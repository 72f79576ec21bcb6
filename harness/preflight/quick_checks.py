"""What would stop cells, as far as it can be told without importing torch: the quick half of
`harness.preflight.preflight`, for `tunebench plan` and before a run imports anything."""

from __future__ import annotations

from collections.abc import Sequence

from harness.data import local_files
from harness.models import checkpoint
from harness.preflight.problems import Findings, Problem, group_cells
from matrices.cell import Cell
from matrices.rules import passed_through


def problems(cells: Sequence[Cell]) -> list[Problem]:
    """Everything the user has to put right, each said once. Reads local files only."""
    found = Findings()
    check(found, cells)
    return found.problems


def check(found: Findings, cells: Sequence[Cell]) -> None:
    """Add to `found` what the cells' files and the installed libraries' sources tell."""
    for _, having in group_cells(cells, lambda cell: (cell.method, cell.model, cell.quantization)):
        found.check(having, checkpoint.check, having[0])
    for source, having in group_cells(cells, lambda cell: cell.data):
        found.check(having, local_files.check_first_rows, source)
    for given, having in group_cells(cells, lambda cell: list(passed_through.given(cell)) or None):
        for class_name, arguments in given:
            for error in passed_through.mistakes(class_name, arguments):
                found.add(having, error)
