"""CUDA's caching allocator, replayed: how many bytes a sequence of allocations takes, and how many it keeps reserved.

The rules and numbers are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.10 to 2.13) with its default settings. A
request is rounded to 512 bytes; up to 1 MiB it comes from 2 MiB segments, up to 10 MiB from 20 MiB segments, above
that from a segment of its own size rounded to 2 MiB. The smallest free block that is large enough is taken, and split
when enough is left. `allocated` is what `torch.cuda.memory_allocated` counts, `reserved` what the driver has given.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

MIN_BLOCK_BYTES = 512
SMALL_BYTES = 1 << 20
SMALL_SEGMENT_BYTES = 2 << 20
LARGE_SEGMENT_BYTES = 20 << 20
OWN_SEGMENT_FROM_BYTES = 10 << 20
OWN_SEGMENT_STEP_BYTES = 2 << 20


def rounded(count: int, step: int = MIN_BLOCK_BYTES) -> int:
    """`count` up to the next multiple of `step`: bytes as the allocator hands them out; 0 takes nothing."""
    return -(-count // step) * step


@dataclass
class Block:
    """A piece of a segment; `before` and `after` are its neighbours in the same segment."""

    start: int
    nbytes: int
    small: bool
    wanted: int = 0  # what was asked for: less than `nbytes` where too little was left to be split off
    free: bool = False
    before: Block | None = None
    after: Block | None = None


@dataclass
class CachingAllocator:
    """Allocations and frees in order; `allocated` and `reserved` are bytes now."""

    allocated: int = 0
    reserved: int = 0
    _next_segment: int = 0
    _free: dict[bool, list[tuple[int, int]]] = field(default_factory=lambda: {True: [], False: []})
    _blocks: dict[int, Block] = field(default_factory=dict)  # free ones, by their start

    def allocate(self, nbytes: int) -> Block | None:
        """A block for a tensor of `nbytes`; None for an empty one."""
        wanted = rounded(nbytes)
        if wanted == 0:
            return None
        small = wanted <= SMALL_BYTES
        block = self._take(wanted, small) or self._new_segment(wanted, small)
        left = block.nbytes - wanted
        if left >= MIN_BLOCK_BYTES if small else left > SMALL_BYTES:
            self._split(block, wanted)
        block.free, block.wanted = False, wanted
        self.allocated += block.nbytes
        return block

    def release(self, block: Block) -> None:
        """Give a block back; it grows together with free neighbours."""
        self.allocated -= block.nbytes
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._merge(block, neighbour)
        self._offer(block)

    def _take(self, wanted: int, small: bool) -> Block | None:
        pool = self._free[small]
        at = bisect_left(pool, (wanted, -1))
        return self._blocks.pop(pool.pop(at)[1]) if at < len(pool) else None

    def _offer(self, block: Block) -> None:
        block.free = True
        self._blocks[block.start] = block
        insort(self._free[block.small], (block.nbytes, block.start))

    def _new_segment(self, wanted: int, small: bool) -> Block:
        if small:
            size = SMALL_SEGMENT_BYTES
        elif wanted < OWN_SEGMENT_FROM_BYTES:
            size = LARGE_SEGMENT_BYTES
        else:
            size = rounded(wanted, OWN_SEGMENT_STEP_BYTES)
        block = Block(self._next_segment, size, small)
        self._next_segment += size
        self.reserved += size
        return block

    def _split(self, block: Block, wanted: int) -> None:
        rest = Block(block.start + wanted, block.nbytes - wanted, block.small)
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.nbytes = rest, wanted
        self._offer(rest)

    def _merge(self, block: Block, neighbour: Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (neighbour.nbytes, neighbour.start))]
        del self._blocks[neighbour.start]
        if neighbour is block.before:
            block.start, block.before = neighbour.start, neighbour.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = neighbour.after
            if block.after is not None:
                block.after.before = block
        block.nbytes += neighbour.nbytes
