"""Figures of a group of runs, and their differences to another group.

Scores vary with documents and with seeds, step times with processes: a run of another seed is
another process. Nothing else is ever averaged.
"""

from __future__ import annotations

from collections.abc import Callable

from harness.evaluation.score_precision import softmax_dtype
from harness.records.record import Record
from reports.records.derived import timed_seconds
from reports.records.load import Result
from reports.records.samples import difference, score
from reports.statistics import step_times
from reports.statistics.intervals import CONFIDENCE, Estimate, NotComparable, mean_and_range
from reports.tables.groups import Group

PREDICTIONS = "predictions"


def exact(group: Group, source: Callable[[Record], int | None]) -> Estimate | None:
    """A figure that repeats exactly (bytes, parameters): n is runs, the interval their range."""
    figures = [source(result.record) for result in group.measured]
    known = [figure for figure in figures if figure is not None]
    return mean_and_range(known) if known else None


def peak_bytes(group: Group) -> Estimate | None:
    """Headline peak memory."""
    return exact(group, lambda record: record.memory.peak_bytes)


def predicted_peak_bytes(group: Group) -> Estimate | None:
    """The peak as it was predicted, for runs that failed too; n counts predictions."""
    predictions = [result.record.prediction for result in group.results]
    known = [
        p.peak_allocated_bytes for p in predictions if p and p.peak_allocated_bytes is not None
    ]
    return mean_and_range(known, PREDICTIONS) if known else None


def prediction_error(group: Group) -> Estimate | None:
    """predicted / measured - 1 of the peak; the range where runs of a group differ."""
    predictions = [result.record.prediction for result in group.measured]
    known = [p.error for p in predictions if p and p.error is not None]
    return mean_and_range(known) if known else None


def step_seconds(group: Group) -> Estimate | None:
    """Median timed step; of several seeds the mean of the medians."""
    processes = _timed(group)
    return step_times.step_seconds(processes) if processes else None


def tokens_per_second(group: Group) -> Estimate | None:
    """Non-padding tokens over time, both summed over the timed steps."""
    found = [
        (result.record.speed.tokens.non_padding, seconds)
        for result in group.measured
        if result.record.speed.tokens is not None and (seconds := timed_seconds(result.record))
    ]
    if not found:
        return None
    return step_times.tokens_per_second([n for n, _ in found], [seconds for _, seconds in found])


def quality(group: Group, task: str, metric: str) -> Estimate | None:
    """One metric of one task. Raises NotComparable when seeds were scored in several dtypes or on
    different documents."""
    precisions = {softmax_dtype(result.record) for result in group.measured} - {None}
    if len(precisions) > 1:
        precisions_text = " and ".join(sorted(map(str, precisions)))
        raise NotComparable(f"{group.name} has seeds with log-likelihoods in {precisions_text}")
    return score(group.measured, task, metric)


def _timed(group: Group) -> list[list[float]]:
    return [seconds for result in group.measured if (seconds := timed_seconds(result.record))]


def peak_change(ours: Group, theirs: Group) -> Estimate | None:
    """ours / theirs - 1 of the headline peak; the range where runs of a group differ.

    Raises NotComparable when different meters made the two figures.
    """
    meters = {r.record.memory.headline for r in ours.measured + theirs.measured}
    if len(meters) > 1:
        raise NotComparable(f"measured by different meters: {', '.join(map(str, meters))}")
    mine, other = peak_bytes(ours), peak_bytes(theirs)
    if mine is None or other is None or other.value == 0:
        return None
    value, n = mine.value / other.value - 1, min(mine.n, other.n)
    if mine.low is None and other.low is None:
        return Estimate(value, None, None, n, "runs")
    low = (mine.low or mine.value) / (other.high or other.value) - 1
    high = (mine.high or mine.value) / (other.low or other.value) - 1
    return Estimate(value, low, high, n, "runs")


def step_ratio(ours: Group, theirs: Group, confidence: float = CONFIDENCE) -> Estimate | None:
    """ours / theirs of the median step, of all processes of each."""
    mine, other = _timed(ours), _timed(theirs)
    return step_times.step_ratio(mine, other, confidence) if mine and other else None


def quality_difference(
    ours: Group, theirs: Group, task: str, metric: str, confidence: float = CONFIDENCE
) -> Estimate | None:
    """ours - theirs over the seeds in common.

    Raises NotComparable when hashes or documents differ.
    """
    pairs = _by_seed(ours, theirs)
    return difference(pairs, task, metric, confidence) if pairs else None


def base_difference(
    group: Group, base: Result | None, task: str, metric: str, confidence: float = CONFIDENCE
) -> Estimate | None:
    """Difference to a base model, which has no seed."""
    if base is None or not group.measured:
        return None
    return difference([(result, base) for result in group.measured], task, metric, confidence)


def _by_seed(ours: Group, theirs: Group) -> list[tuple[Result, Result]]:
    if not ours.measured or not theirs.measured:
        return []
    others = {result.record.cell.seed: result for result in theirs.measured}
    pairs = [
        (result, others[result.record.cell.seed])
        for result in ours.measured
        if result.record.cell.seed in others
    ]
    if not pairs:
        raise NotComparable("no seed in common")
    return pairs
