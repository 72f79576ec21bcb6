"""Scores over documents and seeds, and paired differences of them.

The same documents are scored in every run, so documents and seeds are crossed: a score varies
because other documents could have been asked and because another seed could have been trained.
More seeds never make up for few documents, and equal seeds do not make documents certain.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from reports.statistics.intervals import (
    CONFIDENCE,
    Estimate,
    NotComparable,
    counted,
    t_quantile,
    variance,
)
from reports.statistics.proportions import DOCUMENTS, tango, wilson

if TYPE_CHECKING:
    import numpy as np

    Values = Sequence[float] | np.ndarray
    Runs = Sequence[Values]

CLUSTERS, SEEDS = "clusters", "seeds"
# Relative: what is left of equal figures after summing them in another order.
ROUNDING = 1e-13
# One, as of two equal documents, less rounding.
FEWEST_DEGREES = 1 - 1e-9
LOG_LIKELIHOOD_METRICS = ("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity")


class Design(NamedTuple):
    """What every run was asked: the weight of each document (1 in a plain mean, its bytes or words
    in bits per byte and perplexities), and the cluster of each, where documents share a source."""

    weights: Values
    clusters: Sequence[Hashable] | None = None


def aggregate(metric: str, values: np.ndarray, weights: np.ndarray) -> float:
    """The metric over documents, from R = sum(values) / sum(weights).

    Log-likelihood metrics hold nats as values: bits per byte is -R / ln 2, the perplexities are
    exp(-R). Everything else is R itself, a mean (weights are 1).
    """
    return float(_scaled(metric, values.sum() / weights.sum()))


def _scaled(metric: str, ratio: np.ndarray) -> np.ndarray:
    import numpy as np

    if metric == "bits_per_byte":
        return -ratio / math.log(2)
    return np.exp(-ratio) if metric in LOG_LIKELIHOOD_METRICS else ratio


def score(metric: str, runs: Runs, design: Design, confidence: float = CONFIDENCE) -> Estimate:
    """The metric, the mean over runs of several seeds, with an interval over documents and seeds.

    `runs` holds the values of each run, document by document. Right and wrong answers have
    Wilson's interval at the effective number of documents (Korn and Graubard, Survey Methodology
    24, 1998), which is their number when there is one run and no cluster.

    Raises NotComparable when runs have different numbers of documents, ValueError for no run.
    """
    values, jackknife = _read(metric, runs, design)
    if not _are_answers(values, design):
        return jackknife.estimate(confidence)
    share = float(values.mean())
    n = jackknife.effective_n(share * (1 - share), values.shape[0], confidence)
    return jackknife.bounded(share, *wilson(share * n, n, confidence))


def difference(
    metric: str, ours: Runs, theirs: Runs, design: Design, confidence: float = CONFIDENCE
) -> Estimate:
    """metric(ours) - metric(theirs), paired document by document and run by run.

    Differences of right and wrong answers have Tango's interval at the effective number of
    documents. Raises NotComparable unless both have the same runs of the same documents,
    ValueError for no run.
    """
    if len(ours) != len(theirs):
        raise NotComparable(f"{len(ours)} runs against {len(theirs)}")
    mine, first = _read(metric, ours, design)
    other, second = _read(metric, theirs, design)
    jackknife = first.minus(second)
    if not (_are_answers(mine, design) and _are_answers(other, design)):
        return jackknife.estimate(confidence)
    gaps = mine - other
    only_ours, only_theirs = float((gaps > 0).mean()), float((gaps < 0).mean())
    gap = only_ours - only_theirs
    n = jackknife.effective_n(only_ours + only_theirs - gap**2, gaps.shape[0], confidence)
    return jackknife.bounded(gap, *tango(only_ours * n, only_theirs * n, n, confidence))


def from_standard_errors(
    values: Sequence[float],
    errors: Sequence[float | None],
    documents: int,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """The mean of one score for each seed, where only its standard error over documents is known.

    The mean over seeds is taken to be no surer of its documents than one seed is. The error of
    right and wrong answers tells itself: sqrt(p (1 - p) / (n - 1)); one run of them has Wilson's
    interval. No interval where an error is unknown.
    """
    seeds = len(values)
    mean, over = math.fsum(values) / seeds, f"{DOCUMENTS}, lm-eval's stderr"
    over += f", {counted(seeds, SEEDS)}" if seeds > 1 else ""
    known = [error for error in errors if error is not None]
    if len(known) < seeds:
        return Estimate(mean, None, None, documents, DOCUMENTS, "no per-document results")
    if seeds == 1 and _is_share(mean, known[0], documents):
        return Estimate(mean, *wilson(mean * documents, documents, confidence), documents, over)
    half2 = t_quantile(documents - 1, confidence) ** 2 * math.fsum(e**2 for e in known) / seeds
    if seeds > 1:
        half2 += t_quantile(seeds - 1, confidence) ** 2 * variance(values) / seeds
    if half2 == 0:
        return Estimate(mean, None, None, documents, over, "all equal")
    return Estimate(mean, mean - math.sqrt(half2), mean + math.sqrt(half2), documents, over)


def _is_share(value: float, error: float, n: int) -> bool:
    if n < 2 or not 0 <= value <= 1:
        return False
    return math.isclose(error, math.sqrt(value * (1 - value) / (n - 1)), rel_tol=1e-6, abs_tol=1e-9)


def _read(metric: str, runs: Runs, design: Design) -> tuple[np.ndarray, Jackknife]:
    import numpy as np

    if not len(runs):
        raise ValueError("no runs")
    n = len(design.weights)
    if any(len(run) != n for run in runs):
        raise NotComparable("runs were scored on different numbers of documents")
    values, weights = np.asarray(runs, dtype=float), np.asarray(design.weights, dtype=float)
    without_document, sums, sizes = _without(metric, values, weights), values, weights
    if design.clusters is not None:
        places = {label: place for place, label in enumerate(dict.fromkeys(design.clusters))}
        members = [places[label] for label in design.clusters]
        sums = np.stack([np.bincount(members, run) for run in values])
        sizes = np.bincount(members, weights)
    return values, Jackknife(
        figures=_scaled(metric, values.sum(axis=1) / weights.sum()),
        without=_without(metric, sums, sizes),
        without_document=without_document,
        sizes=sizes,
        documents=n,
    )


def _without(metric: str, sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The metric of each run (rows) without each of the clusters (columns)."""
    import numpy as np

    rest = sizes.sum() - sizes
    # Without the only cluster, or the only one that weighs anything, nothing is left.
    rest = np.where(rest > 0, rest, np.nan)
    return _scaled(metric, (sums.sum(axis=1, keepdims=True) - sums) / rest)


def _are_answers(values: np.ndarray, design: Design) -> bool:
    """Whether each document is right or wrong and counts the same."""
    import numpy as np

    right_or_wrong = ((values == 0) | (values == 1)).all()
    return bool(right_or_wrong and (np.asarray(design.weights) == 1).all())


class Jackknife(NamedTuple):
    """A figure of each run, and the same without each cluster of documents (a row for each run).

    Deleting one cluster at a time gives the variance of a ratio with unequal weights without the
    bias of its linear approximation (Tukey 1958; Cochran, Sampling Techniques, 3rd ed., section
    6.17), and equals the usual s / sqrt(n) for a plain mean of documents.
    """

    figures: np.ndarray
    without: np.ndarray
    without_document: np.ndarray
    sizes: np.ndarray
    documents: int

    def minus(self, other: Jackknife) -> Jackknife:
        """The paired difference, run by run."""
        return self._replace(
            figures=self.figures - other.figures,
            without=self.without - other.without,
            without_document=self.without_document - other.without_document,
        )

    @property
    def value(self) -> float:
        return float(self.figures.mean())

    @property
    def degrees(self) -> float:
        """Kish's effective number of clusters, (sum w)^2 / sum w^2, less one."""
        return float(self.sizes.sum() ** 2 / (self.sizes**2).sum()) - 1

    def estimate(self, confidence: float) -> Estimate:
        half2 = self.half_squared(confidence)
        if half2 is None:
            return self._described(self.value, None, None, self._too_few())
        if half2 == 0:
            return self._described(self.value, None, None, self._all_equal())
        half = math.sqrt(half2)
        ends = self.value - half, self.value + half
        return self._described(self.value, *ends, self._design_effect())

    def half_squared(self, confidence: float) -> float | None:
        """The squared half-width; none with less than one degree of freedom.

        V = documents + (seeds - interaction), the last part never below zero (two-way clusters:
        Cameron, Gelbach and Miller, J. Business & Economic Statistics 29, 2011; Owen, Annals of
        Applied Statistics 1, 2007), so that it is at least what the documents allow. Its degrees
        are Satterthwaite's (Biometrics Bulletin 2, 1946), which fall short where a few seeds
        vary about as much as the documents: there the wider of this and sum(t_i^2 V_i)
        (Banerjee, Sankhya 22, 1960) is taken. Of two seeds it is the wider of the intervals of
        documents and of seeds: one difference cannot show whether there is more than interaction.
        """
        own, seeds = self.degrees, len(self.figures)
        if own < FEWEST_DEGREES:
            return None
        documents = _jackknife_variance(self.without.mean(axis=0), self.value)
        t_documents = t_quantile(own, confidence)
        if seeds == 1:
            return t_documents**2 * documents
        between = variance(self.figures.tolist()) / seeds
        interaction = self._interaction()
        t_seeds = t_quantile(seeds - 1, confidence)
        if seeds == 2:
            return max(t_documents**2 * documents, t_seeds**2 * between)
        extra = max(0.0, between - interaction)
        if extra == 0:
            return t_documents**2 * documents
        total = documents + extra
        uncertain = (
            documents**2 / own + between**2 / (seeds - 1) + interaction**2 / (own * (seeds - 1))
        )
        degrees = max(total**2 / uncertain, min(own, seeds - 1))
        satterthwaite = t_quantile(degrees, confidence) ** 2 * total
        banerjee = t_documents**2 * documents + t_seeds**2 * extra
        return max(satterthwaite, banerjee)

    def _interaction(self) -> float:
        shifts = self.without - self.figures[:, None]
        own = shifts - shifts.mean(axis=0)
        seeds, clusters = shifts.shape
        return float((own**2).sum() * (clusters - 1) / clusters / (seeds * (seeds - 1)))

    def effective_n(self, spread: float, seeds: int, confidence: float) -> float:
        """How many independent documents, each with the variance `spread`, would give an interval
        this wide; at most one for every answer. Where no answer differs, the clusters count."""
        clusters = len(self.sizes)
        if spread <= 0:
            return clusters
        half2 = self.half_squared(confidence)
        n, most = self.documents, self.documents * seeds
        if half2 is None:  # one document, or documents of one cluster
            return min(clusters, self.degrees + 1)
        if half2 == 0:
            return most
        return min(most, n * t_quantile(n - 1, confidence) ** 2 * spread / (n - 1) / half2)

    def bounded(self, value: float, low: float, high: float) -> Estimate:
        """The estimate with these ends."""
        if not _differ(self.without_document - self.figures[:, None], value):
            return self._described(value, low, high, self._all_equal())
        few = self.degrees < FEWEST_DEGREES
        return self._described(value, low, high, self._too_few() if few else self._design_effect())

    def _too_few(self) -> str:
        what = CLUSTERS if self.clustered else DOCUMENTS
        return f"too few {what}, or one outweighs the others" if self.documents > 1 else ""

    def _all_equal(self) -> str:
        return f"{len(self.sizes)} of {len(self.sizes)} equal" if self.documents > 1 else ""

    def _described(
        self, value: float, low: float | None, high: float | None, note: str
    ) -> Estimate:
        clusters, seeds = len(self.sizes), len(self.figures)
        parts = [CLUSTERS, counted(self.documents, DOCUMENTS)] if self.clustered else [DOCUMENTS]
        parts += [counted(seeds, SEEDS)] if seeds > 1 else []
        return Estimate(value, low, high, clusters, ", ".join(parts), note)

    @property
    def clustered(self) -> bool:
        return len(self.sizes) < self.documents

    def _design_effect(self) -> str:
        """Kish's design effect: by how much clusters inflate the variance of the documents."""
        if not self.clustered:
            return ""
        independent = _jackknife_variance(self.without_document.mean(axis=0), self.value)
        if independent == 0:
            return ""
        found = _jackknife_variance(self.without.mean(axis=0), self.value) / independent
        return f"design effect of clusters {found:.1f}"


def _jackknife_variance(without: np.ndarray, value: float) -> float:
    n, shifts = len(without), without - value
    return float((shifts**2).sum()) * (n - 1) / n if _differ(shifts, value) else 0.0


def _differ(shifts: np.ndarray, value: float) -> bool:
    return bool(abs(shifts).max() > ROUNDING * max(1.0, abs(value)))
