"""The allocator against sizes worked out by hand from the rules of CUDACachingAllocator.cpp."""

from __future__ import annotations

import itertools
import random

import pytest

from harness.simulate.memory.allocator import (
    MIB,
    Allocator,
    OutOfMemoryError,
    round_size,
    segment_size,
)


@pytest.mark.parametrize(
    ("nbytes", "size"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)]
)
def test_sizes_are_rounded_to_512_bytes(nbytes: int, size: int) -> None:
    assert round_size(nbytes) == size


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
        (100 * MIB + 512, 102 * MIB),
    ],
)
def test_segments(size: int, segment: int) -> None:
    assert segment_size(size) == segment
    allocator = Allocator()
    allocator.malloc(size)
    assert allocator.reserved == segment


def test_a_small_segment_is_shared() -> None:
    allocator = Allocator()
    for _ in range(4096):
        allocator.malloc(512)
    assert (allocator.allocated, allocator.reserved) == (2 * MIB, 2 * MIB)
    allocator.malloc(1)
    assert allocator.reserved == 4 * MIB


def test_a_remainder_of_a_mebibyte_is_not_split_off() -> None:
    # 11 MiB come out of a 12 MiB segment; 1 MiB is left, which a large block keeps.
    allocator = Allocator()
    block = allocator.malloc(11 * MIB)
    assert block.size == 12 * MIB
    assert allocator.allocated == 12 * MIB


def test_a_larger_remainder_is() -> None:
    allocator = Allocator()
    allocator.malloc(11 * MIB - 512)
    assert allocator.allocated == 11 * MIB - 512
    assert allocator.reserved == 12 * MIB
    # What is left serves the next request that fits, without a new segment.
    allocator.malloc(MIB + 512)
    assert allocator.reserved == 12 * MIB


def test_the_best_fit_is_taken() -> None:
    allocator = Allocator()
    large, guard, small = (allocator.malloc(size * MIB) for size in (40, 30, 20))
    allocator.free(large)
    allocator.free(small)
    assert allocator.malloc(19 * MIB).address == small.address
    assert guard.size == 30 * MIB


def test_free_neighbours_merge() -> None:
    allocator = Allocator()
    first, second, third = (allocator.malloc(6 * MIB) for _ in range(3))
    assert allocator.reserved == 20 * MIB
    for block in (first, third, second):
        allocator.free(block)
    allocator.malloc(18 * MIB)
    assert allocator.reserved == 20 * MIB


def test_the_two_pools_do_not_mix() -> None:
    allocator = Allocator()
    allocator.free(allocator.malloc(20 * MIB))
    allocator.malloc(MIB)
    assert allocator.reserved == 22 * MIB


def test_cached_segments_are_freed_before_giving_up() -> None:
    allocator = Allocator(capacity_bytes=50 * MIB)
    allocator.free(allocator.malloc(30 * MIB))
    allocator.malloc(40 * MIB)
    assert (allocator.retries, allocator.reserved) == (1, 40 * MIB)
    assert allocator.peak_reserved == 40 * MIB


def test_out_of_memory_says_what_was_held() -> None:
    allocator = Allocator(capacity_bytes=50 * MIB)
    allocator.malloc(30 * MIB)
    with pytest.raises(OutOfMemoryError) as raised:
        allocator.malloc(21 * MIB)
    assert raised.value.requested == 22 * MIB
    assert (raised.value.allocated, raised.value.reserved) == (30 * MIB, 30 * MIB)


def test_a_segment_partly_in_use_cannot_be_freed() -> None:
    allocator = Allocator(capacity_bytes=40 * MIB)
    kept, dropped = allocator.malloc(8 * MIB), allocator.malloc(8 * MIB)
    allocator.free(dropped)
    with pytest.raises(OutOfMemoryError):
        allocator.malloc(24 * MIB)
    assert kept.size == 8 * MIB


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_or_overlaps(seed: int) -> None:
    chance = random.Random(seed)
    allocator = Allocator()
    live = []
    for _ in range(2000):
        if live and chance.random() < 0.5:
            allocator.free(live.pop(chance.randrange(len(live))))
        else:
            live.append(allocator.malloc(chance.choice((300, 70_000, 3 * MIB, 33 * MIB))))
        assert allocator.allocated == sum(block.size for block in live) <= allocator.reserved
    spans = sorted((block.address, block.address + block.size) for block in live)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for block in live:
        allocator.free(block)
    allocator.release_cached()
    assert (allocator.allocated, allocator.reserved) == (0, 0)
