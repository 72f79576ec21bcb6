"""The cells of a run that have a problem: left out, recorded as invalid, and told once each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from harness.preflight import quick_checks
from harness.preflight.problems import Problem
from launch.planning.plan import Job, Sweep
from matrices.cell import Cell, base_cells
from matrices.errors import UserError


class ProblemsFound(Exception):
    """Mistakes of the user's leave nothing to run; nothing was started."""

    def __init__(self, problems: list[UserError]) -> None:
        super().__init__(f"{len(problems)} problems")
        self.problems = problems


class Teller(Protocol):
    def message(self, text: str) -> None: ...


def leave_out(
    jobs: Sequence[Job], problems: Sequence[Problem], display: Teller, sweep: Sweep | None = None
) -> list[Job]:
    """The jobs, those with a problem refused (`refused`), and a line about each problem; the
    `sweep` tells where in the matrix it stands.

    Raises ProblemsFound when that leaves nothing to run and nothing that was kept."""
    if not problems:
        return list(jobs)
    located = [sweep.located(each.error) if sweep else each.error for each in problems]
    after = refused(jobs, problems)
    if nothing_left(after):
        raise ProblemsFound(located)
    asked = {job.cell.cell_id for job in jobs if not job.implied}
    for problem, error in zip(problems, located, strict=True):
        out = len(asked.intersection(problem.cells))
        display.message(f"{out} of {len(asked)} cells left out as invalid: {error}")
    return after


def nothing_left(jobs: Sequence[Job]) -> bool:
    return not any(job.action in ("run", "retry", "keep") for job in jobs)


def quickly_checked(jobs: Sequence[Job], display: Teller, sweep: Sweep) -> list[Job]:
    """`leave_out` with what can be told before anything is imported."""
    return leave_out(jobs, quick_checks.problems(to_run(jobs)), display, sweep)


def to_run(jobs: Sequence[Job]) -> list[Cell]:
    """The cells that a run would start."""
    return [job.cell for job in jobs if job.action in ("run", "retry")]


def refused(jobs: Sequence[Job], problems: Sequence[Problem]) -> list[Job]:
    """The jobs as a plan shows them: those that would run and have a problem are invalid, and base
    cells stay only while a cell is left that is judged against them."""
    reasons: dict[str, list[str]] = {}
    for problem in problems:
        for cell_id in problem.cells:
            reasons.setdefault(cell_id, []).append(_without_place(problem.error))
    found = []
    for job in jobs:
        why = reasons.get(job.cell.cell_id)
        if why and job.action in ("run", "retry"):
            job = dataclasses.replace(job, action="invalid", why="; ".join(why), told=True)
        found.append(job)
    if not reasons:
        return found
    needed = {
        base.cell_id
        for job in found
        if job.action != "invalid"
        for base in base_cells(job.cell).values()
    }
    return [job for job in found if not job.implied or job.cell.cell_id in needed]


def _without_place(error: UserError) -> str:
    """A record is read without the matrix."""
    return str(UserError(error.message, key=error.key))
