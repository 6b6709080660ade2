"""How fast bytes reach a card: over its PCIe lanes from the host's memory, and from a disk into that.

What a card has is its data sheet's; what it gets is the owner's board. Assumed: every lane that the card has, and
generation 4, also where the card is of generation 5, as most boards with cards of these tables are (an older board, or
a second slot with fewer lanes, is slower). Copies are of pinned memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qlora import processes
from qlora.memory.card_names import Gpu

# PCI Express Base Specification 4.0: 16 GT/s a lane, 128 bits of 130 are payload, in each direction by itself.
LANE_BYTES = 16e9 / 8 * 128 / 130
# Packet headers and the copy engine's gaps: 25 of 31.5 GB/s on 16 lanes of generation 4, 12 of 15.8 on 8; published of
# an RTX 3050 (8 lanes): 7.8 to 9.4 pinned, 4.9 pageable.
MOVED_SHARE = 0.8
# A mapped file on an NVMe drive of generation 4, read through in order: 5 to 7 GB/s on data sheets, and half of that
# where pages are mapped one by one. An assumption: measure yours (qlora-doctor does not).
DISK_BYTES_PER_SECOND = 3e9
# Rows of an embedding are gathered by one thread from memory that is nowhere near: a quarter of what it copies.
GATHERED_BYTES_PER_SECOND = 4e9
LANES = 16
# Cards of 8 or 4 lanes, by product pages; laptops have 8, whatever their chip has (their boards give no more).
_FEWER_LANES: tuple[tuple[str, int], ...] = (
    (r"^RTX (3050|4060|4060 Ti|5050|5060|5060 Ti|A400|A1000|2000 Ada|PRO 2000 Blackwell)$", 8),
    (r"^(A2|RX 6600|RX 6600 XT|RX 6650 XT|RX 7400|RX 7600|RX 7600 XT|RX 7650 GRE)$", 8),
    (r"^(RX 6400|RX 6500 XT|Radeon PRO W6400|A16)$", 4),  # an A16's four chips share 16 lanes
    (r"^(Radeon PRO W6600|Radeon PRO W7500|Radeon PRO W7600)$", 8),
    (r" Laptop$", 8),
)
# Of several cards on one board: a desktop's processor has 16 lanes for graphics, which two slots share by 8 (AMD AM4
# and AM5, Intel LGA 1200 to 1851); workstations have more, and NVLink is faster: neither is assumed.
LANES_BESIDE_OTHERS = 8
_ONE_MEMORY = re.compile(r"^(Jetson|GB10|MI300A)")  # the system's is the card's: a copy reads it and writes it


def lanes(gpu: Gpu) -> int:
    """PCIe lanes of a card, of a run on several cards of one board those that it has beside the others."""
    name = re.sub(r" \d+GB$", "", gpu.name)  # of cards that are sold in several sizes
    own = next((count for pattern, count in _FEWER_LANES if re.search(pattern, name)), LANES)
    return min(own, LANES_BESIDE_OTHERS) if processes.of_run().local_size > 1 else own


def copied_bytes_per_second(gpu: Gpu) -> float:
    """From pinned memory to the card or back, each direction by itself."""
    if _ONE_MEMORY.search(gpu.name):
        return gpu.gigabytes_per_second * 1e9 / 2
    return lanes(gpu) * LANE_BYTES * MOVED_SHARE


def between_bytes_per_second(gpus: Sequence[Gpu]) -> float:
    """From each of several cards to the next, all at once: over PCIe and, as drivers of GeForce cards allow no way from
    card to card, through the host's memory, where each of the two copies has its own direction."""
    least = LANES_BESIDE_OTHERS * LANE_BYTES * MOVED_SHARE
    return min([least, *map(copied_bytes_per_second, gpus)])
