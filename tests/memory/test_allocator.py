"""The replayed allocator keeps its books: against sums, against the rules of the real one, and back to nothing."""

from __future__ import annotations

import random
from itertools import pairwise

from qlora.memory.allocator import LARGE_SEGMENT_BYTES, SMALL_SEGMENT_BYTES, Block, CachingAllocator, rounded

MIB = 1 << 20


def test_requests_are_rounded_to_512_bytes_and_empty_ones_take_nothing() -> None:
    assert [rounded(count) for count in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    allocator = CachingAllocator()
    assert allocator.allocate(0) is None and allocator.reserved == 0
    allocator.allocate(1)
    assert (allocator.allocated, allocator.reserved) == (512, SMALL_SEGMENT_BYTES)


def test_segments_are_of_the_sizes_that_the_real_one_takes() -> None:
    for asked, segment in ((MIB, 2 * MIB), (MIB + 1, 20 * MIB), (9 * MIB, 20 * MIB), (11 * MIB + 1, 12 * MIB)):
        allocator = CachingAllocator()
        allocator.allocate(asked)
        assert allocator.reserved == segment, asked


def test_a_large_block_keeps_a_rest_of_up_to_one_mebibyte() -> None:
    """should_split: in the large pool a block is only split when more than 1 MiB is left."""
    allocator = CachingAllocator()
    first = allocator.allocate(19 * MIB + MIB // 2)
    assert first is not None and first.nbytes == 20 * MIB == LARGE_SEGMENT_BYTES


def test_what_is_freed_is_used_again_and_grows_together() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(5)]
    assert allocator.reserved == LARGE_SEGMENT_BYTES
    for block in blocks:
        assert block is not None
        allocator.release(block)
    whole = allocator.allocate(9 * MIB)
    assert whole is not None and whole.start == 0 and allocator.reserved == LARGE_SEGMENT_BYTES


def test_any_order_of_requests_adds_up_and_comes_back_to_nothing() -> None:
    chance = random.Random(1)
    allocator = CachingAllocator()
    live: list[Block] = []
    for _ in range(3000):
        if live and chance.random() < 0.5:
            allocator.release(live.pop(chance.randrange(len(live))))
        else:
            block = allocator.allocate(int(2 ** chance.uniform(0, 26)))
            assert block is not None
            live.append(block)
        spans = sorted((block.start, block.start + block.nbytes) for block in live)
        assert all(one[1] <= other[0] for one, other in pairwise(spans))
        assert allocator.allocated == sum(block.nbytes for block in live) <= allocator.reserved
    for block in live:
        allocator.release(block)
    assert allocator.allocated == 0
