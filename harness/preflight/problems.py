"""What the user has to put right, and which cells have it. Light (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matrices.cell import Cell
from matrices.errors import UserError


@dataclass(frozen=True)
class Problem:
    """A mistake of the user's, and the `cell_id`s of the cells that cannot run because of it."""

    error: UserError
    cells: tuple[str, ...]


class Findings:
    """Collects what checks complain about. A complaint that comes twice is one problem."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[UserError, dict[str, None]]] = {}

    def check(self, cells: Sequence[Cell], check: Callable[..., Any], *about: Any) -> Any:
        """The check's answer. Where it raises UserError: none, and all of `cells` have the
        problem."""
        try:
            return check(*about)
        except UserError as error:
            self.add(cells, error)
            return None

    def add(self, cells: Iterable[Cell], error: UserError) -> None:
        _, having = self._found.setdefault(str(error), (error, {}))
        having |= {cell.cell_id: None for cell in cells}

    def without(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those of the cells that have no problem so far."""
        having = {cell_id for _, ids in self._found.values() for cell_id in ids}
        return [cell for cell in cells if cell.cell_id not in having] if having else list(cells)

    @property
    def problems(self) -> list[Problem]:
        return [Problem(error, tuple(having)) for error, having in self._found.values()]


def group_cells(
    cells: Iterable[Cell], about: Callable[[Cell], Any]
) -> list[tuple[Any, list[Cell]]]:
    """Each distinct answer of `about`, none left out, with the cells that give it; in order."""
    found: dict[str, tuple[Any, list[Cell]]] = {}
    for cell in cells:
        thing = about(cell)
        if thing is not None:
            # Settings may hold mappings, which cannot be hashed.
            found.setdefault(repr(thing), (thing, []))[1].append(cell)
    return list(found.values())
