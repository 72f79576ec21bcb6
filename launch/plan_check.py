"""`tunebench plan`: the jobs with what is wrong with them, told quickly or thoroughly."""

from __future__ import annotations

from collections.abc import Sequence

from harness import plan_checks
from harness.problems import Problem
from launch.console import stopping
from launch.elsewhere import problems
from launch.left_out import refused, to_run
from launch.plan import Job
from launch.progress import display_for_stderr


def checked(jobs: Sequence[Job], thoroughly: bool) -> tuple[list[Job], list[Problem]]:
    """The jobs as a plan shows them, and what is wrong with them: what can be told at once, or
    all that a run would find, which takes its imports."""
    found = plan_checks.problems(to_run(jobs))
    after = refused(jobs, found)
    if thoroughly and to_run(after):
        display = display_for_stderr()
        try:
            with stopping():
                more = problems(to_run(after), display)
        finally:
            display.close()
        after, found = refused(after, more), found + more
    return after, found
