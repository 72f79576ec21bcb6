"""Quality with intervals, from per-document results; pairing is refused where questions differ."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.evaluation.score_precision import softmax_dtype
from harness.records.quality import Metric, TaskScore
from reports.records.load import Result
from reports.statistics import scores
from reports.statistics.intervals import CONFIDENCE, Estimate, NotComparable

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

# The record's figure and the one made from documents agree but for the order of summation.
RELATIVE_TOLERANCE = 1e-6
# Task, number and hash of each document.
Identities = tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Documents:
    """One metric of one task or group, document by document, in the order of their identity (task,
    number, hash)."""

    identities: Identities
    values: np.ndarray
    weights: np.ndarray

    @property
    def design(self) -> scores.Design:
        """Their weights; the documents of one subtask of a group are a cluster."""
        tasks = [task for task, _, _ in self.identities]
        return scores.Design(self.weights, tasks if len(set(tasks)) > 1 else None)


DocumentsByMetric = dict[tuple[str, str], Documents]

# Every table and every difference needs the same documents; the files are read once.
_read: weakref.WeakKeyDictionary[Result, DocumentsByMetric] = weakref.WeakKeyDictionary()


def documents(result: Result, task: str, metric: str) -> Documents | None:
    """The documents behind a figure; none without samples, or when the metric is not a mean over
    documents, so that they do not add up to the record's figure."""
    if result not in _read:
        _read[result] = _documents_by_metric(result)
    return _read[result].get((task, metric))


def _documents_by_metric(result: Result) -> DocumentsByMetric:
    samples = result.read_samples()
    if samples is None:
        return {}
    samples = samples.assign(
        doc_id=samples["doc_id"].astype(str), doc_hash=samples["doc_hash"].astype(str)
    )
    tasks = result.record.quality.tasks
    found = {
        (task, metric): _documents(samples, _leaves(tasks, task), metric, figure.value)
        for task, score in tasks.items()
        for metric, figure in score.metrics.items()
    }
    return {key: each for key, each in found.items() if each is not None}


def _documents(
    samples: pd.DataFrame, leaves: Sequence[str], metric: str, recorded: float
) -> Documents | None:
    import numpy as np

    rows: pd.DataFrame = samples[samples["task"].isin(leaves) & (samples["metric"] == metric)]
    if rows.empty or rows[["value", "weight"]].isna().to_numpy().any():
        return None
    rows = rows.sort_values(["task", "doc_id", "doc_hash"], kind="stable")
    values = rows["value"].to_numpy(dtype=float)
    weights = rows["weight"].to_numpy(dtype=float)
    if weights.sum() <= 0 or not np.isclose(
        scores.aggregate(metric, values, weights), recorded, rtol=RELATIVE_TOLERANCE, atol=1e-9
    ):
        return None
    identities = tuple(zip(rows["task"], rows["doc_id"], rows["doc_hash"], strict=True))
    return Documents(_shared(identities), values, weights)


@functools.lru_cache(maxsize=256)
def _shared(identities: Identities) -> Identities:
    """The same tuple for equal ones: all records of a sweep are scored on the same documents."""
    return identities


def _leaves(tasks: Mapping[str, TaskScore], task: str) -> list[str]:
    """The tasks whose documents a score is made of: of a group those in it, else itself."""
    score = tasks.get(task)
    if score is None or not score.subtasks:
        return [task]
    return [leaf for child in score.subtasks for leaf in _leaves(tasks, child)]


def score(results: Sequence[Result], task: str, metric: str) -> Estimate | None:
    """A metric, the mean over runs that differ in the seed, with its interval over documents and
    seeds; from lm-eval's standard errors when there are no documents to make one of; none when no
    run was scored. Raises NotComparable when runs were scored on different documents."""
    scored = [r for r in results if metric in _metrics(r, task)]
    if not scored:
        return None
    found = [documents(result, task, metric) for result in scored]
    known = [each for each in found if each is not None]
    if len(known) == len(scored):
        _check_same_documents(known, task)
        return scores.score(metric, [each.values for each in known], known[0].design)
    figures = [_metrics(result, task)[metric] for result in scored]
    return scores.from_standard_errors(
        [figure.value for figure in figures],
        [figure.stderr for figure in figures],
        min(result.record.quality.tasks[task].n for result in scored),
    )


def _metrics(result: Result, task: str) -> Mapping[str, Metric]:
    found = result.record.quality.tasks.get(task)
    return found.metrics if found is not None else {}


def _check_same_documents(found: Sequence[Documents], task: str) -> None:
    import numpy as np

    first = found[0]
    for other in found[1:]:
        same = first.identities == other.identities
        if not (same and np.array_equal(first.weights, other.weights)):
            raise NotComparable(f"the documents of {task} differ")


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


def difference(
    pairs: Sequence[tuple[Result, Result]],
    task: str,
    metric: str,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """The mean of first - second over pairs that differ in the seed, paired over documents, with
    an interval over documents and seeds. Without samples the bare difference, no interval.

    Raises NotComparable when task hashes or documents differ.
    """
    for pair in pairs:
        check_same_questions(*pair, task, metric)
    sides = [[documents(each, task, metric) for each in side] for side in zip(*pairs, strict=True)]
    ours, theirs = ([each for each in side if each is not None] for side in sides)
    if len(ours) < len(pairs) or len(theirs) < len(pairs):
        return _bare_difference(pairs, task, metric)
    _check_same_documents([*ours, *theirs], task)
    mine, others = ([each.values for each in side] for side in (ours, theirs))
    return scores.difference(metric, mine, others, ours[0].design, confidence)


def _bare_difference(pairs: Sequence[tuple[Result, Result]], task: str, metric: str) -> Estimate:
    gaps = [_metrics(a, task)[metric].value - _metrics(b, task)[metric].value for a, b in pairs]
    n = min(result.record.quality.tasks[task].n for pair in pairs for result in pair)
    mean = math.fsum(gaps) / len(gaps)
    return Estimate(mean, None, None, n, scores.DOCUMENTS, "no per-document results")
