"""Figures of a group of runs, and their differences to another group.

One run: the interval is over its documents or timed steps. Several seeds: mean and t interval over
seeds, differences seed by seed. Nothing else is ever averaged.
"""

from __future__ import annotations

from collections.abc import Callable

from harness.evaluation.score_precision import softmax_dtype
from harness.records.record import Record
from reports.records.derived import timed_seconds
from reports.records.load import Result
from reports.records.samples import check_same_questions, difference, score
from reports.statistics.intervals import (
    Estimate,
    NotComparable,
    geometric_mean_interval,
    mean_interval,
    median_interval,
    rate_interval,
    ratio_of_medians,
    spread,
)
from reports.tables.groups import Group

SEEDS = "seeds"
PREDICTIONS = "predictions"


def exact(group: Group, source: Callable[[Record], int | None]) -> Estimate | None:
    """A figure that repeats exactly (bytes, parameters): n is runs, the interval their range."""
    figures = [source(result.record) for result in group.measured]
    known = [figure for figure in figures if figure is not None]
    return spread(known) if known else None


def peak_bytes(group: Group) -> Estimate | None:
    """Headline peak memory."""
    return exact(group, lambda record: record.memory.peak_bytes)


def predicted_peak_bytes(group: Group) -> Estimate | None:
    """The peak as it was predicted, for runs that failed too; n counts predictions."""
    told = [result.record.prediction for result in group.results]
    known = [p.peak_allocated_bytes for p in told if p and p.peak_allocated_bytes is not None]
    return spread(known, PREDICTIONS) if known else None


def prediction_error(group: Group) -> Estimate | None:
    """predicted / measured - 1 of the peak; the range where runs of a group differ."""
    told = [result.record.prediction for result in group.measured]
    known = [p.error for p in told if p and p.error is not None]
    return spread(known) if known else None


def step_seconds(group: Group) -> Estimate | None:
    """Median timed step; over seeds the mean of the medians."""
    found = [median_interval(s) for s in _timed(group) if s]
    return _over_seeds(found)


def tokens_per_second(group: Group) -> Estimate | None:
    """Non-padding tokens over time, both summed over the timed steps."""
    found = []
    for result in group.measured:
        seconds, tokens = timed_seconds(result.record), result.record.speed.tokens
        if seconds and tokens is not None:
            found.append(rate_interval(tokens.non_padding, seconds))
    return _over_seeds(found)


def quality(group: Group, task: str, metric: str) -> Estimate | None:
    """One metric of one task. Raises NotComparable when seeds were scored in several dtypes."""
    precisions = {softmax_dtype(result.record) for result in group.measured} - {None}
    if len(precisions) > 1:
        told = " and ".join(sorted(map(str, precisions)))
        raise NotComparable(f"{group.name} has seeds with log-likelihoods in {told}")
    found = [score(result, task, metric) for result in group.measured]
    return _over_seeds([estimate for estimate in found if estimate is not None])


def _timed(group: Group) -> list[list[float]]:
    return [timed_seconds(result.record) for result in group.measured]


def _over_seeds(found: list[Estimate]) -> Estimate | None:
    if len(found) < 2:
        return found[0] if found else None
    return mean_interval([estimate.value for estimate in found], SEEDS)


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


def step_ratio(ours: Group, theirs: Group) -> Estimate | None:
    """ours / theirs of the median step; over common seeds the geometric mean of the ratios."""
    pairs = [
        (timed_seconds(mine.record), timed_seconds(other.record))
        for mine, other in _by_seed(ours, theirs)
    ]
    ratios = [ratio_of_medians(mine, other) for mine, other in pairs if mine and other]
    if len(ratios) < 2:
        return ratios[0] if ratios else None
    return geometric_mean_interval([ratio.value for ratio in ratios], SEEDS)


def quality_difference(ours: Group, theirs: Group, task: str, metric: str) -> Estimate | None:
    """ours - theirs: over documents for one seed, over common seeds for several.

    Raises NotComparable when hashes or documents differ.
    """
    pairs = _by_seed(ours, theirs)
    found = [difference(mine, other, task, metric) for mine, other in pairs]
    return _over_seeds(found)


def base_difference(group: Group, base: Result | None, task: str, metric: str) -> Estimate | None:
    """Difference to a base model, which has no seed: over documents, or over our seeds."""
    if base is None or not group.measured:
        return None
    for result in group.measured:
        check_same_questions(result, base, task, metric)
    return _over_seeds([difference(result, base, task, metric) for result in group.measured])


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
