"""Lines for the GPU: which, its driver beside torch's CUDA, whether torch computes on it, its memory, who holds it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qlora.device import OLDEST
from qlora.doctor.finding import Figure, Finding, green, red, yellow
from qlora.doctor.trial import Trial
from qlora.nvidia import Answer, Card, Signs
from qlora.torch_build import TorchBuild
from qlora.units import GIB

# What a 1B base takes in 4 bit at 1 x 2,048 tokens: less is of no use (prove/shapes.py). Below this share of a card's
# memory being free, other programs hold what a plan would use.
LEAST_FREE_BYTES, USUAL_SHARE = 3 * GIB, 0.85


@dataclass(frozen=True)
class CardFacts:
    """What system and driver say without torch. `too_old`: what is wrong with the driver, and what mends it.

    `is_hidden`: CUDA_VISIBLE_DEVICES, or a word of accelerate's, leaves the CPU. `held` is by a card's UUID.
    """

    build: TorchBuild | None = None
    signs: Signs = field(default_factory=lambda: Signs(None, None, False, 0))
    answer: Answer = field(default_factory=Answer)
    is_hidden: bool = False
    too_old: tuple[str, str] | None = None
    held: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def is_there(self) -> bool:
        return self.signs.of_a_card and not self.answer.means_no_card(self.signs)


def findings(facts: CardFacts, trial: Trial) -> list[Finding]:
    """`trial` is the stage that chose a device and computed on it."""
    found = [_gpu(facts, trial)]
    if facts.is_there:
        found.append(_driver(facts, trial))
    if trial.answer is None and not trial.needs and facts.too_old is None:
        mend = trial.mend or "see what nvidia-smi says, and restart the machine"
        found.append(red("device", trial.failure, mend))
    elif trial.answer is not None and trial.answer["on_card"]:
        found.append(_computes(facts, trial))
    if facts.is_there or (trial.answer or {}).get("on_card"):
        found += _memory(facts, trial)
    return found


def _gpu(facts: CardFacts, trial: Trial) -> Finding:
    answer, cards = trial.answer or {}, facts.answer.cards
    if cards:
        named = ", ".join(f"{card.name} (compute capability {_number(card.capability)})" for card in cards)
        if all(card.capability is not None and card.capability < OLDEST for card in cards):
            return red("GPU", f"{named}: bitsandbytes computes 4 bit from 6.0 on (GTX 10)", "use a newer GPU")
    elif answer.get("on_card"):
        named = f"{answer['name']} (compute capability {answer['capability']})"
    elif facts.is_there:
        named = f"{facts.answer.names}, of which the driver gives no list"
    else:
        notices = [str(one) for one in answer.get("notices", ())]
        if notices:  # one of AMD's, Intel's or Apple's
            return yellow("GPU", "; ".join(notices), "a GPU of NVIDIA's (GTX 10 or newer) trains")
        mend = "small bases train on the CPU; qlora-estimate BASE says what a card needs"
        return yellow("GPU", "none is found: the CPU trains, many times slower", mend)
    if facts.is_hidden:
        return yellow(
            "GPU", f"{named}, hidden: the CPU trains, on purpose", "unset CUDA_VISIBLE_DEVICES to train on it"
        )
    return green("GPU", named, figures={"count": len(cards) or 1})


def _number(capability: tuple[int, int] | None) -> str:
    return "unknown" if capability is None else "{}.{}".format(*capability)


def _driver(facts: CardFacts, trial: Trial) -> Finding:
    build, answer = facts.build, facts.answer
    version = answer.cards[0].driver_version if answer.cards else ""
    if facts.too_old is not None:
        return red("driver", *facts.too_old)
    if not version:
        if answer.failure:
            return red(
                "driver", f"it does not serve its card: {answer.failure}", "see what nvidia-smi says, and restart"
            )
        return green("driver", "its version is not told")
    if build is None or build.cuda is None:
        kind = "no torch is installed" if build is None else f"torch {build.version} is not built for CUDA"
        mend = trial.mend or "install torch's build for CUDA (https://pytorch.org/get-started)"
        return yellow("driver", f"{version}, and {kind}", mend)
    return green(
        "driver",
        f"{version} serves CUDA {build.cuda}, which torch {build.version} is built for",
        figures={"version": version},
    )


def _computes(facts: CardFacts, trial: Trial) -> Finding:
    answer = trial.answer or {}
    said = "; ".join([f"it computes on {answer['name']}", *map(str, answer.get("notices", ()))])
    if not answer["computes_bf16"]:
        said += "; in fp16, with a scaled loss: it has no bf16"
    if answer["may_spill"]:
        said += "; the driver moves to RAM what does not fit, without a word, and a run is many times slower then"
        mend = "NVIDIA's control panel, CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback"
        return yellow("device", said, mend)
    return green("device", said)


def _memory(facts: CardFacts, trial: Trial) -> list[Finding]:
    """A line a card that the driver lists, or the one that torch sees."""
    if facts.answer.cards:
        several = len(facts.answer.cards) > 1
        return [_memory_of(card, facts.held.get(card.uuid, ()), several) for card in facts.answer.cards]
    answer = trial.answer or {}
    if "free_bytes" not in answer:
        return []
    return [_free("GPU memory", int(answer["free_bytes"]), int(answer["total_bytes"]), ())]


def _memory_of(card: Card, held: Sequence[str], several: bool) -> Finding:
    name = f"GPU {card.index} memory" if several else "GPU memory"
    return _free(name, card.free_bytes, card.total_bytes, held)


def _free(name: str, free: int, total: int, held: Sequence[str]) -> Finding:
    said = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free"
    here = f"held by {', '.join(held[:5])}" if held else ""
    figures: dict[str, Figure] = {"free_bytes": free, "total_bytes": total, "programs": len(held)}
    listed = "nvidia-smi lists them" if sys.platform != "win32" else "the task manager lists them"
    mend = f"end the programs that hold it ({listed})"
    if free < min(LEAST_FREE_BYTES, total // 2):
        return red(name, said, mend, here, figures=figures)
    if free < USUAL_SHARE * total:
        return yellow(name, said, mend, here, figures=figures)
    return green(name, said, here, figures=figures)
