"""The lines of the GPU: an old driver, a card that is held, hidden, too old, not used by torch, or not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora.cli.card_trouble import driver_too_old
from qlora.doctor import card
from qlora.doctor.card import CardFacts
from qlora.doctor.finding import Colour
from qlora.doctor.trial import Trial
from qlora.nvidia import Answer, Card, Signs
from qlora.torch_build import TorchBuild
from tests.doctor.cases import WELL, only

GIB = 2**30
SIGNS = Signs(Path("/usr/bin/nvidia-smi"), None, True, 1)
BUILD = TorchBuild("2.13.0+cu130", cuda="13.0")
RTX = Card(0, "GPU-0", "NVIDIA GeForce RTX 3090", "580.95", 24 * GIB, 23 * GIB, (8, 6))
ON_CARD = Trial(
    "device",
    {**WELL["device"], "on_card": True, "name": RTX.name, "capability": "8.6", "free_bytes": 1, "total_bytes": 2},
)
ON_CPU = Trial("device", WELL["device"])


def facts(one: Card = RTX, **more: object) -> CardFacts:
    return replace(CardFacts(BUILD, SIGNS, Answer((one,))), **more)  # type: ignore[arg-type]


def test_a_well_card_is_green() -> None:
    found = card.findings(facts(), ON_CARD)
    assert {one.colour for one in found} == {Colour.GREEN}
    assert [one.name for one in found] == ["GPU", "driver", "device", "GPU memory"]
    assert "8.6" in only(found, "GPU").said and "580.95 serves CUDA 13.0" in only(found, "driver").said


def test_an_old_driver_is_red_with_the_command() -> None:
    old = replace(RTX, driver_version="535.183.01")
    known = facts(old, too_old=driver_too_old(BUILD, Answer((old,))))
    found = card.findings(known, Trial("device", failure="CUDA: driver too old", mend="x"))
    driver = only(found, "driver")
    assert driver.colour == Colour.RED and "535.183.01" in driver.said and "580 or newer" in driver.said
    assert "install NVIDIA's driver 580" in driver.mend and "download.pytorch.org/whl/cu126" in driver.mend
    assert [one.name for one in found] == ["GPU", "driver", "GPU memory"]  # one cause, one red line


def test_a_card_that_torch_cannot_use_is_red_with_its_cause() -> None:
    trial = Trial("device", failure="torch 2.13.0+cpu is built for CPUs", mend="pip install --force-reinstall torch")
    found = card.findings(facts(build=TorchBuild("2.13.0+cpu")), trial)
    assert only(found, "device").colour == Colour.RED
    assert only(found, "device").mend == trial.mend and only(found, "driver").colour == Colour.YELLOW


@pytest.mark.parametrize(("free", "colour"), [(23, Colour.GREEN), (18, Colour.YELLOW), (1, Colour.RED)])
def test_who_holds_the_memory_is_named_here_alone(free: int, colour: Colour) -> None:
    known = facts(replace(RTX, free_bytes=free * GIB), held={"GPU-0": ["blender (77): 5.0 GiB"]})
    found = only(card.findings(known, ON_CARD), "GPU memory")
    assert found.colour == colour and "blender (77)" in found.here and "blender" not in found.said


def test_several_cards_have_a_line_each() -> None:
    second = replace(RTX, index=1, uuid="GPU-1", free_bytes=GIB)
    found = card.findings(facts(answer=Answer((RTX, second))), ON_CARD)
    assert only(found, "GPU 0 memory").colour == Colour.GREEN and only(found, "GPU 1 memory").colour == Colour.RED


def test_cards_that_will_not_do() -> None:
    kepler = replace(RTX, capability=(3, 7))
    assert only(card.findings(facts(kepler), ON_CPU), "GPU").colour == Colour.RED
    turing = replace(ON_CARD, answer={**(ON_CARD.answer or {}), "computes_bf16": False})
    found = only(card.findings(facts(replace(RTX, capability=(7, 5))), turing), "device")
    assert found.colour == Colour.GREEN and "in fp16" in found.said
    hidden = only(card.findings(facts(is_hidden=True), ON_CPU), "GPU")
    assert hidden.colour == Colour.YELLOW and "unset CUDA_VISIBLE_DEVICES" in hidden.mend
    spilling = replace(ON_CARD, answer={**(ON_CARD.answer or {}), "may_spill": True})
    assert "Prefer No Sysmem Fallback" in only(card.findings(facts(), spilling), "device").mend


def test_no_card_is_a_warning_and_no_error() -> None:
    found = card.findings(CardFacts(BUILD), ON_CPU)
    assert [(one.name, one.colour) for one in found] == [("GPU", Colour.YELLOW)]
    amd = Trial("device", {**WELL["device"], "notices": ["an AMD card is here, and torch is not built for it"]})
    assert "AMD" in only(card.findings(CardFacts(BUILD), amd), "GPU").said


def test_a_driver_that_does_not_answer_is_red() -> None:
    silent = facts(answer=Answer(failure="it did not answer within 10 s"))
    assert only(card.findings(silent, ON_CPU), "driver").colour == Colour.RED
    by_library = facts(answer=Answer(cuda=13000))
    assert only(card.findings(by_library, ON_CARD), "driver").colour == Colour.GREEN
    # Without a list of the driver's, torch's own figures stand.
    assert only(card.findings(by_library, ON_CARD), "GPU memory").figures["total_bytes"] == 2
