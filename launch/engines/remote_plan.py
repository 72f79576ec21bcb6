"""Planning for cells that run on other machines (SLURM's, Ray's)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from harness.preflight.problems import Problem
from harness.records import provenance
from harness.records.record import Record
from launch.display.progress import Display
from launch.planning import preflight
from launch.planning.invalid_cells import leave_out
from launch.planning.plan import Job, Sweep
from launch.processes.server import start_server
from matrices.cell import Cell
from matrices.rules.machine import Machine


def machine(gpus: bool) -> Machine:
    """What the rules need to know of such a machine. The engine checks the numbers of devices and
    nodes. The node itself checks the rules again, with its own GPU."""
    return Machine(has_gpu=gpus, packages=provenance.stack().packages, nodes=None)


def counting(gpus: bool) -> Callable[[Record, int], bool]:
    """Which records count as measured on such machines: those with the packages and the python of
    this environment, and of a GPU if the machines have any (`gpus`). The plan cannot know on which
    node a cell will run.
    """
    return lambda record, _: same_software(record) and used_gpu(record) == gpus


def same_software(record: Record) -> bool:
    """Whether the packages that a record's cell uses, and its python, are those of this
    environment."""
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
    """Check and fetch models, data and tasks of the jobs `to_check`, once for all nodes. Gives all
    jobs, those that cannot run marked as invalid. Raises ProblemsFound when none can run."""
    found = problems([job.cell for job in to_check], display)
    return leave_out(jobs, found, display.message, sweep)


def problems(cells: Sequence[Cell], display: Display) -> list[Problem]:
    """The problems that `tunebench run` would find with these cells on this machine."""
    before = dict(os.environ)
    try:
        server = start_server([preflight.MODULE])
        with display.busy(preflight.TITLE):
            return preflight.problems(server, preflight.MODULE, cells)
    finally:
        _with_own_threads(before)


def _with_own_threads(environment: Mapping[str, str]) -> None:
    """Restore OMP_NUM_THREADS: jobs inherit the environment, and a node has another number of cores
    than this machine."""
    if "OMP_NUM_THREADS" in environment:
        os.environ["OMP_NUM_THREADS"] = environment["OMP_NUM_THREADS"]
    else:
        os.environ.pop("OMP_NUM_THREADS", None)
