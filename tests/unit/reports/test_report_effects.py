"""Every formula against a figure worked out by hand, from a table, or by another program's rule."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from reports.statistics.intervals import (
    document_interval,
    geometric_mean_interval,
    mean_interval,
    median_interval,
    median_ranks,
    paired_difference,
    rate_interval,
    ratio_of_medians,
    spread,
)

# Student's t, 97.5 %, from printed tables.
T2, T3, T4 = 4.30265, 3.18245, 2.77645


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
    assert mean_interval([0.1, 0.1, 0.1], "seeds").high is None
    assert mean_interval([0.1, 0.1, 0.1], "seeds").value == 0.1


def test_no_values_is_an_error_not_a_number() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_interval([], "seeds")
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


# Conover's and Hahn and Meeker's tables for the median at 95 %.
@pytest.mark.parametrize(
    ("n", "ranks"), [(5, None), (6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (10, (2, 9)), (20, (6, 15))]
)
def test_median_ranks_of_printed_tables(n: int, ranks: tuple[int, int] | None) -> None:
    assert median_ranks(n) == ranks


def test_median_interval_takes_order_statistics() -> None:
    found = median_interval([10, 1, 9, 2, 8, 3, 7, 4, 6, 5])
    assert (found.value, found.low, found.high, found.n) == (5.5, 2, 9, 10)


def test_ratio_of_medians_against_the_exact_bootstrap() -> None:
    ours, theirs = [1.0, 2.0, 4.0, 5.0, 7.0, 8.0], [2.0] * 6
    medians = sorted(
        float(np.median(pick)) / 2 for pick in itertools.product(ours, repeat=len(ours))
    )
    low, high = np.quantile(medians, [0.025, 0.975])
    found = ratio_of_medians(ours, theirs)
    assert found.value == 4.5 / 2
    assert found.low == pytest.approx(low, abs=0.26)  # Half the step between neighbours.
    assert found.high == pytest.approx(high, abs=0.26)
    assert found == ratio_of_medians(ours, theirs)


def test_ratio_of_constants_is_exact_and_few_steps_have_no_interval() -> None:
    found = ratio_of_medians([3.0] * 8, [2.0] * 9)
    assert (found.value, found.low, found.high, found.n) == (1.5, 1.5, 1.5, 8)
    assert ratio_of_medians([3.0] * 5, [2.0] * 9).low is None


def test_ratios_are_averaged_on_the_log_scale() -> None:
    found = geometric_mean_interval([0.5, 2.0], "seeds")
    assert found.value == pytest.approx(1.0)
    assert found.low is not None
    assert found.high is not None
    assert found.low * found.high == pytest.approx(1.0)


def test_rate_is_total_over_total() -> None:
    # 4 steps of mean 2 s, s^2 = (1 + 0 + 0 + 1) / 3; 800 tokens in 8 s.
    found = rate_interval(800, [1.0, 2.0, 2.0, 3.0])
    half = T3 * math.sqrt(2 / 3 / 4)
    assert found.value == 100
    assert found.low == pytest.approx(800 / (4 * (2 + half)), rel=1e-5)
    assert found.high == pytest.approx(800 / (4 * (2 - half)), rel=1e-5)


def test_spread_is_the_range_and_nothing_when_equal() -> None:
    assert spread([7, 7]).low is None
    found = spread([6, 9])
    assert (found.value, found.low, found.high, found.n) == (7.5, 6, 9, 2)


def test_accuracy_difference_is_the_paired_t_interval() -> None:
    ours = np.array([1.0, 1, 0, 1, 1, 0, 1, 1])
    theirs = np.array([1.0, 0, 0, 1, 0, 1, 0, 1])
    found = paired_difference("acc", ours, theirs, np.ones(8))
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.value == pytest.approx(0.25)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert (found.n, found.over) == (8, "documents")


def test_bits_per_byte_by_hand() -> None:
    """Three documents of 2, 3 and 5 bytes with 4, 3 and 8 bits: 15 bits in 10 bytes.

    Residuals 4 - 3 = 1, 3 - 4.5 = -1.5, 8 - 7.5 = 0.5; sum of squares 3.5; mean bytes 10/3; the
    variance is 3.5 / (3 x 2) / (10/3)^2 = 0.0525.
    """
    bits, lengths = np.array([4.0, 3.0, 8.0]), np.array([2.0, 3.0, 5.0])
    found = document_interval("bits_per_byte", -bits * math.log(2), lengths)
    assert found.value == pytest.approx(1.5)
    assert found.high == pytest.approx(1.5 + T2 * math.sqrt(0.0525), rel=1e-5)
    assert found.low == pytest.approx(1.5 - T2 * math.sqrt(0.0525), rel=1e-5)


def test_bits_per_byte_difference_by_hand() -> None:
    """Our bits 4 3 8, theirs 6 3 9 in 2, 3 and 5 bytes: differences -2 0 -1, that is -0.3 a byte.

    Residuals -2 + 0.6 = -1.4, 0 + 0.9 = 0.9, -1 + 1.5 = 0.5; squares 1.96 + 0.81 + 0.25 = 3.02.
    """
    ours, theirs = np.array([4.0, 3.0, 8.0]), np.array([6.0, 3.0, 9.0])
    lengths, nats = np.array([2.0, 3.0, 5.0]), -math.log(2)
    found = paired_difference("bits_per_byte", ours * nats, theirs * nats, lengths)
    half = T2 * math.sqrt(3.02 / 6) / (10 / 3)
    assert found.value == pytest.approx(-0.3)
    assert (found.low, found.high) == (
        pytest.approx(-0.3 - half, rel=1e-5),
        pytest.approx(-0.3 + half, rel=1e-5),
    )


def test_delta_method_agrees_with_a_bootstrap_over_documents() -> None:
    random = np.random.default_rng(3)
    lengths = random.integers(100, 900, 400).astype(float)
    nats = -lengths * random.normal(0.9, 0.1, 400)
    found = document_interval("bits_per_byte", nats, lengths)
    picks = random.integers(0, 400, (4000, 400))
    again = -nats[picks].sum(axis=1) / lengths[picks].sum(axis=1) / math.log(2)
    low, high = np.quantile(again, [0.025, 0.975])
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(high - low, rel=0.05)


def test_perplexity_is_of_the_mean_and_its_interval_scales_with_it() -> None:
    nats = np.array([-1.0, -2.0, -3.0])
    found = document_interval("word_perplexity", nats, np.ones(3))
    assert found.value == pytest.approx(math.exp(2))
    assert found.high == pytest.approx(math.exp(2) * (1 + T2 / math.sqrt(3)), rel=1e-5)


def test_equal_documents_say_nothing_of_certainty() -> None:
    same = np.array([1.0, 0.0, 1.0])
    found = paired_difference("acc", same, same, np.ones(3))
    assert (found.value, found.low, found.high, found.n) == (0.0, None, None, 3)
