"""Arithmetic of time: hand-computed cases, and quartiles against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from harness.meters import rates
from harness.meters.rates import TokenCount

ONE, TWO, THREE = TokenCount(8, 6, 5, 1), TokenCount(10, 10, 9, 2), TokenCount(4, 1, 0, 1)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 37])
def test_quartiles_are_numpys(n: int) -> None:
    seconds = list(np.random.default_rng(n).exponential(size=n))
    found = rates.quartiles(seconds)
    assert found == pytest.approx(np.percentile(seconds, [25, 50, 75]), rel=1e-12)


def test_quartiles_of_few() -> None:
    assert rates.quartiles([]) is None
    assert rates.quartiles([0.5]) == (0.5, 0.5, 0.5)
    assert rates.quartiles([3.0, 1.0]) == (1.5, 2.0, 2.5)


def test_total() -> None:
    assert rates.total([ONE, TWO, THREE]) == TokenCount(22, 17, 14, 4, 3)
    assert rates.total([]) == TokenCount(0, 0, 0, 0, 0)


def test_rates() -> None:
    assert rates.rate(30, 4.0) == 7.5
    assert rates.rate(30, 0.0) is None
    # 5 steps of 3e12 operations in 2 seconds: 7.5e12 a second.
    assert rates.tflops_per_second(3 * 10**12, 5, 2.0) == 7.5
    assert rates.tflops_per_second(3 * 10**12, 0, 0.0) is None
