"""Quality with intervals, from per-document results; pairing is refused where questions differ."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.evaluation.score_precision import softmax_dtype
from harness.records.record import TaskScore
from reports.records.load import Result
from reports.statistics.intervals import (
    Estimate,
    NotComparable,
    aggregate,
    document_interval,
    paired_difference,
)

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

# The record's figure and the one made from documents agree but for the order of summation.
RELATIVE_TOLERANCE = 1e-6
NORMAL_QUANTILE = 1.959963984540054


@dataclass(frozen=True)
class Documents:
    """One metric of one task or group, document by document, in the order of their identity (task,
    number, hash)."""

    identities: tuple[tuple[str, str, str], ...]
    values: np.ndarray
    weights: np.ndarray


# A report asks for the same documents in every table and for every difference.
@functools.lru_cache(maxsize=4096)
def documents(result: Result, task: str, metric: str) -> Documents | None:
    """The documents behind a figure; none without samples, or when the metric is not a mean over
    documents, so that they do not add up to the record's figure."""
    import numpy as np

    samples = result.samples
    score = result.record.quality.tasks.get(task)
    if samples is None or score is None or metric not in score.metrics:
        return None
    leaves = _leaves(result.record.quality.tasks, task)
    rows: pd.DataFrame = samples[samples["task"].isin(leaves) & (samples["metric"] == metric)]
    if rows.empty or rows[["value", "weight"]].isna().to_numpy().any():
        return None
    rows = rows.assign(doc_id=rows["doc_id"].astype(str), doc_hash=rows["doc_hash"].astype(str))
    rows = rows.sort_values(["task", "doc_id", "doc_hash"], kind="stable")
    values = rows["value"].to_numpy(dtype=float)
    weights = rows["weight"].to_numpy(dtype=float)
    recorded = score.metrics[metric].value
    if weights.sum() <= 0 or not np.isclose(
        aggregate(metric, values, weights), recorded, rtol=RELATIVE_TOLERANCE, atol=1e-9
    ):
        return None
    identities = tuple(zip(rows["task"], rows["doc_id"], rows["doc_hash"], strict=True))
    return Documents(identities, values, weights)


def _leaves(tasks: Mapping[str, TaskScore], task: str) -> list[str]:
    """The tasks whose documents a score is made of: of a group those in it, else itself."""
    score = tasks.get(task)
    if score is None or not score.subtasks:
        return [task]
    return [leaf for child in score.subtasks for leaf in _leaves(tasks, child)]


def score(result: Result, task: str, metric: str) -> Estimate | None:
    """A metric with its interval over documents; from lm-eval's standard error (normal) when there
    are no documents to make one of; none when it was not scored."""
    task_score = result.record.quality.tasks.get(task)
    if task_score is None or metric not in task_score.metrics:
        return None
    found = documents(result, task, metric)
    if found is not None:
        return document_interval(metric, found.values, found.weights)
    figure = task_score.metrics[metric]
    if figure.stderr is None:
        return Estimate(figure.value, None, None, task_score.n, "documents")
    half = NORMAL_QUANTILE * figure.stderr
    low, high = figure.value - half, figure.value + half
    return Estimate(figure.value, low, high, task_score.n, "documents, lm-eval's stderr")


def check_same_questions(ours: Result, theirs: Result, task: str, metric: str) -> None:
    """Raise NotComparable unless both scored the same documents of the same task, with
    log-likelihoods in one precision."""
    mine, other = (result.record.quality.tasks.get(task) for result in (ours, theirs))
    if mine is None or other is None or metric not in mine.metrics or metric not in other.metrics:
        raise NotComparable(f"{task} {metric} was not scored for both")
    if mine.hash != other.hash:
        raise NotComparable(
            f"the hashes of {task} differ ({mine.hash[:8]}, {other.hash[:8]}): "
            "not the same questions"
        )
    precisions = [softmax_dtype(result.record) for result in (ours, theirs)]
    if precisions[0] != precisions[1]:
        raise NotComparable(
            f"log-likelihoods in {precisions[0]} against {precisions[1]}; the older cell, run "
            "again, is scored as the newer one"
        )


def difference(ours: Result, theirs: Result, task: str, metric: str) -> Estimate:
    """ours - theirs, paired over documents. Without samples the bare difference, no interval.

    Raises NotComparable when task hashes or documents differ.
    """
    import numpy as np

    check_same_questions(ours, theirs, task, metric)
    mine, other = documents(ours, task, metric), documents(theirs, task, metric)
    if mine is None or other is None:
        scores = [r.record.quality.tasks[task] for r in (ours, theirs)]
        gap = scores[0].metrics[metric].value - scores[1].metrics[metric].value
        return Estimate(gap, None, None, min(s.n for s in scores), "documents")
    same = mine.identities == other.identities
    if not (same and np.array_equal(mine.weights, other.weights)):
        raise NotComparable(f"the documents of {task} differ")
    return paired_difference(metric, mine.values, other.values, mine.weights)
