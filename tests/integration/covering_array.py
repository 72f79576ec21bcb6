"""Covering arrays of strength 2: few rows in which each pair of values of two factors occurs.

Greedy, one row at a time, as AETG does it (Cohen, Dalal, Fredman, Patton, "The AETG System: An
Approach to Testing Based on Combinatorial Design", 1997). The same seed gives the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

Row = dict[str, Any]
Pair = tuple[tuple[str, Any], ...]  # of two factors and their values, in the factors' order
Factors = Mapping[str, Sequence[Any]]
# Rows tried for each that is taken, and random rows tried before a pair is called impossible.
CANDIDATES, TRIES = 3, 500


class Array(NamedTuple):
    """`rows` are all allowed; `impossible` are the pairs that mean something in some row and that
    no allowed row was found for."""

    rows: list[Row]
    impossible: list[Row]


def covering_array(
    factors: Factors,
    allowed: Callable[[Row], bool] = lambda _: True,
    active: Callable[[Row], set[str]] = set,
    seed: int = 0,
) -> Array:
    """Rows that are `allowed` and hold each pair of values that an allowed row can hold. A pair
    counts in a row where both of its factors are `active`, that is, mean something there."""
    draw = random.Random(seed)
    missing = {
        ((one, first), (other, second)): None
        for one, other in combinations(factors, 2)
        for first, second in product(factors[one], factors[other])
    }
    array = Array([], [])
    while missing:
        wanted = next(iter(missing))
        if not any(_means(wanted, row, active) for row in _random_rows(factors, wanted, draw)):
            missing.pop(wanted)
            continue
        best: set[Pair] = set()
        chosen: Row = {}
        for _ in range(CANDIDATES):
            tried = _random_rows(factors, wanted, draw)
            row = next((r for r in tried if _means(wanted, r, active) and allowed(r)), None)
            if row is None:
                break
            row = _climbed(row, factors, wanted, missing, allowed, active, draw)
            found = pairs(row, active)
            if len(found & missing.keys()) > len(best & missing.keys()):
                best, chosen = found, row
        if chosen:
            array.rows.append(chosen)
        else:
            array.impossible.append(dict(wanted))
            best = {wanted}
        for pair in best:
            missing.pop(pair, None)
    return array


def pairs(row: Row, active: Callable[[Row], set[str]] = set) -> set[Pair]:
    """The pairs of values in a row, of the factors that mean something in it."""
    means = active(row)
    return set(combinations([item for item in row.items() if item[0] in means], 2))


def _means(wanted: Pair, row: Row, active: Callable[[Row], set[str]]) -> bool:
    return dict(wanted).keys() <= active(row)


def _random_rows(factors: Factors, wanted: Pair, draw: random.Random) -> Iterator[Row]:
    """Rows that hold the wanted pair: one of first values, then random ones."""
    yield {name: values[0] for name, values in factors.items()} | dict(wanted)
    for _ in range(TRIES):
        yield {name: draw.choice(values) for name, values in factors.items()} | dict(wanted)


def _climbed(
    row: Row,
    factors: Factors,
    wanted: Pair,
    missing: Mapping[Pair, None],
    allowed: Callable[[Row], bool],
    active: Callable[[Row], set[str]],
    draw: random.Random,
) -> Row:
    """The row with each other factor at the value that covers most pairs that are missing."""

    def gain(tried: Row) -> int:
        found = pairs(tried, active)
        return len(found & missing.keys()) if wanted in found else -1

    free = [name for name in factors if name not in dict(wanted)]
    for name in draw.sample(free, len(free)):
        values = draw.sample(list(factors[name]), len(factors[name]))
        tried = sorted(((gain(row | {name: v}), i, v) for i, v in enumerate(values)), reverse=True)
        for _, _, value in tried:
            if allowed(row | {name: value}):
                row = row | {name: value}
                break
    return row
