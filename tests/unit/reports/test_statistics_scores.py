"""Scores over documents, clusters and seeds, against figures worked out by hand and by scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from reports.statistics.intervals import NotComparable
from reports.statistics.proportions import tango
from reports.statistics.scores import Design, difference, from_standard_errors, score

# Student's t, 97.5 %, from printed tables.
T2 = 4.30265
LN2 = math.log(2)


def plain(n: int) -> Design:
    return Design(np.ones(n))


def test_a_plain_mean_of_one_run_is_the_t_interval() -> None:
    values = [0.2, 0.9, 0.4, 0.4, 0.7]
    found = score("f1", [values], plain(5))
    expected = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.n, found.over, found.note) == (5, "documents", "")


def test_a_paired_difference_of_one_run_is_the_paired_t_interval() -> None:
    ours, theirs = [0.2, 0.9, 0.4, 0.4], [0.1, 0.5, 0.45, 0.2]
    found = difference("f1", [ours], [theirs], plain(4))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_bits_per_byte_by_hand() -> None:
    """Documents of 2, 3 and 5 bytes with 4, 3 and 8 bits: 15 bits in 10 bytes.

    Without each: 11/8, 12/7, 7/5, that is -0.125, 3/14, -0.1 from 1.5. Their squares times 2/3 are
    the variance; n_eff = 100 / (4 + 9 + 25), so its degrees are 1.6316.
    """
    bits, lengths = np.array([4.0, 3.0, 8.0]), [2.0, 3.0, 5.0]
    found = score("bits_per_byte", [-bits * LN2], Design(lengths))
    variance = (0.125**2 + (3 / 14) ** 2 + 0.1**2) * 2 / 3
    half = stats.t.ppf(0.975, 100 / 38 - 1) * math.sqrt(variance)
    assert found.value == pytest.approx(1.5)
    assert found.high == pytest.approx(1.5 + half)
    assert found.low == pytest.approx(1.5 - half)


def test_perplexity_is_of_the_mean() -> None:
    found = score("word_perplexity", [[-1.0, -2.0, -3.0]], plain(3))
    without = np.exp([2.5, 2.0, 1.5]) - math.exp(2)
    assert found.value == pytest.approx(math.exp(2))
    assert found.high == pytest.approx(math.exp(2) + T2 * math.sqrt((without**2).sum() * 2 / 3))


def test_the_jackknife_agrees_with_a_bootstrap_over_documents() -> None:
    random = np.random.default_rng(3)
    lengths = random.integers(100, 900, 400).astype(float)
    nats = -lengths * random.normal(0.9, 0.1, 400)
    found = score("bits_per_byte", [nats], Design(lengths))
    picks = random.integers(0, 400, (4000, 400))
    again = -nats[picks].sum(axis=1) / lengths[picks].sum(axis=1) / LN2
    low, high = np.quantile(again, [0.025, 0.975])
    assert found.high - found.low == pytest.approx(high - low, rel=0.05)  # type: ignore[operator]


def test_clusters_of_equal_size_are_the_t_interval_of_their_means() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(5, 4)) + random.normal(size=(5, 1))
    clusters = [name for name in "abcde" for _ in range(4)]
    found = score("f1", [values.ravel()], Design(np.ones(20), clusters))
    means = values.mean(axis=1)
    expected = stats.t.interval(0.95, 4, means.mean(), stats.sem(means))
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.n, found.over) == (5, "clusters, 20 documents")
    effect = means.var(ddof=1) / 5 / (values.var(ddof=1) / 20)
    assert found.note == f"design effect of clusters {effect:.1f}"


def test_one_document_in_each_cluster_is_no_cluster() -> None:
    values = [0.2, 0.9, 0.4, 0.4, 0.7]
    assert score("f1", [values], Design(np.ones(5), list("abcde"))) == score(
        "f1", [values], plain(5)
    )


def test_equal_seeds_leave_the_documents_as_uncertain_as_one() -> None:
    values = [0.2, 0.9, 0.4, 0.4, 0.7]
    one, three = score("f1", [values], plain(5)), score("f1", [values] * 3, plain(5))
    assert (three.low, three.high) == (pytest.approx(one.low), pytest.approx(one.high))
    assert three.over == "documents, 3 seeds"


def test_more_seeds_are_never_surer_than_the_documents() -> None:
    """Whatever the seeds: at least the interval of the documents' means over seeds."""
    random = np.random.default_rng(1)
    for _ in range(100):
        runs = random.normal(size=(3, 8)) + random.normal(size=8)
        found = score("f1", runs, plain(8))
        of_documents = score("f1", [runs.mean(axis=0)], plain(8))
        assert found.high >= of_documents.high - 1e-12  # type: ignore[operator]


def test_seeds_that_alone_differ_have_the_interval_of_seeds() -> None:
    runs = np.array([[1.0], [2.0], [4.0]]) + 1e-6 * np.array([[1.0, -1.0, 2.0, -2.0]])
    found = score("f1", runs, plain(4))
    half = T2 * stats.sem([1, 2, 4])
    assert found.high == pytest.approx(7 / 3 + half, rel=1e-5)


def test_right_and_wrong_answers_of_one_run_are_wilson_and_tango() -> None:
    ours, theirs = [1, 1, 0, 1, 1, 0, 1, 1], [1, 0, 0, 1, 0, 1, 0, 1]
    found = score("acc", [ours], plain(8))
    wilson = stats.binomtest(6, 8).proportion_ci(method="wilson")
    assert (found.low, found.high) == (pytest.approx(wilson.low), pytest.approx(wilson.high))
    gap = difference("acc", [ours], [theirs], plain(8))
    assert gap.value == pytest.approx(0.25)
    assert (gap.low, gap.high) == pytest.approx(tango(3, 1, 8))


def test_all_equal_is_said_and_is_no_certainty() -> None:
    right = score("acc", [[1] * 12], plain(12))
    assert (right.high, right.note) == (1, "12 of 12 equal")
    assert right.low == pytest.approx(12 / (12 + 1.959964**2))
    same = difference("acc", [[1, 0, 1]], [[1, 0, 1]], plain(3))
    assert (same.value, same.note) == (0, "3 of 3 equal")
    assert (same.low, same.high) == pytest.approx(tango(0, 0, 3))
    real = difference("f1", [[0.1, 0.7]], [[0.1, 0.7]], plain(2))
    assert (real.low, real.note) == (None, "2 of 2 equal")
    # Of answers in clusters that are all equal, each cluster may be one answer.
    clustered = score("acc", [[1] * 12], Design(np.ones(12), list("aaaabbbbcccc")))
    assert clustered.low == pytest.approx(3 / (3 + 1.959964**2))


def test_seeds_and_clusters_narrow_and_widen_the_answers() -> None:
    answers = [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0]
    one = score("acc", [answers], plain(12))
    clustered = score("acc", [answers], Design(np.ones(12), list("aaaabbbbcccc")))
    assert clustered.high - clustered.low > one.high - one.low  # type: ignore[operator]
    assert 0 <= clustered.low < clustered.high <= 1  # type: ignore[operator]


def test_too_few_documents_for_an_interval() -> None:
    assert score("f1", [[0.3]], plain(1)).low is None
    uneven = score("bits_per_byte", [[-3.0, -4.0]], Design([1.0, 100.0]))
    assert (uneven.low, uneven.note) == (None, "too few documents, or one outweighs the others")
    one = score("f1", [[0.3, 0.4, 0.5]], Design(np.ones(3), list("aaa")))
    assert (one.low, one.note) == (None, "too few clusters, or one outweighs the others")
    answers = score("acc", [[1, 0, 1]], Design(np.ones(3), list("aaa")))
    # As wide as one answer leaves it.
    assert answers.high - answers.low > 0.75  # type: ignore[operator]
    assert answers.note == "too few clusters, or one outweighs the others"


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(NotComparable, match="2 runs against 1"):
        difference("f1", [[1, 2], [3, 4]], [[1, 2]], plain(2))
    with pytest.raises(NotComparable, match="numbers of documents"):
        score("f1", [[1, 2], [3, 4, 5]], plain(2))
    with pytest.raises(ValueError, match="no runs"):
        score("f1", [], plain(2))


def test_standard_errors_alone() -> None:
    one = from_standard_errors([0.5], [0.1], 12)
    assert one.high == pytest.approx(0.5 + stats.t.ppf(0.975, 11) * 0.1)
    three = from_standard_errors([0.5, 0.5, 0.5], [0.1] * 3, 12)
    assert three.high == pytest.approx(one.high)  # Equal seeds make no document certain.
    assert three.over == "documents, lm-eval's stderr, 3 seeds"
    assert from_standard_errors([0.5], [None], 12).low is None
