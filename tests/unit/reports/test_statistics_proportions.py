"""Shares of right answers against scipy and against the definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from reports.statistics.proportions import accuracy, mcnemar, tango, wilson

Z = 1.959963984540054


@pytest.mark.parametrize(("right", "n"), [(0, 12), (1, 12), (7, 12), (12, 12), (431, 1319)])
def test_wilson_is_scipys(right: int, n: int) -> None:
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    found = accuracy(right, n)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low <= right / n <= found.high <= 1
    assert (found.n, found.over) == (n, "documents")


def test_no_documents_is_an_error() -> None:
    with pytest.raises(ValueError, match="no documents"):
        accuracy(0, 0)


@pytest.mark.parametrize(("ours", "theirs"), [(0, 0), (0, 5), (1, 8), (4, 4), (12, 3)])
def test_mcnemar_is_the_exact_binomial(ours: int, theirs: int) -> None:
    n = ours + theirs
    expected = stats.binomtest(ours, n, 0.5).pvalue if n else 1.0
    assert mcnemar(ours, theirs) == pytest.approx(expected)


def score_by_search(b: int, c: int, n: int, difference: float) -> float:
    """Tango's score with the discordant share found by a search of the likelihood itself."""
    same = n - b - c

    def loss(theirs: float) -> float:
        ours, rest = theirs + difference, 1 - 2 * theirs - difference
        parts = zip((b, c, same), (ours, theirs, rest), strict=True)
        return -sum(count * math.log(max(share, 1e-300)) for count, share in parts if count)

    lowest, highest = max(0.0, -difference), (1 - difference) / 2
    theirs = optimize.minimize_scalar(
        loss, bounds=(lowest, highest), method="bounded", options={"xatol": 1e-12}
    ).x
    return float(
        (b - c - n * difference) / math.sqrt(n * (2 * theirs + difference * (1 - difference)))
    )


@pytest.mark.parametrize(("b", "c", "n"), [(3, 1, 12), (9, 2, 50), (40, 22, 500), (5, 0, 20)])
def test_the_score_at_the_ends_of_tango_is_the_normal_quantile(b: int, c: int, n: int) -> None:
    low, high = tango(b, c, n)
    assert score_by_search(b, c, n, low) == pytest.approx(Z, rel=1e-4)
    assert score_by_search(b, c, n, high) == pytest.approx(-Z, rel=1e-4)
    assert low < (b - c) / n < high


def test_tango_of_equal_documents_by_hand() -> None:
    """Nothing differs: the score at d is sqrt(n d / (1 - d)), so the end is z^2 / (n + z^2)."""
    low, high = tango(0, 0, 12)
    assert high == pytest.approx(Z**2 / (12 + Z**2))
    assert low == pytest.approx(-high)


def test_tango_excludes_zero_where_the_score_test_of_mcnemar_does() -> None:
    for b, c in itertools.product(range(12), repeat=2):
        if b + c:
            low, high = tango(b, c, 40)
            score = abs(b - c) / math.sqrt(b + c)
            assert (low > 0 or high < 0) == (score > Z), (b, c)


def test_intervals_stay_in_their_range() -> None:
    for n in (1, 2, 5, 0.7):
        assert np.all(np.abs(tango(n, 0, n)) <= 1)
        assert wilson(n, n)[1] == 1
        assert wilson(0, n)[0] == 0
