"""Which card a command computes on: chosen among several, refused where torch can't use it, hidden on purpose."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import device, nvidia, processes, third_party, torch_build
from qlora.cli import cards
from qlora.errors import HardwareError
from qlora.events import Recorder
from qlora.nvidia import Answer, Card, Signs
from qlora.processes import Place
from qlora.torch_build import TorchBuild
from tests.cli.cases import expect_two_lines, run
from tests.runs import write_recipe

GIB = 2**30
NONE, SMI = Signs(None, None, False, 0), Signs(Path("/usr/bin/nvidia-smi"), None, True, 1)
CPU, CU130 = TorchBuild("2.13.0+cpu"), TorchBuild("2.13.0+cu130", cuda="13.0")


def card(index: int, free: int, name: str = "RTX 3090", capability: tuple[int, int] | None = (8, 6)) -> Card:
    return Card(index, f"GPU-{index}{index}", name, "580.95", 24 * GIB, free * GIB, capability)


@dataclass
class System:
    """What the modules below are made to find."""

    signs: Signs = NONE
    build: TorchBuild | None = CU130
    answer: Answer = field(default_factory=Answer)
    listed: int | None = 1
    trouble: str | None = None
    facts: Any = None
    asked: int = 0

    def ask(self, signs: Signs) -> Answer:
        self.asked += 1
        return self.answer


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    found = System()
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "")  # so that what is set under test is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(nvidia, "signs", lambda: found.signs)
    monkeypatch.setattr(nvidia, "ask", found.ask)
    monkeypatch.setattr(nvidia, "listed_by_driver", lambda: found.listed)
    monkeypatch.setattr(nvidia, "amd_on_bus", lambda: False)
    monkeypatch.setattr(nvidia, "holders", lambda smi: {"GPU-00": ["python (7): 20.0 GiB"]})
    monkeypatch.setattr(torch_build, "installed", lambda: found.build)
    monkeypatch.setattr(device, "trouble", lambda: found.trouble)
    monkeypatch.setattr(device, "facts", lambda: found.facts)
    return found


def told() -> str:
    recorder = Recorder()
    cards.settle(recorder)
    return "\n".join(event.as_dict()["message"] for event in recorder.of("notice"))


def test_without_a_sign_nothing_is_asked_or_said(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "trouble", lambda: pytest.fail("torch was asked"))
    assert told() == "" and system.asked == 0


def test_one_card_that_works_is_used_without_a_word(system: System) -> None:
    system.signs, system.facts = SMI, ("RTX 3090", (8, 6), ["sm_86"])
    assert told() == "" and system.asked == 1 and "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(("free", "started", "measured"), [((20,), False, 20), ((20, 24), False, 24), ((20,), True, 0)])
def test_what_is_free_before_there_is_a_context_is_asked_of_the_driver(
    free: tuple[int, ...], started: bool, measured: int, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the card that is taken, before torch computes on it; CUDA itself would make a context to answer."""
    order: list[object] = []
    system.signs, system.facts, system.listed = SMI, ("RTX 3090", (8, 6), ["sm_86"]), len(free)
    system.answer = Answer(tuple(card(index, size) for index, size in enumerate(free)))
    monkeypatch.setattr(device, "has_started", lambda: started)
    monkeypatch.setattr(device, "trouble", lambda: order.append("kernel"))
    monkeypatch.setattr(device, "measure_context", order.append)
    told()
    assert order == ["kernel", *([measured * GIB] if measured else [])]


@pytest.mark.parametrize(
    ("build", "trouble", "facts", "words"),
    [
        (CPU, None, None, "built for CPUs"),
        (CU130, "it finds none", None, "can't use it"),
        (CU130, None, ("GTX 1080", (6, 1), ["sm_80"]), "no kernels"),
        (CU130, None, ("GTX 980", (5, 2), ["sm_80"]), "4 bit"),
        (CU130, None, ("RTX 5090", (12, 0), ["sm_90"]), "no kernels"),
    ],
)
def test_a_card_that_cannot_be_used_is_refused(
    build: TorchBuild, trouble: str | None, facts: Any, words: str, system: System
) -> None:
    system.signs, system.build, system.trouble, system.facts = SMI, build, trouble, facts
    system.answer = Answer((card(0, 20),))
    with pytest.raises(HardwareError, match=words):
        told()


@pytest.mark.parametrize("value", ["", "-1", "-1,0", "NoDevFiles"])
def test_a_hidden_card_means_the_cpu_on_purpose(value: str, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    system.signs, system.build = SMI, CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert "the CPU trains, on purpose" in told()
    system.signs = NONE
    assert told() == ""


def test_accelerates_own_word_for_the_cpu_is_kept(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    system.signs = SMI
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert "on purpose" in told() and os.environ["CUDA_VISIBLE_DEVICES"] == "-1"


def test_of_several_cards_the_freest_is_taken_and_the_rest_is_named(system: System) -> None:
    system.signs, system.listed = SMI, 3
    system.answer = Answer((card(0, 2), card(1, 23), card(2, 22)))
    said = told()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-11"
    assert said.startswith("GPU 1 (RTX 3090), 23.0 of 24.0 GiB free: taken") and "python (7): 20.0 GiB" in said


def test_a_card_that_computes_no_bf16_is_not_taken(system: System) -> None:
    system.signs, system.listed = SMI, 2
    system.answer = Answer((card(0, 23, "GTX 1080 Ti", (6, 1)), card(1, 10)))
    told()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-11"


@pytest.mark.parametrize(
    ("value", "order", "same", "taken"),
    [
        ("0,2", None, True, "GPU-22"),
        ("GPU-0,GPU-2", None, False, "GPU-22"),
        ("0,2", "PCI_BUS_ID", False, "GPU-22"),
        ("0,2", None, False, "0,2"),  # CUDA may count them in another order
        ("2", None, False, "2"),
    ],
)
def test_among_the_cards_that_the_user_names(
    value: str, order: str | None, same: bool, taken: str, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.signs, system.listed = SMI, 3
    system.answer = Answer((card(0, 2), card(1, 23), card(2, 22, "RTX 3090" if same else "RTX 4090")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    if order:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    said = told()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == taken
    assert ("the first is taken" in said) == (taken == "0,2")


def test_a_driver_that_has_no_card_is_none(system: System) -> None:
    system.signs, system.build = Signs(None, Path("libcuda.so.1"), False, 0), CPU
    system.answer = Answer(has_no_card=True)
    assert told() == ""
    system.build, system.trouble = CU130, "it finds none"
    assert told() == ""


SILENT = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.mark.parametrize("build", [CPU, CU130])
@pytest.mark.parametrize("listed", [None, 1])  # with several or without a list it is asked before torch
@pytest.mark.parametrize(
    ("signs", "answer", "is_none"),
    [
        (Signs(SMI.smi, None, False, 0, tells_bus=True), Answer(failure=SILENT), True),
        (Signs(None, Path("libcuda.so.1"), False, 0, tells_bus=True), Answer(failure="CUDA error 999"), True),
        (Signs(SMI.smi, None, False, 0, tells_bus=False), Answer(failure=SILENT), False),
        (Signs(SMI.smi, None, False, 1, tells_bus=True), Answer(failure=SILENT), False),
        (Signs(SMI.smi, None, True, 0, tells_bus=True), Answer(failure=SILENT), False),
        (Signs(SMI.smi, None, False, 0, tells_bus=True), Answer((card(0, 20),)), False),
        (Signs(SMI.smi, None, False, 0, tells_bus=True), Answer(failure="Driver/library version mismatch"), False),
    ],
)
def test_a_driver_left_behind_where_no_card_is_on_the_bus_is_none(
    build: TorchBuild, listed: int | None, signs: Signs, answer: Answer, is_none: bool, system: System
) -> None:
    system.build, system.signs, system.answer, system.listed = build, signs, answer, listed
    system.trouble = "it finds none"
    if is_none:
        assert told() == ""
        return
    with pytest.raises(HardwareError, match=r"NVIDIA|RTX"):
        told()


def test_torchs_reason_is_kept_though_it_is_told_once(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA counts its devices once in a process, and says only then why it finds none."""
    reasons = ["CUDA initialization: CUDA unknown error"]

    def is_available() -> bool:
        while reasons:
            warnings.warn(reasons.pop(), stacklevel=1)
        return False

    monkeypatch.undo()
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "x")
    monkeypatch.setattr(nvidia, "signs", lambda: SMI)
    monkeypatch.setattr(nvidia, "ask", lambda signs: Answer((card(0, 20),)))
    monkeypatch.setattr(nvidia, "listed_by_driver", lambda: 1)
    monkeypatch.setattr(torch_build, "installed", lambda: CU130)
    monkeypatch.setattr(device.accelerator, "is_available", is_available, raising=False)
    with pytest.raises(HardwareError, match="can't use it: CUDA initialization: CUDA unknown error") as caught:
        told()
    assert "nvidia_uvm" in caught.value.hint


@pytest.mark.parametrize(("own", "words"), [(None, "can't use it: it finds none"), ("0,1", "=0,1 names no card")])
def test_a_card_that_was_chosen_here_is_not_said_to_be_the_users_choice(
    own: str | None, words: str, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", own)
    system.signs, system.listed, system.trouble = SMI, 2, "it finds none"
    system.answer = Answer((card(0, 2), card(1, 23)))
    with pytest.raises(HardwareError, match=words):
        told()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-11"


def test_amds_card_computes_beside_one_of_nvidias(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "amd_on_bus", lambda: True)
    system.signs, system.build = SMI, TorchBuild("2.13.0+rocm6.4", hip="6.4")
    system.answer = Answer((card(0, 2, "GT 1030", (6, 1)),))
    assert "under ROCm" in told() and system.asked == 0
    monkeypatch.setattr(nvidia, "amd_on_bus", lambda: False)
    with pytest.raises(HardwareError, match="GT 1030"):
        told()


@pytest.mark.parametrize("name", ["HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
@pytest.mark.parametrize(("value", "hides"), [("", True), ("-1", True), ("0", False)])
def test_an_amd_card_is_hidden_by_its_own_words(
    name: str, value: str, hides: bool, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "amd_on_bus", lambda: True)
    system.build, system.trouble = TorchBuild("2.13.0+rocm6.4", hip="6.4"), None if not hides else "it finds none"
    monkeypatch.setenv(name, value)
    assert (f"{name} hides every GPU: the CPU trains, on purpose" in told()) is hides


def test_amds_intels_and_apples_are_told_by_name(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "amd_on_bus", lambda: True)
    system.build = CPU
    assert "AMD card is here" in told() and "pytorch.org" in told() and "torch==" not in told()
    system.build = TorchBuild("2.13.0+rocm6.4", hip="6.4")
    assert "under ROCm" in told() and f"{cards.AOTRITON}=1" in told()
    monkeypatch.setenv(cards.AOTRITON, "1")
    assert "under ROCm" in told() and cards.AOTRITON not in told()
    system.trouble = "HIP error"
    with pytest.raises(HardwareError, match=r"ROCm 6\.4.*HIP error"):
        told()
    monkeypatch.setattr(nvidia, "amd_on_bus", lambda: False)
    system.build = TorchBuild("2.13.0+xpu", xpu="20250101")
    monkeypatch.setattr(device, "has_xpu", lambda: True)
    with pytest.raises(HardwareError, match="Intel GPU"):
        told()
    system.build = CPU
    monkeypatch.setattr(cards.sys, "platform", "darwin")
    monkeypatch.setattr(cards.platform, "machine", lambda: "arm64")
    assert "Apple's GPU is not used" in told()


@pytest.mark.parametrize(
    ("spills", "own", "value"),
    [(False, None, "expandable_segments:True"), (True, None, None), (False, "max_split_size_mb:128", None)],
)
def test_the_allocator_is_set_before_torch_on_linux_alone(
    spills: bool, own: str | None, value: str | None, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in third_party.ALLOCATORS:
        monkeypatch.setenv(name, "")
    if own:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", own)
    monkeypatch.setattr(device, "may_spill", lambda: spills)
    system.signs = SMI
    told()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == (value or "")
    assert third_party.allocator_settings() == (own or value)


def test_several_processes_are_refused_first(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HardwareError, match="WORLD_SIZE=2"):
        told()


def test_each_of_several_processes_takes_the_card_of_its_number(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.signs, system.facts, system.listed = SMI, ("RTX 3090", (8, 6), ["sm_86"]), 2
    system.answer = Answer((card(0, 1), card(1, 20)))
    with processes.taken(Place(5, 6, 1, 2)):
        assert told() == "" and os.environ["CUDA_VISIBLE_DEVICES"] == system.answer.cards[1].uuid
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    with processes.taken(Place(1, 2, 1, 2)):
        told()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == system.answer.cards[0].uuid
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with processes.taken(Place(0, 3, 0, 3)), pytest.raises(HardwareError, match=r"3 processes .* and 2 cards"):
        told()


@pytest.mark.skipif(torch.version.cuda is not None or os.name == "nt", reason="this torch is built for CUDA")
def test_the_command_ends_with_two_lines_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    row = "0, GPU-5b1f3e2a-0c4d-11ee, 580.95.05, 24576, 24000, 8.6, NVIDIA GeForce RTX 3090"
    program.write_text(f"#!/bin/sh\necho '{row}'\n")
    program.chmod(0o755)
    recipe = write_recipe(tmp_path, tmp_path / "no-base")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = run(str(recipe), cwd=tmp_path)
    expect_two_lines(found, "NVIDIA GeForce RTX 3090 is here.*built for CPUs")
    assert "/whl/cu130" in found[2] and not (tmp_path / "runs").exists()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = run(str(recipe), cwd=tmp_path)
    expect_two_lines(hidden, "no-base")
    assert "on purpose" in hidden[1] + hidden[2]
