"""Many comparisons at once: intervals that all hold together, and p values adjusted for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reports.statistics.intervals import CONFIDENCE


def joint_confidence(comparisons: int) -> float:
    """The confidence of each interval so that all of them hold together with 95 %.

    Sidak's inequality (JASA 62, 1967) holds for normal estimates whatever their correlation, so
    also for differences to one baseline, where Dunnett's value is less than a tenth smaller.
    """
    return float(CONFIDENCE ** (1 / max(1, comparisons)))


def dunnett_confidence(comparisons: int, degrees: float, correlation: float = 0.5) -> float:
    """The confidence of each t interval so that all differences to one baseline hold together
    with 95 % (Dunnett, JASA 50, 1955), given one variance pooled from all groups.

    `degrees` are those of the pooled variance. A correlation of 1/2 is that of equally many
    values in each group.
    """
    from scipy.optimize import brentq
    from scipy.special import stdtr

    critical = brentq(
        lambda c: _all_below(c, comparisons, degrees, correlation) - CONFIDENCE, 0.5, 500.0
    )
    return float(2 * stdtr(degrees, critical) - 1)


def _all_below(critical: float, comparisons: int, degrees: float, correlation: float) -> float:
    """P(all |T| < critical) of equally correlated t: an integral over what they share (normal)
    and over the pooled standard deviation (chi)."""
    import numpy as np
    from scipy.special import chdtri, ndtr

    points, weights = np.polynomial.hermite_e.hermegauss(61)
    weights = weights / weights.sum()
    share, own = math.sqrt(correlation), math.sqrt(1 - correlation)
    levels = (np.arange(400) + 0.5) / 400
    deviations = np.sqrt(chdtri(degrees, levels) / degrees)[:, None]
    within = ndtr((critical * deviations - share * points) / own) - ndtr(
        (-critical * deviations - share * points) / own
    )
    return float(((within**comparisons) @ weights).mean())


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
