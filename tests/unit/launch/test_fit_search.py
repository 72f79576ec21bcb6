"""The search: the largest that fits, found in few simulations whatever the curve."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from harness.records.prediction import PredictedMemory, Prediction, Verdict
from launch.fit.search import Search
from matrices.cell import Cell

GIB = 2**30
CAPACITY = 24 * GIB
CELL = Cell(method="base")


def answer(peak: float, slop: float, status: str = "predicted") -> Prediction:
    """The allocator needs `slop` times the peak."""
    fits = peak * slop <= CAPACITY
    verdict = Verdict(
        gpu="g", capacity_bytes=CAPACITY, context_bytes=0, outcome="fits" if fits else "oom"
    )
    return Prediction.model_validate(
        {
            "cell_id": "x",
            "cell": CELL,
            "stack": {},
            "status": status,
            "memory": PredictedMemory(peak_allocated_bytes=int(peak)),
            "verdicts": [verdict],
        }
    )


def carried_out(search: Search, peak: Callable[[int], float], slop: float = 1.0) -> int:
    """Simulations until the search knows."""
    while (value := search.proposal()) is not None:
        assert len(search.known) < 40
        assert search.unit <= value <= search.cap
        assert value % search.unit == 0
        assert value not in search.known
        search.known[value] = answer(peak(value), slop)
    return len(search.known)


CURVES: dict[str, Callable[[int], float]] = {
    "linear": lambda tokens: 8 * GIB + tokens * 2**20,
    "quadratic": lambda tokens: 8 * GIB + tokens * 2**18 + 40 * tokens**2,
    # The peak changes place: flat while the optimizer's step is the highest.
    "kink": lambda tokens: max(14 * GIB, 2 * GIB + tokens * 2**20),
    "concave": lambda tokens: 8 * GIB + math.sqrt(tokens) * 2**26,
}


@pytest.mark.parametrize("slop", [1.0, 1.02, 1.08])
@pytest.mark.parametrize("curve", list(CURVES))
def test_it_finds_what_trying_everything_finds(curve: str, slop: float) -> None:
    peak = CURVES[curve]
    lengths = Search(lambda _: CELL, 256, 2048, 131_072)
    assert carried_out(lengths, peak, slop) <= 12
    every = range(256, 131_073, 256)
    assert lengths.largest == max(v for v in every if peak(v) * slop <= CAPACITY)
    batches = Search(lambda _: CELL, 1, 1, 1024)
    assert carried_out(batches, lambda batch: peak(batch * 2048), slop) <= 9
    assert batches.largest == max(b for b in range(1, 1025) if peak(b * 2048) * slop <= CAPACITY)


def test_a_straight_line_takes_two_points_and_three_at_the_limit() -> None:
    search = Search(lambda _: CELL, 256, 2048, 131_072)
    assert carried_out(search, CURVES["linear"]) == 5
    # 16 GiB at a MiB a token.
    assert search.largest == 16384


def test_a_value_that_fits_beyond_one_that_does_not_is_found() -> None:
    search = Search(lambda _: CELL, 1, 1, 64)
    carried_out(search, lambda batch: 23 * GIB if batch == 12 else 2 * GIB * batch + 3 * GIB)
    assert search.largest == 12


def test_the_cap_is_an_answer() -> None:
    search = Search(lambda _: CELL, 1, 1, 64)
    carried_out(search, lambda batch: GIB + batch)
    assert search.largest == search.cap == 64


def test_nothing_fits() -> None:
    search = Search(lambda _: CELL, 1, 1, 64)
    assert carried_out(search, lambda batch: 25 * GIB) == 1
    assert search.largest is None
    lengths = Search(lambda _: CELL, 256, 65_536, 131_072)
    assert carried_out(lengths, lambda tokens: 25 * GIB) == 2, "the shortest is tried next"
    assert lengths.largest is None


def test_a_length_that_is_too_long_is_shortened() -> None:
    search = Search(lambda _: CELL, 256, 8192, 131_072)
    carried_out(search, lambda tokens: tokens * 2**23)
    # 24 GiB at 8 MiB a token.
    assert search.largest == 3072


def test_what_is_refused_is_not_tried_again() -> None:
    search = Search(lambda _: CELL, 256, 2048, 8192)
    search.known[2048] = answer(1, 1.0, "invalid")
    assert search.proposal() is None
    assert search.largest is None


def test_a_failure_is_no_misfit() -> None:
    search = Search(lambda _: CELL, 1, 1, 64)
    search.known = {1: answer(GIB, 1.0), 2: answer(GIB, 1.0, "failed")}
    assert search.proposal() is None
    assert search.failure is search.known[2]
