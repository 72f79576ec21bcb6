"""`tunebench plan`: the jobs with what is wrong with them, told quickly or thoroughly."""

from __future__ import annotations

from collections.abc import Sequence

from harness.preflight import quick_checks
from harness.preflight.problems import Problem
from harness.system.platforms import need_linux
from launch.commands.console import stopping
from launch.display.progress import display_for_stderr
from launch.planning.left_out import refused, to_run
from launch.planning.plan import Job


def checked(jobs: Sequence[Job], thoroughly: bool) -> tuple[list[Job], list[Problem]]:
    """The jobs as a plan shows them, and what is wrong with them: what can be told at once, or
    all that a run would find, which takes its imports."""
    if thoroughly:
        need_linux("plan --check")
    found = quick_checks.problems(to_run(jobs))
    after = refused(jobs, found)
    if thoroughly and to_run(after):
        from launch.engines.remote_plan import problems

        display = display_for_stderr()
        try:
            with stopping():
                more = problems(to_run(after), display)
        finally:
            display.close()
        after, found = refused(after, more), found + more
    return after, found
