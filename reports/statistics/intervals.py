"""Estimates with intervals, and the plain mean. Pure functions of numbers.

An interval says what it is over (documents, clusters, seeds, processes, steps); it is no verdict.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

CONFIDENCE = 0.95
SINGULAR = {"processes": "process", "pairs of cells": "pair of cells"}


class NotComparable(Exception):
    """Two results must not be set against each other; the message says why."""


@dataclass(frozen=True)
class Estimate:
    """A figure, its interval (none where the data allow none), what n counts, and a remark that a
    reader needs: why there is no interval, or what it assumes."""

    value: float
    low: float | None
    high: float | None
    n: int
    over: str
    note: str = ""

    def mapped(self, change: Callable[[float], float]) -> Estimate:
        """The estimate on another scale; a falling one swaps the ends."""
        if self.low is None or self.high is None:
            return replace(self, value=change(self.value))
        low, high = sorted((change(self.low), change(self.high)))
        return replace(self, value=change(self.value), low=low, high=high)


@functools.lru_cache(maxsize=65536)
def t_quantile(degrees: float, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t: |t| stays below it with this probability. Degrees of
    freedom need not be whole; infinite ones are the normal distribution's."""
    from scipy.special import ndtri, stdtrit

    upper = 0.5 + confidence / 2
    return float(ndtri(upper) if math.isinf(degrees) else stdtrit(degrees, upper))


def counted(number: int, what: str) -> str:
    """`3 seeds`, `1 seed`; of what is listed (`clusters, 60 documents`) the first is counted."""
    first, *rest = what.split(", ")
    if number == 1 and first.endswith("s"):
        first = SINGULAR.get(first, first[:-1])
    return ", ".join([f"{number:,} {first}", *rest])


def mean_interval(values: Sequence[float], over: str, confidence: float = CONFIDENCE) -> Estimate:
    """Mean with Student's t interval, mean ± t(n-1) s / sqrt(n).

    No interval for one value, nor for equal values: no spread seen is no certainty.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values")
    mean = math.fsum(values) / n
    if min(values) == max(values):
        return Estimate(values[0], None, None, n, over, f"{n} of {n} equal" if n > 1 else "")
    half = t_quantile(n - 1, confidence) * math.sqrt(variance(values) / n)
    return Estimate(mean, mean - half, mean + half, n, over)


def variance(values: Sequence[float]) -> float:
    """Of a sample: squared deviations from its mean over n - 1."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def next_value_interval(values: Sequence[float], over: str) -> Estimate:
    """Mean, and the interval that holds one more value from the same normal distribution:
    mean ± t(n-1) s sqrt(1 + 1/n) (Hahn and Meeker, Statistical Intervals, 1991, section 4.6)."""
    mean = mean_interval(values, over)
    if mean.high is None:
        return mean
    half = (mean.high - mean.value) * math.sqrt(mean.n + 1)
    return Estimate(mean.value, mean.value - half, mean.value + half, mean.n, over)


def mean_and_range(values: Sequence[float], over: str = "runs") -> Estimate:
    """Mean with the range, for figures that repeat exactly; no range when all are equal."""
    low, high = min(values), max(values)
    if low == high:
        return Estimate(float(low), None, None, len(values), over)
    return Estimate(math.fsum(values) / len(values), float(low), float(high), len(values), over)
