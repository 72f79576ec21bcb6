"""torch's CUDA caching allocator in Python: which bytes it reserves, and when it is out of memory.

After `c10/cuda/CUDACachingAllocator.cpp` with its default settings (no `max_split_size_mb`, no
expandable segments, no garbage collection threshold): sizes rounded to 512 bytes, a pool for blocks
up to 1 MiB and one for larger ones, best fit, splitting, merging of free neighbours, and on
exhaustion every wholly free segment returned to the device before the request is retried once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

MIB = 2**20
MIN_BLOCK = 512
SMALL = MIB  # largest size served from small segments
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
MIN_LARGE = 10 * MIB  # sizes from here on get a segment of their own
ROUND_LARGE = 2 * MIB


class OutOfMemoryError(MemoryError):
    """The device has no room for a segment of `requested` bytes after all cached blocks are
    returned. `allocated` and `reserved` are the allocator's bytes then."""

    def __init__(self, requested: int, allocated: int, reserved: int) -> None:
        super().__init__(requested, allocated, reserved)
        self.requested, self.allocated, self.reserved = requested, allocated, reserved


@dataclass(slots=True, eq=False)
class Block:
    """A part of a segment. Free blocks of equal size are ordered by `address`, as in torch."""

    size: int
    address: int
    small: bool
    free: bool = False
    before: Block | None = None
    after: Block | None = None


@dataclass(slots=True)
class _Pool:
    """Free blocks, smallest first."""

    order: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)

    def put(self, block: Block) -> None:
        block.free = True
        insort(self.order, (block.size, block.address))
        self.blocks[block.address] = block

    def take(self, block: Block) -> None:
        del self.order[bisect_left(self.order, (block.size, block.address))]
        del self.blocks[block.address]
        block.free = False

    def best_fit(self, size: int) -> Block | None:
        at = bisect_left(self.order, (size, 0))
        if at == len(self.order):
            return None
        block = self.blocks[self.order[at][1]]
        self.take(block)
        return block


class Allocator:
    """Caching allocator of a device with `capacity_bytes` for segments; None is unlimited."""

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.retries = 0
        # torch has such a pair of pools for every stream. When blocks of another stream are free
        # again depends on timing, so all streams share one here; against published FSDP runs that
        # errs less.
        self._small, self._large = _Pool(), _Pool()
        self._next_address = MIB

    def malloc(self, nbytes: int) -> Block:
        """A block of at least `nbytes` (> 0). Raises OutOfMemoryError."""
        size = round_size(nbytes)
        small = size <= SMALL
        pool = self._small if small else self._large
        block = pool.best_fit(size) or self._new_segment(size, small)
        self._split(block, size, pool)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        self.allocated -= block.size
        pool = self._small if block.small else self._large
        if block.before is not None and block.before.free:
            pool.take(block.before)
            _swallow(block.before, block)
            block = block.before
        if block.after is not None and block.after.free:
            pool.take(block.after)
            _swallow(block, block.after)
        pool.put(block)

    def release_cached(self) -> None:
        """Return wholly free segments to the device, as `torch.cuda.empty_cache` does."""
        for pool in (self._small, self._large):
            for block in list(pool.blocks.values()):
                if block.before is None and block.after is None:
                    pool.take(block)
                    self.reserved -= block.size

    def _new_segment(self, size: int, small: bool) -> Block:
        segment = segment_size(size)
        if not self._has_room(segment):
            self.release_cached()
            self.retries += 1
            if not self._has_room(segment):
                raise OutOfMemoryError(segment, self.allocated, self.reserved)
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        block = Block(segment, self._next_address, small)
        self._next_address += segment + ROUND_LARGE
        return block

    def _has_room(self, segment: int) -> bool:
        return self.capacity_bytes is None or self.reserved + segment <= self.capacity_bytes

    def _split(self, block: Block, size: int, pool: _Pool) -> None:
        rest = block.size - size
        if rest < MIN_BLOCK if block.small else rest <= SMALL:
            return
        address = block.address + size
        remainder = Block(rest, address, block.small, False, block, block.after)
        if block.after is not None:
            block.after.before = remainder
        block.after = remainder
        block.size = size
        pool.put(remainder)


def _swallow(block: Block, following: Block) -> None:
    block.size += following.size
    block.after = following.after
    if following.after is not None:
        following.after.before = block


def round_size(nbytes: int) -> int:
    return max(MIN_BLOCK, -(-nbytes // MIN_BLOCK) * MIN_BLOCK)


def segment_size(size: int) -> int:
    """Bytes of the segment requested from the device for a block of `size` bytes."""
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < MIN_LARGE:
        return LARGE_SEGMENT
    return -(-size // ROUND_LARGE) * ROUND_LARGE
