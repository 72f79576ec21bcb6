"""What would stop cells, as far as it can be told without importing torch: the quick half of
`harness.preflight`, for `tunebench plan` and before a run imports anything."""

from __future__ import annotations

from collections.abc import Sequence

from harness.problems import Findings, Problem, shared
from matrices import passed_through
from matrices.cell import Cell


def problems(cells: Sequence[Cell]) -> list[Problem]:
    """Everything the user has to put right, each said once. Reads local files only."""
    found = Findings()
    for given, having in shared(cells, lambda cell: list(passed_through.given(cell)) or None):
        for class_name, arguments in given:
            for error in passed_through.mistakes(class_name, arguments):
                found.add(having, error)
    return found.problems
