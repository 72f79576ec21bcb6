"""From a ledger's list of births and deaths to figures: one walk behind an allocator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.meters.memory.ledger import Event, Storage
from harness.records.record import TRAINING_PHASES
from harness.simulate.memory.allocator import Allocator, Block, OutOfMemory
from harness.simulate.memory.ledger import RELEASED


@dataclass(frozen=True)
class Refused:
    """The event an allocation failed at, and the state of the allocator there, bytes."""

    event: Event
    requested: int
    allocated: int
    reserved: int


@dataclass
class Walk:
    """What a walk over the events found. `sizes` are the blocks' at the training peak, which is
    after event number `peak_at`; `steady` is the live bytes after event number `until`."""

    peaks: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    peak_at: int = -1
    peak_phase: str | None = None
    steady: int | None = None
    reserved: int | None = None
    retries: int = 0
    refused: Refused | None = None


def walk(events: Sequence[Event], allocator: Allocator | None, until: int | None = None) -> Walk:
    """Replay all events. Without an allocator a block is as large as its storage, rounded."""
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
        except OutOfMemory as error:
            found.refused = Refused(event, error.requested, error.allocated, error.reserved)
            break
        if event.delta > 0:
            _raise(found, event.phase, live.total, at)
        found.ends[event.phase] = live.total
        if at + 1 == until:
            found.steady = live.total
    if allocator is not None:
        found.reserved, found.retries = allocator.peak_reserved, allocator.retries
    return found


def sizes_at(events: Sequence[Event], at: int, allocator: Allocator | None) -> dict[Storage, int]:
    """Block bytes of every storage that is live after event number `at`, largest first."""
    live = _Live(allocator)
    for event in events[: at + 1]:
        live.apply(event)
    return dict(sorted(live.sizes().items(), key=lambda item: -item[1]))


class _Live:
    def __init__(self, allocator: Allocator | None) -> None:
        self._allocator = allocator
        self._blocks: dict[Storage, Block] = {}
        self._sizes: dict[Storage, int] = {}
        self.total = 0

    def apply(self, event: Event) -> None:
        storage, delta = event.storage, event.delta
        if storage is RELEASED and self._allocator is not None:
            self._allocator.release_cached()
        if delta > 0:
            if self._allocator is not None:
                block = self._blocks[storage] = self._allocator.malloc(delta)
                delta = block.size
            self._sizes[storage] = delta
            self.total += delta
        elif delta < 0:
            self.total -= self._sizes.pop(storage)
            if self._allocator is not None:
                self._allocator.free(self._blocks.pop(storage))

    def sizes(self) -> dict[Storage, int]:
        return self._sizes


def _raise(found: Walk, phase: str, total: int, at: int) -> None:
    if total > found.peaks.get(phase, -1):
        found.peaks[phase] = total
        if phase in TRAINING_PHASES and total > found.peak:
            found.peak, found.peak_at, found.peak_phase = total, at, phase
