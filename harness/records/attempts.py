"""Which of several attempts at a cell is in force: its record is the cell's result.

1. A finished attempt is preferred to one that was interrupted or skipped, which says nothing about
   the cell.
2. Attempts at one cell on one stack in one results directory are made one after another, under a
   claim, and are numbered: the highest number is the last, whatever the machines' clocks say.
3. Other stacks and other directories count for themselves: between them, the attempt that ended
   last is in force.

Every command uses these functions, so that a plan, a runner, `tunebench status` and a report agree.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from harness.records.record import Record

INCONCLUSIVE = ("interrupted", "skipped")


class Attempt(Protocol):
    """A published record and the directory it is in."""

    @property
    def record(self) -> Record: ...
    @property
    def directory(self) -> Path: ...


A = TypeVar("A", bound=Attempt)
K = TypeVar("K", bound=Hashable)


def in_force(attempts: Iterable[A]) -> A | None:
    """The attempt in force among attempts at one cell, in any order; None when there are none. The
    path decides between attempts that are otherwise equal."""
    last_of_series: dict[Hashable, A] = {}
    for each in attempts:
        series = (each.directory.parent, each.record.cell_id, each.record.stack_id)
        last = last_of_series.setdefault(series, each)
        if _within_series(last) < _within_series(each):
            last_of_series[series] = each
    return max(last_of_series.values(), key=_between_series, default=None)


def in_force_by(attempts: Iterable[A], key: Callable[[A], K]) -> dict[K, A]:
    """The attempt in force among those with the same `key`, by key, in the order of first sight."""
    groups: dict[K, list[A]] = {}
    for each in attempts:
        groups.setdefault(key(each), []).append(each)
    return {name: found for name, group in groups.items() if (found := in_force(group))}


def _within_series(attempt: Attempt) -> tuple[Any, ...]:
    return (
        _is_conclusive(attempt),
        attempt.record.attempt,
        _ended(attempt),
        str(attempt.directory),
    )


def _between_series(attempt: Attempt) -> tuple[Any, ...]:
    return (
        _is_conclusive(attempt),
        _ended(attempt),
        attempt.record.attempt,
        str(attempt.directory),
    )


def _is_conclusive(attempt: Attempt) -> bool:
    return attempt.record.status not in INCONCLUSIVE


def _ended(attempt: Attempt) -> datetime:
    return datetime.fromisoformat(attempt.record.ended or attempt.record.started)
