"""Many comparisons at once: intervals that all hold together, and p values adjusted for it."""

from __future__ import annotations

from collections.abc import Sequence

from reports.statistics.intervals import CONFIDENCE


def joint_confidence(comparisons: int) -> float:
    """The confidence of each interval so that all of them hold together with 95 %.

    Sidak's inequality (JASA 62, 1967) holds for normal estimates whatever their correlation, so
    also for differences to one baseline. Dunnett's intervals (JASA 50, 1955), which know that
    correlation and pool one variance, are less than a tenth narrower.
    """
    return float(CONFIDENCE ** (1 / max(1, comparisons)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order given: those below 0.05 are significant together at 5 %
    (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
