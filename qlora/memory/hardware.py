"""What a machine has: a table of GPUs, this machine's own GPU, and its host memory.

`usable_bytes` is what torch reports as a card's total, from public out-of-memory messages (where none was found, 97.5 %
of the name); it is less than the name promises, because the driver and, on some cards, error correction keep a part.
Memory, bandwidth and dense bf16 rate with float32 accumulation are of the maker's documents that the table names;
GeForce cards run it at half the rate of fp16's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from qlora import device
from qlora.errors import HardwareError
from qlora.recipe.sections import parse_bytes

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One kind of card. `teraflops` is dense bf16 with float32 accumulation, `gigabytes_per_second` its memory's."""

    name: str
    gigabytes: int
    usable_bytes: int
    gigabytes_per_second: float
    teraflops: float
    capability: int  # compute capability, 86 for 8.6


def _gpu(name: str, gigabytes: int, usable_gib: float, bandwidth: float, teraflops: float, capability: int) -> Gpu:
    return Gpu(name, gigabytes, int(usable_gib * GIB), bandwidth, teraflops, capability)


GPUS = (
    # NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A; product pages of the RTX 30 series
    _gpu("RTX 3050", 8, 7.66, 224, 18.2, 86),
    _gpu("RTX 3060", 12, 11.76, 360, 25.5, 86),
    _gpu("RTX 3060 Ti", 8, 7.78, 448, 32.4, 86),
    _gpu("RTX 3070", 8, 7.78, 448, 40.6, 86),
    _gpu("RTX 3080", 10, 9.77, 760, 59.5, 86),
    _gpu("RTX 3090", 24, 23.69, 936, 71.0, 86),
    # NVIDIA Ada GPU Architecture whitepaper, appendix A; product pages of the RTX 40 series
    _gpu("RTX 4060", 8, 7.62, 272, 30.0, 89),
    _gpu("RTX 4060 Ti 8GB", 8, 7.62, 288, 44.0, 89),
    _gpu("RTX 4060 Ti", 16, 15.60, 288, 44.0, 89),
    _gpu("RTX 4070", 12, 11.60, 504, 58.3, 89),
    _gpu("RTX 4070 Ti SUPER", 16, 15.60, 672, 88.2, 89),
    _gpu("RTX 4080", 16, 15.60, 717, 97.5, 89),
    _gpu("RTX 4090", 24, 23.64, 1008, 165.2, 89),
    # NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix; product pages of the RTX 50 series
    _gpu("RTX 5060 Ti", 16, 15.48, 448, 47.4, 120),
    _gpu("RTX 5070", 12, 11.50, 672, 61.7, 120),
    _gpu("RTX 5080", 16, 15.48, 960, 112.6, 120),
    _gpu("RTX 5090", 32, 31.36, 1792, 209.5, 120),
    # NVIDIA data sheets of A10, A100, L4, L40S, H100, H200, RTX A6000
    _gpu("A10", 24, 22.20, 600, 125.0, 86),
    _gpu("L4", 24, 22.03, 300, 121.0, 89),
    _gpu("RTX A6000", 48, 47.40, 768, 154.8, 86),
    _gpu("L40S", 48, 44.40, 864, 362.0, 89),
    _gpu("A100", 40, 39.39, 1555, 312.0, 80),
    _gpu("A100 80GB", 80, 79.15, 2039, 312.0, 80),
    _gpu("H100", 80, 79.10, 3350, 989.4, 90),
    _gpu("H200", 141, 139.70, 4800, 989.4, 90),
)
# The card that stands for a size of memory where a recipe or `--vram` names a size only.
CARD_OF_GIGABYTES = {6: "RTX 3060", 8: "RTX 3070", 12: "RTX 3060", 16: "RTX 4060 Ti", 24: "RTX 3090"}
# The part of a named size that is usable: the least of the table's cards without error correction (7.62 of 8).
USABLE_SHARE = 0.9525


@dataclass(frozen=True)
class Machine:
    """Where a run is to take place: "cuda" or "cpu", the card (for speed and scratch), and the bytes it may use."""

    device_type: str
    limit_bytes: int
    source: str  # where the limit comes from, for people
    gpu: Gpu | None = None


def find(name: str) -> Gpu:
    """The card of that name: letter case, spaces and the maker's words don't matter. Raises HardwareError."""
    wanted = _squeezed(name)
    for gpu in GPUS:
        if _squeezed(gpu.name) == wanted:
            return gpu
    near = [gpu.name for gpu in GPUS if wanted and wanted in _squeezed(gpu.name)]
    hint = f"did you mean {' or '.join(near[:3])}? " if near else ""
    raise HardwareError(
        f"`gpu`: {name[:60]!r} is not in the table of GPUs",
        f"{hint}use vram='12GiB', or one of: {', '.join(gpu.name for gpu in GPUS)}",
    )


def common_cards() -> dict[str, int]:
    """Usable bytes of the sizes that people have, for drawings."""
    return {f"{size} GB": int(size * USABLE_SHARE * GIB) for size in sorted(CARD_OF_GIGABYTES)}


def asked_for(gpu: str | None, vram: str | None, limit: str) -> Machine:
    """The machine that a question names: a card, a size, `memory.limit`, or this one. Raises HardwareError.

    The speed of a size is that of a common card of that size.
    """
    if gpu is not None:
        card = find(gpu)
        return Machine("cuda", card.usable_bytes, f"{card.name}, {card.gigabytes} GB", card)
    if vram is None:
        return this_machine(limit)
    nbytes = parse_bytes(vram)
    if nbytes is None:
        raise HardwareError(f"`vram`: {vram[:60]!r} is not a size", "write it as 8GiB, or as 8GB; 1024TiB is the most")
    gigabytes = min(CARD_OF_GIGABYTES, key=lambda size: abs(size * GIB - nbytes))
    return Machine("cuda", nbytes, "as given", find(CARD_OF_GIGABYTES[gigabytes]))


def this_machine(limit: str = "auto") -> Machine:
    """The machine we run on: its GPU when it has one that trains, else its RAM. `limit` is `memory.limit`."""
    gives = None if limit == "auto" else parse_bytes(limit)
    if (card := device.card()) is not None:
        gpu = _like(card.name, card.total_bytes, card.capability)
        return Machine("cuda", gives or card.free_bytes, "memory.limit" if gives else f"free on {card.name}", gpu)
    return Machine("cpu", gives or device.available_ram(), "memory.limit" if gives else "RAM available")


def _like(name: str, total: int, capability: tuple[int, int]) -> Gpu:
    """The table's entry for a card by its driver's name, with its own total; for an unknown one the nearest in size."""
    squeezed = _squeezed(name)
    known = [gpu for gpu in GPUS if _squeezed(gpu.name) in squeezed]
    near = max(known, key=lambda gpu: (len(gpu.name), -abs(gpu.usable_bytes - total))) if known else None
    base = near or min(GPUS, key=lambda gpu: abs(gpu.usable_bytes - total))
    return replace(base, name=name, usable_bytes=total, capability=capability[0] * 10 + capability[1])


def _squeezed(name: str) -> str:
    return re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())
