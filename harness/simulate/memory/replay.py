"""Replay a ledger's allocations and frees on the caching allocator: peaks per phase, reserved
bytes, the first allocation that fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.meters.memory.ledger import MemoryEvent, Storage
from harness.records.part import TRAINING_PHASES
from harness.simulate.memory.allocator import Allocator, Block, OutOfMemoryError
from harness.simulate.memory.ledger import RELEASED


@dataclass(frozen=True)
class FailedAllocation:
    """An allocation that failed: its event, the segment `requested` from the device, and what the
    allocator had `allocated` and `reserved`, all in bytes."""

    event: MemoryEvent
    requested: int
    allocated: int
    reserved: int


@dataclass
class Walk:
    """Result of a replay, bytes. `peaks` and `ends` are live bytes per phase, at the most and at
    its last event; `peak` is the highest of the training phases, after event number `peak_at`;
    `steady` is live after `until` events; `retries` counts releases of cached blocks before an
    allocation; `blocks` is the size of the block of each allocation, in their order."""

    peaks: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    peak_at: int = -1
    peak_phase: str | None = None
    steady: int | None = None
    reserved: int | None = None
    retries: int = 0
    blocks: list[int] = field(default_factory=list)
    failed: FailedAllocation | None = None


def walk(
    events: Sequence[MemoryEvent], allocator: Allocator | None, until: int | None = None
) -> Walk:
    """Replay all events. Without an allocator a block is the storage's size rounded up to 512
    bytes."""
    found = Walk()
    live = _Live(allocator)
    visit = None
    for at, event in enumerate(events):
        if event.visit != visit:
            # A phase starts with what was live before it.
            visit = event.visit
            _raise(found, event.phase, live.total, at - 1)
        try:
            live.apply(event)
        except OutOfMemoryError as error:
            found.failed = FailedAllocation(event, error.requested, error.allocated, error.reserved)
            break
        if event.delta > 0:
            found.blocks.append(live.sizes[event.storage])
            _raise(found, event.phase, live.total, at)
        found.ends[event.phase] = live.total
        if at + 1 == until:
            found.steady = live.total
    if allocator is not None:
        found.reserved, found.retries = allocator.peak_reserved, allocator.retries
    return found


def sizes_at_peak(events: Sequence[MemoryEvent], walked: Walk) -> dict[Storage, int]:
    """Block bytes of every storage that is live at the peak of a replay, largest first."""
    blocks = iter(walked.blocks)
    live: dict[Storage, int] = {}
    for event in events[: walked.peak_at + 1]:
        if event.delta > 0:
            live[event.storage] = next(blocks)
        elif event.delta < 0:
            del live[event.storage]
    return dict(sorted(live.items(), key=lambda item: -item[1]))


class _Live:
    def __init__(self, allocator: Allocator | None) -> None:
        self._allocator = allocator
        self._blocks: dict[Storage, Block] = {}
        self.sizes: dict[Storage, int] = {}
        self.total = 0

    def apply(self, event: MemoryEvent) -> None:
        storage, delta = event.storage, event.delta
        if storage is RELEASED and self._allocator is not None:
            self._allocator.release_cached()
        if delta > 0:
            if self._allocator is not None:
                block = self._blocks[storage] = self._allocator.malloc(delta)
                delta = block.size
            self.sizes[storage] = delta
            self.total += delta
        elif delta < 0:
            self.total -= self.sizes.pop(storage)
            if self._allocator is not None:
                self._allocator.free(self._blocks.pop(storage))


def _raise(found: Walk, phase: str, total: int, at: int) -> None:
    if total > found.peaks.get(phase, -1):
        found.peaks[phase] = total
        if phase in TRAINING_PHASES and total > found.peak:
            found.peak, found.peak_at, found.peak_phase = total, at, phase
