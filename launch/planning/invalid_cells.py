"""The cells of a run that have a problem: they are recorded as invalid, and the user reads each
problem once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from harness.preflight import quick_checks
from harness.preflight.problems import Problem
from launch.planning.plan import Job, Sweep
from matrices.cell import Cell, base_cells
from matrices.errors import UserError


class ProblemsFound(Exception):
    """The problems leave nothing to run; nothing was started."""

    def __init__(self, problems: list[UserError]) -> None:
        super().__init__(f"{len(problems)} problems")
        self.problems = problems


# Shows a line to the user.
ShowMessage = Callable[[str], None]


def leave_out(
    jobs: Sequence[Job],
    problems: Sequence[Problem],
    message: ShowMessage,
    sweep: Sweep | None = None,
) -> list[Job]:
    """The jobs, with those that have a problem marked as invalid. Shows a line about each problem;
    the `sweep` locates it in the matrix.

    Raises ProblemsFound when no job is left to run or to keep."""
    if not problems:
        return list(jobs)
    located = [sweep.located(each.error) if sweep else each.error for each in problems]
    after = mark_invalid(jobs, problems)
    if has_nothing_left(after):
        raise ProblemsFound(located)
    named = {job.cell.cell_id for job in jobs if not job.implied}
    for problem, error in zip(problems, located, strict=True):
        out = len(named.intersection(problem.cells))
        message(f"{out} of {len(named)} cells left out as invalid: {error}")
    return after


def has_nothing_left(jobs: Sequence[Job]) -> bool:
    return all(job.action == "invalid" for job in jobs)


def check_quickly(jobs: Sequence[Job], message: ShowMessage, sweep: Sweep) -> list[Job]:
    """`leave_out` with the problems that need no imports."""
    return leave_out(jobs, quick_checks.problems(cells_to_run(jobs)), message, sweep)


def cells_to_run(jobs: Sequence[Job]) -> list[Cell]:
    return [job.cell for job in jobs if job.will_run]


def mark_invalid(jobs: Sequence[Job], problems: Sequence[Problem]) -> list[Job]:
    """The jobs as a plan shows them. Those that would run and have a problem are invalid. Implied
    base cells stay only while a valid cell is compared with them."""
    reasons: dict[str, list[str]] = {}
    for problem in problems:
        for cell_id in problem.cells:
            reasons.setdefault(cell_id, []).append(_without_place(problem.error))
    found = []
    for job in jobs:
        why = reasons.get(job.cell.cell_id)
        if why and job.will_run:
            job = dataclasses.replace(job, action="invalid", why="; ".join(why), reported=True)
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
    """The error without its place in the matrix, which the reader of a record does not have."""
    return str(UserError(error.message, key=error.key))
