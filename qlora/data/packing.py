"""First-fit decreasing: short rows share a pack of `max_length` tokens.

Sorted by length, each row goes into the first pack that still has room. It needs at most 11/9 of the best possible
number of packs plus 6/9 (Dósa 2007). The first pack with room is found in a tree over the packs' free room, so that
n rows take n·log n steps and not n².
"""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], max_length: int) -> list[tuple[int, ...]]:
    """Indices of `lengths` in packs, each index once, no pack over `max_length` tokens. Deterministic.

    Rows of equal length keep their order, so that shuffled lengths give other packs. Raises ValueError when a length
    does not fit or is not positive.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= max_length:
            raise ValueError(f"row {index} has {length} tokens; a pack takes 1 to {max_length}")
    room = _Room(len(lengths), max_length)
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        number = room.take_first(lengths[index])
        if number == len(packs):
            packs.append([])
        packs[number].append(index)
    return [tuple(members) for members in packs]


class _Room:
    """Free tokens of each pack at the leaves of a binary tree; an inner node holds the larger of its two."""

    def __init__(self, packs: int, max_length: int) -> None:
        self.leaves = 1 << max(packs - 1, 0).bit_length()
        self.free = [max_length] * (2 * self.leaves)

    def take_first(self, length: int) -> int:
        """Number of the first pack with room for `length` tokens, which are then taken. One has: see `pack`."""
        free, node = self.free, 1
        while node < self.leaves:
            node *= 2
            if free[node] < length:
                node += 1
        number = node - self.leaves
        free[node] -= length
        while node > 1:
            node //= 2
            larger = max(free[2 * node], free[2 * node + 1])
            if free[node] == larger:
                break
            free[node] = larger
        return number
