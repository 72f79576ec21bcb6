"""Arithmetic of time: pure functions from step times and token counts to speeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class TokenCount(NamedTuple):
    """Tokens of one or more micro batches: with padding, without, and those that carry a label;
    the rows they are made of; and how many micro batches these are."""

    all: int
    non_padding: int
    loss: int
    samples: int
    micro_batches: int = 1

    def plus(self, other: TokenCount) -> TokenCount:
        return TokenCount(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = TokenCount(0, 0, 0, 0, 0)


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float] | None:
    """(q1, median, q3) by linear interpolation between order statistics (numpy's default);
    one value is all three, none gives None."""
    if not seconds:
        return None
    if len(seconds) == 1:
        return (seconds[0],) * 3
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return q1, median, q3


def total(counts: Sequence[TokenCount]) -> TokenCount:
    result = NOTHING
    for count in counts:
        result = result.plus(count)
    return result


def rate(amount: float, seconds: float) -> float | None:
    """Total amount over total time, per second; None when no time passed."""
    return amount / seconds if seconds > 0 else None


def tflops_per_second(flops_per_step: int, steps: int, seconds: float) -> float | None:
    """Executed floating point operations per second, in 10**12."""
    value = rate(flops_per_step * steps, seconds)
    return None if value is None else value / 1e12
