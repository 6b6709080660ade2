"""The machine that a run is planned for: a card by its name, a size of memory, or this machine's own GPU or RAM.

A size that cards are sold in means what the driver leaves of such a card: an "8 GB" card has 7.6 to 7.8 GiB.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qlora import device, processes
from qlora.errors import HardwareError
from qlora.memory import cards
from qlora.memory.card_names import Gpu as Gpu
from qlora.memory.card_names import find, of_this_machine
from qlora.recipe.sections import parse_bytes
from qlora.units import GIB

# The card that stands for a size of memory where a recipe or `--vram` names a size only.
CARD_OF_GIGABYTES = {
    4: "RTX 3050 Ti Laptop",
    6: "RTX 3060 Laptop",
    8: "RTX 3070",
    12: "RTX 3060 12GB",
    16: "RTX 4060 Ti 16GB",
    24: "RTX 3090",
}
SOLD_GIGABYTES = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 48, 80)
DRIVER_KEEPS = ", less what its driver keeps"
DRAWN_GIGABYTES = (4, 6, 8, 12, 16, 24)  # of cards that people have
# GB, GiB or nothing, as people write the size on a box; other units mean just that many bytes.
_ON_THE_BOX = re.compile(r"\s*(\d{1,3})(?:\.0+)?\s*(?:g|gb|gib)?\s*", re.IGNORECASE)


MOST_CARDS = 64  # of one run that is asked about
_COUNT = re.compile(r"\s*(\d{1,4})\s*[x×]\s*(?=\S)(.+)", re.IGNORECASE)  # "2x RTX 3090"


@dataclass(frozen=True)
class Machine:
    """Where a run is to take place: "cuda" or "cpu", the card (for speed and scratch), and the bytes it may use."""

    device_type: str
    limit_bytes: int
    source: str  # where the limit comes from, for people
    gpu: Gpu | None = None
    host_bytes: int | None = None  # of RAM, for what waits there; None: it is not this machine that is asked about


@dataclass(frozen=True)
class RunCard:
    """Of one process of a run on several, with its name for people."""

    name: str
    machine: Machine


def left_of(gigabytes: int) -> int:
    """Bytes that the driver leaves of a card sold with so many: of the table's cards of that size the one with least.

    GeForce cards come first. Error correction takes a part of a data centre's cards, which are asked for by name; but
    of 80 GB there are no others.
    """
    for rows in (cards.GEFORCE + cards.LAPTOPS, cards.WORKSTATIONS, cards.DATA_CENTRE, cards.WITHOUT_BF16):
        if left := [row[2] for row in rows if row[1] == gigabytes]:
            return int(min(left) * GIB)
    raise ValueError(f"no card has {gigabytes} GB")


def common_cards() -> dict[str, int]:
    """Usable bytes of the sizes that people have, for drawings."""
    return {f"{size} GB": left_of(size) for size in DRAWN_GIGABYTES}


def asked_for(gpu: str | None, vram: str | None, limit: str) -> Machine:
    """The machine that a question names: a card, a size, `memory.limit`, or this one. Raises HardwareError.

    The speed of a size is that of a common card of that size.
    """
    if gpu is not None:
        card = find(gpu)
        return Machine("cuda", card.usable_bytes, f"{card.label}{DRIVER_KEEPS}", card)
    return this_machine(limit) if vram is None else _of_size(vram)


def asked_cards(gpus: Sequence[str], vrams: Sequence[str]) -> tuple[RunCard, ...]:
    """Those that a question names, in their order; "2x RTX 3090" are two. Raises HardwareError."""
    named = [(name, None) for name in _counted(gpus)] + [(None, size) for size in _counted(vrams)]
    machines = [asked_for(gpu, vram, "auto") for gpu, vram in named]
    return tuple(
        RunCard(machine.gpu.label if gpu and machine.gpu else str(vram).strip(), machine)
        for (gpu, vram), machine in zip(named, machines, strict=True)
    )


def _counted(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        count = _COUNT.fullmatch(name)
        times, what = (int(count[1]), count[2]) if count else (1, name)
        if not times >= 1 or len(found) + times > MOST_CARDS:
            raise HardwareError(f"{name[:60]!r}: {times} cards", f"a run has 1 to {MOST_CARDS} of them")
        found += [what] * times
    return found


def _of_size(vram: str) -> Machine:
    box = _ON_THE_BOX.fullmatch(vram)
    if box is not None and int(box[1]) in SOLD_GIGABYTES:
        nbytes, source = left_of(int(box[1])), f"a card sold with {int(box[1])} GB{DRIVER_KEEPS}"
    else:
        given = parse_bytes(vram)
        if given is None:
            raise HardwareError(
                f"`vram`: {vram[:60]!r} is not a size", "write it as 8GiB, or as 8GB; 1024TiB is the most"
            )
        nbytes, source = given, "as given"
    gigabytes = min(CARD_OF_GIGABYTES, key=lambda size: abs(size * GIB - nbytes))
    return Machine("cuda", nbytes, source, find(CARD_OF_GIGABYTES[gigabytes]))


def this_machine(limit: str = "auto") -> Machine:
    """The machine we run on: its GPU when it has one that trains, else its RAM. `limit` is `memory.limit`."""
    gives, beside = None if limit == "auto" else parse_bytes(limit), processes.of_run().local_size
    ram = device.available_ram() // beside  # each process holds a base of its own
    if (card := device.card()) is not None:
        gpu = of_this_machine(card.name, card.total_bytes, card.capability[0] * 10 + card.capability[1])
        source = "memory.limit" if gives else f"free on {card.name}"
        return Machine("cuda", gives or card.free_bytes, source, gpu, ram)
    return Machine("cpu", gives or ram, "memory.limit" if gives else f"RAM available{_shared(beside)}")


def _shared(count: int) -> str:
    return f", shared by {count} processes" if count > 1 else ""
