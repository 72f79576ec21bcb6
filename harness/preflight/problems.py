"""Problems of a sweep, and the cells that have them. Light (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matrices.cell import Cell
from matrices.errors import UserError


@dataclass(frozen=True)
class Problem:
    """A mistake of the user, and the `cell_id`s of the cells that cannot run because of it."""

    error: UserError
    cells: tuple[str, ...]


class Findings:
    """Collects the errors that checks raise. Equal errors are one problem."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[UserError, dict[str, None]]] = {}

    def check(self, cells: Sequence[Cell], check: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a check; None when it raises UserError, which becomes a problem of
        `cells`."""
        try:
            return check(*arguments)
        except UserError as error:
            self.add(cells, error)
            return None

    def add(self, cells: Iterable[Cell], error: UserError) -> None:
        _, having = self._found.setdefault(str(error), (error, {}))
        having |= {cell.cell_id: None for cell in cells}

    def without(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells that have no problem so far."""
        having = {cell_id for _, ids in self._found.values() for cell_id in ids}
        return [cell for cell in cells if cell.cell_id not in having] if having else list(cells)

    @property
    def problems(self) -> list[Problem]:
        return [Problem(error, tuple(having)) for error, having in self._found.values()]


def group_cells(cells: Iterable[Cell], key: Callable[[Cell], Any]) -> list[tuple[Any, list[Cell]]]:
    """Each distinct result of `key` except None, with its cells; in order."""
    found: dict[str, tuple[Any, list[Cell]]] = {}
    for cell in cells:
        value = key(cell)
        if value is not None:
            # Settings may hold mappings, which cannot be hashed.
            found.setdefault(repr(value), (value, []))[1].append(cell)
    return list(found.values())
