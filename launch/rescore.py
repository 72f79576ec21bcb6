"""Base models whose scores are in another precision than those of the cells about to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.recipe import SOFTMAX_DTYPE, softmax_dtype
from matrices.cell import base_cells

if TYPE_CHECKING:
    from launch.plan import Job


def with_new_base_scores(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, with the kept base models scored again that a cell about to run is judged against
    and whose log-likelihoods were taken in another dtype. Trained cells are never repeated for
    their scores: a report compares them with the base scores of their own dtype."""
    older = {job.cell.cell_id for job in jobs if _is_older(job)}
    if not older:
        return list(jobs)
    needed = {
        base.cell_id
        for job in jobs
        if job.action in ("run", "retry")
        for base in base_cells(job.cell).values()
    }
    return [_again(job) if job.cell.cell_id in older & needed else job for job in jobs]


def _is_older(job: Job) -> bool:
    if job.action != "keep" or job.cell.method != "base" or job.entry is None:
        return False
    return softmax_dtype(job.entry.record) not in (None, SOFTMAX_DTYPE)


def _again(job: Job) -> Job:
    assert job.entry is not None
    before = softmax_dtype(job.entry.record)
    why = f"log-likelihoods in {before}; cells are scored in {SOFTMAX_DTYPE} now"
    return dataclasses.replace(job, action="retry", why=why)
