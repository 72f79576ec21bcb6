"""A walk over a short list of events, every figure worked out by hand."""

from __future__ import annotations

from harness.meters.memory.ledger import MemoryEvent, Storage
from harness.simulate.memory.allocator import MIB, Allocator
from harness.simulate.memory.replay import sizes_at_peak, walk


def storage(nbytes: int, name: str = "") -> Storage:
    return Storage(nbytes, name, (nbytes,), "uint8", "", "", "")


A, B, C = storage(3 * MIB, "a"), storage(33 * MIB, "b"), storage(512, "c")
EVENTS = [
    MemoryEvent(A, 3 * MIB, "load", 0),
    MemoryEvent(B, 33 * MIB, "forward", 1),
    MemoryEvent(C, 512, "forward", 1),
    MemoryEvent(B, -33 * MIB, "backward", 2),
    MemoryEvent(C, -512, "optimizer_step", 3),
]


def test_without_an_allocator_blocks_are_as_large_as_their_storages() -> None:
    found = walk(EVENTS, None, until=4)
    assert found.peak == 36 * MIB + 512
    assert (found.peak_phase, found.peak_at) == ("forward", 2)
    assert found.peaks == {
        "load": 3 * MIB,
        "forward": 36 * MIB + 512,
        # It began with everything of the forward still there.
        "backward": 36 * MIB + 512,
        "optimizer_step": 3 * MIB + 512,
    }
    assert found.steady == 3 * MIB + 512
    assert found.reserved is None


def test_an_allocator_counts_whole_blocks() -> None:
    # b gets a segment of 34 MiB, of which 1 MiB is too little to be split off.
    found = walk(EVENTS, Allocator())
    assert found.peak == 37 * MIB + 512
    assert found.reserved == (20 + 34 + 2) * MIB
    assert sizes_at_peak(EVENTS, found) == {A: 3 * MIB, B: 34 * MIB, C: 512}


def test_the_first_refused_allocation_ends_the_walk() -> None:
    found = walk(EVENTS, Allocator(capacity_bytes=50 * MIB))
    assert found.failed is not None
    assert found.failed.event.storage is B
    assert found.failed.requested == 34 * MIB
    assert (found.failed.allocated, found.failed.reserved) == (3 * MIB, 20 * MIB)
    # Six more MiB are just enough.
    assert walk(EVENTS, Allocator(capacity_bytes=56 * MIB)).failed is None


def test_loading_is_no_training_peak() -> None:
    loaded = storage(100 * MIB)
    events = [
        MemoryEvent(loaded, 100 * MIB, "load", 0),
        MemoryEvent(loaded, -100 * MIB, "load", 0),
        *EVENTS,
    ]
    found = walk(events, None)
    assert found.peaks["load"] == 100 * MIB
    assert found.peak == 36 * MIB + 512
