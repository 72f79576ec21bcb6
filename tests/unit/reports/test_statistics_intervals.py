"""Means and ranges against figures worked out by hand, from printed tables or by scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from reports.statistics.comparisons import holm, joint_confidence
from reports.statistics.intervals import (
    Estimate,
    counted,
    mean_and_range,
    mean_interval,
    t_quantile,
)

# Student's t, 97.5 %, from printed tables.
T4 = 2.77645


def test_mean_of_five_by_hand() -> None:
    # 2 4 4 6 9: mean 5, squared deviations 9 1 1 1 16 = 28, s^2 = 7, standard error sqrt(7/5).
    found = mean_interval([2, 4, 4, 6, 9], "seeds")
    half = T4 * math.sqrt(7 / 5)
    assert found.value == 5
    assert found.low == pytest.approx(5 - half, rel=1e-5)
    assert found.high == pytest.approx(5 + half, rel=1e-5)
    assert (found.n, found.over) == (5, "seeds")


def test_one_value_or_no_spread_has_no_interval() -> None:
    assert mean_interval([3.0], "seeds").low is None
    equal = mean_interval([0.1, 0.1, 0.1], "seeds")
    assert (equal.value, equal.high, equal.note) == (0.1, None, "3 of 3 equal")


def test_no_values_is_an_error_not_a_number() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_interval([], "seeds")


def test_spread_is_the_range_and_nothing_when_equal() -> None:
    assert mean_and_range([7, 7]).low is None
    found = mean_and_range([6, 9])
    assert (found.value, found.low, found.high, found.n) == (7.5, 6, 9, 2)


def test_another_scale_keeps_what_the_interval_is_over() -> None:
    found = Estimate(2.0, 1.0, 4.0, 3, "processes", "a note").mapped(lambda value: 1 / value)
    assert found == Estimate(0.5, 0.25, 1.0, 3, "processes", "a note")
    assert Estimate(2.0, None, None, 1, "processes", "one").mapped(lambda v: -v).value == -2


def test_what_is_counted_is_in_the_singular_for_one() -> None:
    assert counted(1200, "documents") == "1,200 documents"
    assert counted(1, "processes") == "1 process"
    assert counted(1, "clusters, 12 documents, 3 seeds") == "1 cluster, 12 documents, 3 seeds"


def test_sidak_by_hand() -> None:
    assert joint_confidence(1) == pytest.approx(0.95)
    assert joint_confidence(5) ** 5 == pytest.approx(0.95)
    assert joint_confidence(0) == pytest.approx(0.95)


@pytest.mark.parametrize(("groups", "each"), [(1, 6), (2, 3), (4, 5), (9, 20)])
def test_sidak_is_at_most_a_tenth_wider_than_dunnett(groups: int, each: int) -> None:
    random = np.random.default_rng(groups)
    control, *treated = random.normal(size=(groups + 1, each))
    ends = stats.dunnett(*treated, control=control, random_state=1).confidence_interval()
    pooled = np.mean([np.var(one, ddof=1) for one in (control, *treated)])
    degrees = (groups + 1) * (each - 1)
    ours = t_quantile(degrees, joint_confidence(groups)) * np.sqrt(2 * pooled / each)
    # scipy's own integration is a random one.
    assert 0.997 <= ours / ((ends.high - ends.low) / 2)[0] <= 1.1


def test_holm_by_hand() -> None:
    # Sorted 0.01 0.02 0.03 0.5: times 4, 3, 2, 1 are 0.04 0.06 0.06 0.5.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
