"""Shares of right answers and their paired differences: score intervals, which never leave their
range and stay wide when all documents are equal."""

from __future__ import annotations

import math
from collections.abc import Callable

from reports.statistics.intervals import CONFIDENCE, Estimate, t_quantile

DOCUMENTS = "documents"


def wilson(right: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of right / n (JASA 22, 1927). An effective n need not be whole."""
    share, z2 = right / n, t_quantile(math.inf, confidence) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # Exact at the ends, where rounding would go beyond.
    return (max(0.0, middle - half) if share > 0 else 0.0), (
        min(1.0, middle + half) if share < 1 else 1.0
    )


def tango(
    only_ours: float, only_theirs: float, n: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Tango's score interval of (only_ours - only_theirs) / n, the paired difference of two shares
    of right answers (Statistics in Medicine 17, 1998).

    `only_ours` documents are right for us alone, `only_theirs` for them alone. The ends are where
    the score, with the discordant share restricted to fit the difference, equals the normal
    quantile; they are found by bisection.
    """
    z = t_quantile(math.inf, confidence)
    estimate = (only_ours - only_theirs) / n

    def score(difference: float) -> float:
        return _tango_score(only_ours, only_theirs, n, difference)

    return (
        _where(lambda d: score(d) <= z, estimate, -1.0),
        _where(lambda d: score(d) >= -z, estimate, 1.0),
    )


def _tango_score(b: float, c: float, n: float, difference: float) -> float:
    linear = -b - c + (2 * n - b + c) * difference
    constant = -c * difference * (1 - difference)
    root = math.sqrt(max(0.0, linear * linear - 8 * n * constant))
    restricted = (root - linear) / (4 * n)
    spread = n * (2 * restricted + difference * (1 - difference))
    gap = b - c - n * difference
    if spread <= 0:
        return 0.0 if gap == 0 else math.copysign(math.inf, gap)
    return gap / math.sqrt(spread)


def _where(inside: Callable[[float], bool], start: float, end: float) -> float:
    """The point between `start`, which is inside, and `end` beyond which nothing is."""
    if inside(end):
        return end
    for _ in range(45):
        middle = (start + end) / 2
        start, end = (middle, end) if inside(middle) else (start, middle)
    return start


def mcnemar(only_ours: int, only_theirs: int) -> float:
    """Exact two-sided p value of McNemar's test: of the documents that are right for one side
    only, each is as likely to be ours as theirs (Psychometrika 12, 1947; exact as a binomial)."""
    from scipy.special import bdtr

    discordant = only_ours + only_theirs
    if discordant == 0:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(only_ours, only_theirs), discordant, 0.5)))


def accuracy(right: int, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """A share of right answers with Wilson's interval. Raises ValueError for no documents."""
    if n == 0:
        raise ValueError("no documents")
    return Estimate(right / n, *wilson(right, n, confidence), n, DOCUMENTS)
