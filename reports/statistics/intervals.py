"""Estimates and their intervals. Pure functions of plain numbers; every interval is 95 %.

An interval says what it is over (documents, timed steps, seeds); nothing here is a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95
STEPS = "steps"
BOOTSTRAP_RESAMPLES = 2000
BOOTSTRAP_SEED = 20240229
LOG_LIKELIHOOD_METRICS = ("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity")


class NotComparable(Exception):
    """Two results must not be set against each other; the message says why."""


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % interval (none when n is too small for one), and what n counts."""

    value: float
    low: float | None
    high: float | None
    n: int
    over: str


def _t_quantile(degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + CONFIDENCE / 2))


def mean_interval(values: Sequence[float], over: str) -> Estimate:
    """Mean with Student's t interval, mean ± t(n-1) s / sqrt(n).

    No interval for one value, nor for equal values: no spread seen is no certainty.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values")
    mean = math.fsum(values) / n
    if min(values) == max(values):
        return Estimate(values[0], None, None, n, over)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = _t_quantile(n - 1) * math.sqrt(variance / n)
    return Estimate(mean, mean - half, mean + half, n, over)


def next_value_interval(values: Sequence[float], over: str) -> Estimate:
    """Mean, and the interval that holds one more value from the same normal distribution:
    mean ± t(n-1) s sqrt(1 + 1/n) (Hahn and Meeker, Statistical Intervals, 1991, section 4.6)."""
    mean = mean_interval(values, over)
    if mean.high is None:
        return mean
    half = (mean.high - mean.value) * math.sqrt(mean.n + 1)
    return Estimate(mean.value, mean.value - half, mean.value + half, mean.n, over)


def geometric_mean_interval(ratios: Sequence[float], over: str) -> Estimate:
    """Mean of ratios on the log scale, so that a / b and b / a give reciprocal intervals."""
    logs = mean_interval([math.log(ratio) for ratio in ratios], over)
    low = None if logs.low is None else math.exp(logs.low)
    high = None if logs.high is None else math.exp(logs.high)
    return Estimate(math.exp(logs.value), low, high, logs.n, over)


def median_ranks(n: int) -> tuple[int, int] | None:
    """1-based ranks of the order statistics that bound the median with at least 95 % coverage.

    The number of values below the median is Binomial(n, 1/2), whatever the distribution of the
    values (Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2). None below n = 6,
    where even minimum and maximum cover less.
    """
    from scipy.special import bdtr

    best = None
    for rank in range(1, n // 2 + 1):
        if 1 - 2 * float(bdtr(rank - 1, n, 0.5)) < CONFIDENCE:
            break
        best = (rank, n + 1 - rank)
    return best


def median_interval(values: Sequence[float], over: str = STEPS) -> Estimate:
    """Median with its order-statistic interval (see `median_ranks`)."""
    n = len(values)
    if n == 0:
        raise ValueError("no values")
    ordered = sorted(values)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    ranks = median_ranks(n)
    if ranks is None:
        return Estimate(median, None, None, n, over)
    return Estimate(median, ordered[ranks[0] - 1], ordered[ranks[1] - 1], n, over)


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float], over: str = STEPS) -> Estimate:
    """median(ours) / median(theirs), percentile bootstrap over both samples independently
    (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13), seeded.

    n is the smaller of the two samples; no interval when either has fewer than 6 values.
    """
    import numpy as np

    value = float(np.median(ours) / np.median(theirs))
    n = min(len(ours), len(theirs))
    if median_ranks(n) is None:
        return Estimate(value, None, None, n, over)
    random = np.random.default_rng(BOOTSTRAP_SEED)
    medians = []
    for sample in (np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)):
        picks = random.integers(0, len(sample), size=(BOOTSTRAP_RESAMPLES, len(sample)))
        medians.append(np.median(sample[picks], axis=1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians[0] / medians[1], [tail, 1 - tail])
    return Estimate(value, float(low), float(high), n, over)


def rate_interval(total: float, seconds: Sequence[float], over: str = STEPS) -> Estimate:
    """total / sum(seconds), with the t interval of the mean step time carried over.

    Takes the amount per step as fixed, which packed sequences make true for tokens.
    """
    mean = mean_interval(seconds, over)
    n = mean.n
    low = None if mean.high is None else total / (n * mean.high)
    high = None if mean.low is None or mean.low <= 0 else total / (n * mean.low)
    return Estimate(total / math.fsum(seconds), low, high, n, over)


def spread(values: Sequence[float], over: str = "runs") -> Estimate:
    """Mean with the range, for figures that repeat exactly; no range when all are equal."""
    low, high = min(values), max(values)
    if low == high:
        return Estimate(float(low), None, None, len(values), over)
    return Estimate(math.fsum(values) / len(values), float(low), float(high), len(values), over)


def aggregate(metric: str, values: np.ndarray, weights: np.ndarray) -> float:
    """The metric over documents, from R = sum(values) / sum(weights).

    Log-likelihood metrics hold nats as values: bits per byte is -R / ln 2, the perplexities are
    exp(-R). Everything else is R itself, a mean (weights are 1).
    """
    return _value_and_slope(metric, float(values.sum() / weights.sum()))[0]


def _value_and_slope(metric: str, ratio: float) -> tuple[float, float]:
    if metric == "bits_per_byte":
        return -ratio / math.log(2), -1 / math.log(2)
    if metric in LOG_LIKELIHOOD_METRICS:
        return math.exp(-ratio), -math.exp(-ratio)
    return ratio, 1.0


def _linearized(metric: str, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each document's first-order contribution, g'(R) (y_i - R x_i) / mean(x)."""
    ratio = float(values.sum() / weights.sum())
    slope = _value_and_slope(metric, ratio)[1]
    contributions: np.ndarray = slope * (values - ratio * weights) / weights.mean()
    return contributions


def document_interval(metric: str, values: np.ndarray, weights: np.ndarray) -> Estimate:
    """The metric with an interval over documents.

    The delta method for a ratio: var(R) = sum((y_i - R x_i)^2) / (n (n-1) mean(x)^2) (Cochran,
    Sampling Techniques, 3rd ed., section 2.11, without the finite population correction), with
    t(n-1). For weights of 1 it is the t interval of a mean.
    """
    value = aggregate(metric, values, weights)
    return _around(value, _linearized(metric, values, weights))


def paired_difference(
    metric: str, ours: np.ndarray, theirs: np.ndarray, weights: np.ndarray
) -> Estimate:
    """metric(ours) - metric(theirs) on the same documents, with an interval over documents.

    The difference of the two linearized contributions, document by document; for bits per byte
    this is the ratio estimator of (theirs - ours) / ln 2 per byte, for accuracy the paired t
    interval of the mean difference.
    """
    value = aggregate(metric, ours, weights) - aggregate(metric, theirs, weights)
    paired = _linearized(metric, ours, weights) - _linearized(metric, theirs, weights)
    return _around(value, paired)


def _around(value: float, contributions: np.ndarray) -> Estimate:
    n = len(contributions)
    if n < 2 or contributions.min() == contributions.max():
        return Estimate(value, None, None, n, "documents")
    half = _t_quantile(n - 1) * math.sqrt(float((contributions**2).sum()) / (n - 1) / n)
    return Estimate(value, value - half, value + half, n, "documents")
