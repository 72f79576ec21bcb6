"""The search for the largest value that fits, by simulating candidates.

A search proposes a few values at a time, so that many searches share the imports of one simulation.
Straight lines only choose the next candidates: whether a value fits is always decided by a
simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from harness.records.prediction import Prediction, Verdict
from launch.display.progress import Display
from launch.predict.predict import PredictionOptions, predict
from matrices.cell import Cell

# A lower value is proposed beside the guess: blocks do not fill a device to the last byte.
LOWER_AIM = 0.9
# A guess is at most this many times the largest value that is known to fit.
FARTHEST = 16


@dataclass
class Search:
    """The largest multiple of `unit` up to `cap` whose cell fits; `first` is where it starts."""

    cell_of: Callable[[int], Cell]
    unit: int
    first: int
    cap: int
    known: dict[int, Prediction] = field(default_factory=dict)

    @property
    def largest(self) -> int | None:
        """The largest value that is known to fit."""
        return max((value for value, one in self.known.items() if fits(one)), default=None)

    @property
    def failure(self) -> Prediction | None:
        """A simulation that failed. It is unknown whether its cell fits, so the search ends."""
        return next((one for one in self.known.values() if one.status == "failed"), None)

    @property
    def smallest_misfit(self) -> int | None:
        above = self.largest or 0
        misfits = (value for value, one in self.known.items() if not fits(one))
        return min((value for value in misfits if value > above), default=None)

    def proposals(self) -> list[int]:
        """The values to simulate next; empty when the search is over."""
        low, high = self.largest, self.smallest_misfit
        if self.failure is not None:
            return []
        if not self.known:
            return self._new([self.first, min(2 * self.first, self.cap)])
        if low is None:
            smaller = [self.floor((high or 0) // 2), self.unit]
            return self._new(smaller) if self.unit not in self.known and self._may_shrink() else []
        if low >= self.cap or (high is not None and high - low <= self.unit):
            return []
        if high is None:
            guess = self._guess(low, 1.0)
            wanted = [guess, guess + self.unit, self._guess(low, LOWER_AIM)]
            return self._new([min(max(value, low + self.unit), self.cap) for value in wanted])
        # Three values at equal distances: a quarter of the interval is left, whatever the curve.
        quarters = [self.floor(low + (high - low) * part // 4) for part in (1, 2, 3)]
        return self._new([min(max(value, low + self.unit), high - self.unit) for value in quarters])

    def floor(self, value: int) -> int:
        """The multiple of the unit at or below a value, at least one unit."""
        return max(self.unit, value // self.unit * self.unit)

    def _may_shrink(self) -> bool:
        # A cell that is refused for another reason is refused at every size.
        return all(one.status == "predicted" for one in self.known.values())

    def _new(self, values: Sequence[int]) -> list[int]:
        return [value for value in dict.fromkeys(values) if value not in self.known]

    def _guess(self, low: int, aim: float) -> int:
        """Where a line through the two largest peaks meets `aim` of the capacity."""
        points = sorted(
            (value, one.memory.peak_allocated_bytes, verdict.capacity_bytes)
            for value, one in self.known.items()
            if one.memory.peak_allocated_bytes is not None and (verdict := first_verdict(one))
        )
        pair = points[-2:]
        if len(pair) < 2 or pair[1][1] <= pair[0][1]:
            return self.floor(2 * low)
        (x0, y0, capacity), (x1, y1, _) = pair
        value = x0 + (aim * capacity - y0) * (x1 - x0) / (y1 - y0)
        return self.floor(int(min(value, FARTHEST * low)))


def first_verdict(prediction: Prediction) -> Verdict | None:
    """The verdict for the first GPU of a prediction; None without GPUs."""
    return prediction.verdicts[0] if prediction.verdicts else None


def fits(prediction: Prediction) -> bool:
    verdict = first_verdict(prediction)
    return prediction.status == "predicted" and verdict is not None and verdict.outcome != "oom"


def search_all(searches: Sequence[Search], options: PredictionOptions, display: Display) -> None:
    """Run all searches to their end, round by round."""
    while True:
        proposed = [(search, value) for search in searches for value in search.proposals()]
        if not proposed:
            return
        cells = {
            cell.cell_id: cell for search, value in proposed for cell in (search.cell_of(value),)
        }
        found = {one.cell_id: one for one in predict(list(cells.values()), options, display)}
        for search, value in proposed:
            search.known[value] = found[search.cell_of(value).cell_id]
