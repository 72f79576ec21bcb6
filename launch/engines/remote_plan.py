"""What a machine that only orders cells has to know while others (SLURM's, Ray's) measure them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from harness.preflight.problems import Problem
from harness.records import provenance
from harness.records.record import Record
from launch.display.progress import Display
from launch.planning import preflight
from launch.planning.left_out import leave_out
from launch.planning.plan import Job, Sweep
from launch.processes.server import start_server
from matrices.cell import Cell
from matrices.rules.machine import Machine

PREFLIGHT = "harness.preflight.preflight"


def machine(gpus: bool) -> Machine:
    """What the rules ask about, of a machine there. How many devices and machines there are is
    asked of the engine; which GPU they are is known there, where the rules hold again."""
    return Machine(has_gpu=gpus, packages=provenance.stack().packages, nodes=None)


def counting(gpus: bool) -> Callable[[Record, int], bool]:
    """Which records count as measured there.

    Which machine a cell comes to is known when it gets there, so a record counts when its packages
    and python are those installed here, and it is of a GPU if theirs would be (`gpus`).
    """
    return lambda record, _: same_software(record) and used_gpu(record) == gpus


def same_software(record: Record) -> bool:
    """Whether the packages that a record's cell uses, and python, are those of this environment."""
    here = provenance.stack()
    if record.stack.python.split(".")[:2] != here.python.split(".")[:2]:
        return False
    names = {*provenance.MEASURED_PACKAGES}
    names |= provenance.optional_packages(record.cell, used_gpu(record))
    return all(record.stack.packages.get(name) == here.packages.get(name) for name in names)


def used_gpu(record: Record) -> bool:
    return provenance.uses_gpu(record.stack, record.hardware)


def check(
    jobs: Sequence[Job], to_check: Sequence[Job], display: Display, sweep: Sweep
) -> list[Job]:
    """Check models, data and tasks of some of the jobs, and fetch them, once for all nodes. The
    jobs, without those that cannot run. Raises ProblemsFound when none can."""
    return leave_out(jobs, problems([job.cell for job in to_check], display), display, sweep)


def problems(cells: Sequence[Cell], display: Display) -> list[Problem]:
    """What `tunebench run` would find wrong with these cells on this machine."""
    before = dict(os.environ)
    try:
        server = start_server([PREFLIGHT])
        with display.busy(
            "importing torch, transformers, trl and lm-eval; checking models, data and tasks"
        ):
            return preflight.problems(server, PREFLIGHT, cells)
    finally:
        _with_own_threads(before)


def _with_own_threads(environment: Mapping[str, str]) -> None:
    """Put OMP_NUM_THREADS back as the user has it: the environment is handed on to jobs, and this
    machine's number of cores is not the node's."""
    if "OMP_NUM_THREADS" in environment:
        os.environ["OMP_NUM_THREADS"] = environment["OMP_NUM_THREADS"]
    else:
        os.environ.pop("OMP_NUM_THREADS", None)
