"""Step times: steps of one process, processes, and ratios of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from reports.statistics.step_times import (
    ONE_PROCESS_EACH,
    step_ratio,
    step_seconds,
    tokens_per_second,
)

T3 = stats.t.ppf(0.975, 3)


def test_batch_medians_by_hand() -> None:
    """36 steps are 4 batches of 9 with medians 1, 2, 2, 3: s^2 = 2/3, half = t3 sqrt(2/3/4)."""
    steps = [1.0] * 9 + [2.0] * 18 + [3.0] * 9
    found = step_seconds([steps])
    half = T3 * math.sqrt(2 / 3 / 4)
    assert (found.value, found.n, found.over) == (2.0, 36, "steps")
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_few_or_equal_steps_of_one_process_have_no_interval() -> None:
    few = step_seconds([[1.0, 2.0] * 15])
    assert (few.value, few.low, few.note) == (1.5, None, "fewer than 32 steps of one process")
    equal = step_seconds([[1.0] * 40])
    assert (equal.low, equal.note) == (None, "4 of 4 batches equal")
    with pytest.raises(ValueError, match="no steps"):
        step_seconds([])
    with pytest.raises(ValueError, match="no steps"):
        step_ratio([[1.0]], [[]])


def test_of_several_processes_the_interval_is_over_processes() -> None:
    found = step_seconds([[1.0, 1.0, 9.0], [2.0] * 400, [3.0]])
    expected = stats.t.interval(0.95, 2, 2.0, stats.sem([1, 2, 3]))
    assert (found.value, found.n, found.over) == (2.0, 3, "processes")
    assert (found.low, found.high) == pytest.approx(expected)


def test_a_rate_is_total_over_total() -> None:
    steps = [1.0] * 9 + [2.0] * 18 + [3.0] * 9
    found = tokens_per_second([7200], [steps])
    half = T3 * math.sqrt(2 / 3 / 4)
    assert found.value == 100
    assert (found.low, found.high) == (
        pytest.approx(200 / (2 + half)),
        pytest.approx(200 / (2 - half)),
    )
    both = tokens_per_second([100, 300], [[1.0], [1.0]])
    assert (both.value, both.n, both.over) == (200, 2, "processes")


def test_a_ratio_is_welchs_t_on_logs() -> None:
    ours, theirs = [1.0, 1.1, 1.3], [2.0, 2.5, 2.1, 2.2]
    found = step_ratio([[t] for t in ours], [[t] for t in theirs])
    welch = stats.ttest_ind(np.log(ours), np.log(theirs), equal_var=False).confidence_interval()
    assert found.low == pytest.approx(math.exp(welch.low))
    assert found.high == pytest.approx(math.exp(welch.high))
    assert (found.n, found.over) == (3, "processes")
    back = step_ratio([[t] for t in theirs], [[t] for t in ours])
    assert back.low == pytest.approx(1 / found.high)  # type: ignore[operator]


def test_with_one_process_on_a_side_a_ratio_has_no_interval() -> None:
    many = [1.0 + 0.01 * n for n in range(200)]
    one = step_ratio([many], [many])
    assert (one.value, one.low, one.n, one.note) == (1.0, None, 1, ONE_PROCESS_EACH)
    assert step_ratio([many], [many, many]).note == "one process on one side"
    assert step_ratio([many, many], [many, many]).note == "all processes equal"
