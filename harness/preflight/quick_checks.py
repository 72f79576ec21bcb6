"""The checks of `harness.preflight.preflight` that need no torch, for `tunebench plan` and for a
run before it imports anything."""

from __future__ import annotations

from collections.abc import Sequence

from harness.data import local_files
from harness.models import checkpoint
from harness.preflight.problems import Findings, Problem, group_cells
from matrices.cell import Cell
from matrices.rules import passed_through


def problems(cells: Sequence[Cell]) -> list[Problem]:
    """All problems, each once. It reads local files only."""
    found = Findings()
    check(found, cells)
    return found.problems


def check(found: Findings, cells: Sequence[Cell]) -> None:
    """Add to `found` the problems of local files and of arguments that libraries do not take."""
    for _, having in group_cells(cells, lambda cell: (cell.method, cell.model, cell.quantization)):
        found.check(having, checkpoint.check, having[0])
    for source, having in group_cells(cells, lambda cell: cell.data):
        found.check(having, local_files.check_first_rows, source)
    for given, having in group_cells(cells, lambda cell: list(passed_through.given(cell)) or None):
        for class_name, arguments in given:
            for error in passed_through.mistakes(class_name, arguments):
                found.add(having, error)
