"""Which GPU a command computes on, settled before anything is read: the one that is there, or a word why not.

Chosen outside the API, by CUDA_VISIBLE_DEVICES: whatever the command starts, children too, then sees one card.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import replace

from qlora import device, nvidia, processes, third_party, torch_build
from qlora.cli import card_trouble
from qlora.cli.card_trouble import Found, cannot_be_used, cannot_compute, hide
from qlora.errors import HardwareError
from qlora.events import Notice, Sink
from qlora.nvidia import Answer, Card
from qlora.torch_build import TorchBuild

VISIBLE = "CUDA_VISIBLE_DEVICES"
AMDS = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# Without it torch's ROCm builds take fused attention for Instinct alone (aten, transformers/hip/sdp_utils.cpp).
AOTRITON = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"
TOPIC = "device"


def settle(sink: Sink) -> None:
    """Choose the card that has most free memory, or the CPU where there is none.

    Raises HardwareError where a card is here that torch can't use, and where a launcher has started several processes.
    """
    processes.refuse_several()
    signs, build = nvidia.signs(), torch_build.installed()
    if is_hidden():
        if signs.of_a_card:
            sink.emit(Notice(TOPIC, f"{VISIBLE} hides every GPU: the CPU trains, on purpose"))
        return
    if build is None:
        return
    if not signs.of_a_card or (build.hip is not None and nvidia.amd_on_bus()):
        _without_nvidia(build, sink)
        return
    answer, visible = Answer(), os.environ.get(VISIBLE)  # the user's own, before one card is chosen
    if build.cuda is None or _several(signs) or processes.of_run().local_size > 1:
        answer = nvidia.ask(signs)
        if answer.means_no_card(signs):
            _without_nvidia(build, sink)
            return
        if build.cuda is None:
            raise cannot_be_used(Found(build, signs, answer))
        _choose(signs, answer, sink)
    _try(Found(build, signs, answer, visible=visible), sink)


def is_hidden() -> bool:
    """Whether the user wants the CPU. CUDA reads the list up to the first number that is no card's."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):  # accelerate launch, its own word
        os.environ[VISIBLE] = "-1"
    value = os.environ.get(VISIBLE)
    return value is not None and value.split(",")[0].strip() in ("", "-1", "NoDevFiles")


def _without_nvidia(build: TorchBuild, sink: Sink) -> None:
    """No card of NVIDIA's: AMD's works through torch.cuda, Intel's and Apple's do not, and each is told by name."""
    if build.xpu is not None and device.has_xpu():
        what = f"an Intel GPU is here, and torch {build.version} is built for it: only NVIDIA's and AMD's can train yet"
        raise HardwareError(what, hide())
    if build.hip is not None and nvidia.amd_on_bus():
        if hides := next((name for name in AMDS if os.environ.get(name, "all").strip() in ("", "-1")), None):
            sink.emit(Notice(TOPIC, f"{hides} hides every GPU: the CPU trains, on purpose"))
            return
        if processes.of_run().local_size > 1:
            what = "several processes on AMD's cards are not built: which process has which card is not settled there"
            raise HardwareError(what, processes.HINT)
        if said := device.trouble():
            what = f"an AMD card is here, and torch {build.version} (ROCm {build.hip}) can't use it: {said}"
            raise HardwareError(what, f"see what rocminfo says, and whether you may open /dev/kfd; or {hide()}")
        sink.emit(Notice(TOPIC, "an AMD card, under ROCm: the plan's figures are those of NVIDIA's cards"))
        if AOTRITON not in os.environ:
            sink.emit(Notice(TOPIC, f"on RX cards torch's attention writes out all scores (S × S) unless {AOTRITON}=1"))
    elif build.hip is None and nvidia.amd_on_bus():
        how = "https://pytorch.org/get-started/locally names its builds for ROCm"
        sink.emit(Notice(TOPIC, f"an AMD card is here, and torch {build.version} is not built for it ({how})"))
    elif sys.platform == "darwin" and platform.machine() == "arm64":
        sink.emit(Notice(TOPIC, "Apple's GPU is not used: 4-bit training on it is not built, and the CPU trains"))


def _several(signs: nvidia.Signs) -> bool:
    """Whether there may be more than one card: by the driver's own list, or where that isn't kept."""
    cards = nvidia.listed_by_driver()
    return signs.smi is not None and cards != 1


def _choose(signs: nvidia.Signs, answer: Answer, sink: Sink) -> None:
    """Of several cards, the one with most free memory; those that compute no bf16 are none where others do."""
    cards = _allowed(answer.cards)
    if processes.of_run().local_size > 1:
        _choose_own(cards)
        return
    if cards is None:
        sink.emit(Notice(TOPIC, f"{VISIBLE}={os.environ[VISIBLE][:60]}: of these cards the first is taken"))
        return
    able = [card for card in cards if (card.capability or card_trouble.BF16) >= card_trouble.BF16] or cards
    if len(cards) < 2:
        return
    best = max(able, key=lambda card: (card.free_bytes, -card.index))
    os.environ[VISIBLE] = best.uuid
    held = nvidia.holders(signs.smi) if signs.smi else {}
    others = "; ".join(_described(card, held.get(card.uuid, [])) for card in cards if card is not best)
    sink.emit(
        Notice(TOPIC, f"GPU {_described(best, held.get(best.uuid, []))}: taken, as most is free; {others}", len(cards))
    )


def _choose_own(cards: list[Card] | None) -> None:
    """Of one of several processes on this machine: the card of its number there, in the order of CUDA_VISIBLE_DEVICES
    or of the driver. Raises HardwareError where there are fewer cards than processes."""
    place = processes.of_run()
    names = [card.uuid for card in cards] if cards is not None else os.environ[VISIBLE].split(",")
    if len(names) < place.local_size:
        what = f"{place.local_size} processes on this machine, and {len(names)} cards that they may use"
        raise HardwareError(
            what, "start one process a card: torchrun --nproc-per-node, accelerate launch --num_processes"
        )
    os.environ[VISIBLE] = names[place.local_rank].strip()


def _allowed(cards: tuple[Card, ...]) -> list[Card] | None:
    """The cards that CUDA_VISIBLE_DEVICES names; None where CUDA may count them in another order than the driver does.

    CUDA puts the fastest card first unless CUDA_DEVICE_ORDER says otherwise: numbers mean the same for equal cards.
    """
    value = os.environ.get(VISIBLE)
    if value is None:
        return list(cards)
    names = [name.strip() for name in value.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,3}", name) for name in names):
        return [card for name in names for card in cards if name and card.uuid.startswith(name)]
    in_order = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({card.name for card in cards}) == 1
    if len(names) > 1 and not in_order:
        return None
    return [card for name in names for card in cards if card.index == int(name)]


def _described(card: Card, held: list[str]) -> str:
    by = f", held by {', '.join(held[:3])}" if held else ""
    return f"{card.index} ({card.name}), {card.free_bytes / 2**30:.1f} of {card.total_bytes / 2**30:.1f} GiB free{by}"


def _free(found: Found) -> int | None:
    """What the driver calls free on the one card that CUDA will see, while this process has no context there yet."""
    smi = found.signs.smi
    if found.build.cuda is None or smi is None or device.has_started():
        return None
    cards = found.answer.cards or nvidia.ask(found.signs).cards
    chosen = os.environ.get(VISIBLE)
    seen = [card for card in cards if card.uuid == chosen] or cards
    return seen[0].free_bytes if len(seen) == 1 else None


def _try(found: Found, sink: Sink) -> None:
    """Have torch compute something on its card. Raises HardwareError where it can't."""
    if not device.may_spill():  # neither Windows nor WSL
        third_party.let_segments_grow()
    free = _free(found)
    said = device.trouble()  # asked first: CUDA's reason is told once in a process
    if said is None and free is not None:
        device.measure_context(free)
    facts = device.facts()
    if facts is not None and (error := cannot_compute(*facts, found.build)):
        raise error
    if said is None:
        return
    answer = found.answer if found.answer.cards or found.answer.failure else nvidia.ask(found.signs)
    if answer.means_no_card(found.signs):
        _without_nvidia(found.build, sink)
        return
    raise cannot_be_used(replace(found, answer=answer, said=said))
