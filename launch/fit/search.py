"""The search for the largest value that fits, by simulating candidates.

Straight lines only choose the next candidate: whether a value fits is always decided by a
simulation. The answer is a value that fits below two that do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from harness.records.prediction import Prediction, Verdict
from launch.predict.predict import Predict
from matrices.cell import Cell

# The part of an interval that a guess leaves at either end.
EDGE = 8
# How far the need of the largest value that fits is from the capacity, at most, as a rule.
CLOSE = 0.1
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

    def proposal(self) -> int | None:
        """The value to simulate next; None when the search is over."""
        low, high = self.largest, self.smallest_misfit
        if not self.known:
            return self.first
        if self.failure is not None:
            return None
        if low is None:
            return self.unit if self.unit not in self.known and self._may_shrink() else None
        if low >= self.cap:
            return None
        if high is not None and high - low <= self.unit:
            # Cached blocks may fit a little better at the value after the next.
            beyond = min(high + self.unit, self.cap)
            return beyond if beyond not in self.known else None
        if high is None:
            return min(max(self._guess(low), low + self.unit), self.cap)
        # A guess at the very edge would leave almost all of the interval if it is wrong.
        edge = max(self.unit, self.floor((high - low) // EDGE))
        return min(max(self._between(low, high), low + edge), high - edge)

    def floor(self, value: float) -> int:
        """The multiple of the unit at or below a value, at least one unit."""
        return max(self.unit, int(value) // self.unit * self.unit)

    def _may_shrink(self) -> bool:
        # A cell that is refused for another reason is refused at every size.
        return all(one.status == "predicted" for one in self.known.values())

    def _guess(self, low: int) -> int:
        """Where a line through the two largest values that fit meets the capacity."""
        needs = [
            (value, *need) for value in sorted(self.known) if (need := _need(self.known[value]))
        ]
        if len(needs) < 2 or needs[-1][1] <= needs[-2][1]:
            return self.floor(2 * low)
        (x0, y0, _), (x1, y1, capacity) = needs[-2:]
        return self.floor(min(x1 + (capacity - y1) * (x1 - x0) / (y1 - y0), FARTHEST * low))

    def _between(self, low: int, high: int) -> int:
        """Where a line from `low`, which fits, to `high`, which does not, meets the capacity. When
        that is not between their needs the limit is close to it: the middle of what is left."""
        left, right = _need(self.known[low]), _need(self.known[high])
        if not left or not right or left[0] >= right[0]:
            return self.floor((low + high) / 2)
        (y0, capacity), (y1, _) = left, right
        least, most = max(y0, (1 - CLOSE) * capacity), min(y1, (1 + CLOSE) * capacity)
        aim = capacity if least < capacity < most else (least + most) / 2
        return self.floor(low + (high - low) * (aim - y0) / (y1 - y0))


def _need(prediction: Prediction) -> tuple[float, int] | None:
    """About how many bytes a device must have, and how many it has. It must have more than is
    allocated, as blocks do not fill a device to the last byte, and less than is reserved on a
    device without limits, as cached blocks are released before it runs out. Mostly it is near the
    latter."""
    allocated = prediction.memory.peak_allocated_bytes
    verdict = first_verdict(prediction)
    if allocated is None or verdict is None:
        return None
    reserved = prediction.memory.peak_reserved_bytes or allocated
    return (allocated + 3 * reserved) / 4, verdict.capacity_bytes


def first_verdict(prediction: Prediction) -> Verdict | None:
    """The verdict for the first GPU of a prediction; None without GPUs."""
    return prediction.verdicts[0] if prediction.verdicts else None


def fits(prediction: Prediction) -> bool:
    verdict = first_verdict(prediction)
    return prediction.status == "predicted" and verdict is not None and verdict.outcome != "oom"


def search_all(searches: Sequence[Search], predict: Predict) -> None:
    """Run all searches to their end. In each round every search has one value simulated."""
    while True:
        cells = [
            (search, value, search.cell_of(value))
            for search in searches
            if (value := search.proposal()) is not None
        ]
        if not cells:
            return
        once = {cell.cell_id: cell for _, _, cell in cells}
        found = {one.cell_id: one for one in predict(list(once.values()))}
        for search, value, cell in cells:
            search.known[value] = found[cell.cell_id]
