"""Why torch can't use a card that is there, and the command that mends it: one row a cause."""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from qlora.cli import card_trouble
from qlora.cli.card_trouble import Found, cannot_be_used, cannot_compute
from qlora.nvidia import Answer, Card, Signs
from qlora.torch_build import TorchBuild

GIB = 2**30
CARD = Card(0, "GPU-1", "NVIDIA GeForce RTX 3090", "535.183.01", 24 * GIB, 23 * GIB, (8, 6))
NEW, OLD = replace(CARD, driver_version="580.95.05"), replace(CARD, driver_version="470.256.02")
BLACKWELL = replace(CARD, name="NVIDIA GeForce RTX 5090", driver_version="570.86", capability=(12, 0))
SMI = Signs(Path("/usr/bin/nvidia-smi"), None, True, 1)
CPU, CU130 = TorchBuild("2.13.0+cpu"), TorchBuild("2.13.0+cu130", cuda="13.0")
CU126, ROCM = TorchBuild("2.13.0+cu126", cuda="12.6"), TorchBuild("2.13.0+rocm6.4", hip="6.4")

CAUSES = {
    "a build for the CPU, new driver": (
        Found(CPU, SMI, Answer((NEW,))),
        "3090 is here.*built for CPUs",
        "torch>=2.*/cu130",
    ),
    "a build for the CPU, driver of CUDA 12": (Found(CPU, SMI, Answer((CARD,))), "2.13.0.cpu", "/whl/cu126"),
    "a build for the CPU, new card, driver of CUDA 12.8": (Found(CPU, SMI, Answer((BLACKWELL,))), "5090", "/whl/cu128"),
    "a build for the CPU, cards that are too old": (
        Found(
            CPU,
            SMI,
            Answer((replace(NEW, name="GT 730", capability=(3, 5)), replace(NEW, name="M40", capability=(5, 2)))),
        ),
        r"^M40 \(compute capability 5.2\): bitsandbytes computes 4 bit from 6.0 on",
        "^use a newer GPU; or",
    ),
    "a build for the CPU, a card without bf16": (
        Found(CPU, SMI, Answer((replace(NEW, name="T4", capability=(7, 5)),))),
        "T4 is here.*built for CPUs",
        "torch>=2.*/cu130",
    ),
    "an old driver, a card that is too old": (
        Found(CU130, SMI, Answer((replace(OLD, name="GTX 980", capability=(5, 2)),))),
        "980.*4 bit from 6.0 on",
        "^use a newer GPU; or",
    ),
    "a build for the CPU, driver too old for any": (
        Found(CPU, SMI, Answer((OLD,))),
        "built for CPUs",
        "^install NVIDIA's driver 580 or newer.*, then pip install.*/whl/cu130",
    ),
    "a build for AMD": (Found(ROCM, SMI, Answer((NEW,))), "built for AMD's GPUs", "/whl/cu130"),
    "driver too old, an older torch would do": (
        Found(CU130, SMI, Answer((CARD,)), "too old"),
        r"driver \(535.183.01\) is too old for torch 2.13.0.cu130, which needs 580",
        "driver 580.*or take torch's build for that driver: pip install.*/whl/cu126",
    ),
    "driver too old for any": (Found(CU126, SMI, Answer((OLD,))), r"\(470.256.02\) is too old.*525.60", "driver 525"),
    "driver too old, by its library": (
        Found(CU130, replace(SMI, smi=None), Answer(cuda=12040)),
        r"\(it has CUDA 12.4\) is too old",
        "/whl/cu126",
    ),
    "no driver": (Found(CU130, Signs(None, None, False, 1), Answer()), "driver is not installed", "580"),
    "driver updated, not restarted": (
        Found(CU130, SMI, Answer(failure="Failed to initialize NVML: Driver/library version mismatch")),
        "does not serve it: Failed to initialize NVML",
        "^restart the machine: the driver was updated",
    ),
    "module not loaded": (
        Found(
            CU130, SMI, Answer(failure="NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
        ),
        "does not serve it",
        "modprobe nvidia",
    ),
    "card lost": (
        Found(CU130, SMI, Answer(failure="Unable to determine the device handle for GPU0000:01:00.0: Unknown Error")),
        "device handle",
        "Xid",
    ),
    "a build for the CPU, and a program that hangs": (
        Found(CPU, SMI, Answer(failure="it did not answer within 10 s")),
        "an NVIDIA card is here.*built for CPUs",
        "pip install",
    ),
    "torch finds none where the driver lists one": (
        Found(CU130, SMI, Answer((NEW,)), "it finds none"),
        "3090 is here, and torch 2.13.0.cu130 can't use it: it finds none",
        "libcuda",
    ),
    "program hangs": (
        Found(CU130, SMI, Answer(failure="it did not answer within 10 s")),
        "did not answer",
        "nvidia-smi.*restart",
    ),
    "torch's unknown error": (
        Found(CU130, SMI, Answer((NEW,)), "CUDA unknown error"),
        "can't use it: CUDA",
        "nvidia_uvm",
    ),
    "full card": (Found(CU130, SMI, Answer((NEW,)), "CUDA error: out of memory"), "out of memory", "end the programs"),
    "something else": (Found(CU130, SMI, Answer((NEW,)), "CUDA error: misaligned"), "misaligned", "restart"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="Linux' drivers have other numbers")
@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_is_named_with_what_mends_it(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found, what, hint = CAUSES[cause]
    error = cannot_be_used(found)
    assert re.search(what, error.what), error.what
    assert re.search(hint, error.hint), error.hint
    assert error.hint.endswith("set CUDA_VISIBLE_DEVICES= to train on the CPU on purpose") and error.exit_code == 2


def test_torch_is_offered_in_the_range_that_this_package_takes() -> None:
    """An index for an older CUDA need not have the release that is installed."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert card_trouble.RANGE in project["dependencies"]
    hint = cannot_be_used(Found(CPU, SMI, Answer((BLACKWELL,)))).hint
    assert f'"{card_trouble.RANGE}" --index-url https://download.pytorch.org/whl/cu128' in hint and "==" not in hint


def test_an_old_driver_of_a_container_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_trouble.os.path, "exists", lambda path: path == "/.dockerenv")
    assert "580 or newer on the container's host" in cannot_be_used(Found(CU130, SMI, Answer((CARD,)))).hint


def test_a_card_that_is_not_there_is_named_by_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")  # chosen since
    error = cannot_be_used(Found(CU130, SMI, Answer((NEW,)), "it finds none", visible="7"))
    assert "CUDA_VISIBLE_DEVICES=7 names no card" in error.what and "nvidia-smi -L" in error.hint


@pytest.mark.parametrize(
    ("platform", "place", "words"),
    [
        ("win32", None, "nvidia.com/drivers"),
        ("linux", "WSL", "in Windows, not in Linux"),
        ("linux", "/.dockerenv", "--gpus all"),
        ("linux", None, "ubuntu-drivers"),
    ],
)
def test_a_driver_comes_from_where_the_system_takes_it(
    platform: str, place: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_trouble.sys, "platform", platform)
    monkeypatch.setattr(card_trouble.os.path, "exists", lambda path: path == place)
    monkeypatch.setattr(card_trouble, "is_wsl", lambda: place == "WSL")
    assert words in cannot_be_used(Found(CU130, Signs(None, None, False, 1), Answer())).hint


@pytest.mark.parametrize(
    ("capability", "compiled", "words"),
    [
        ((8, 6), ["sm_80", "sm_86", "sm_90"], None),
        ((8, 9), ["sm_80", "sm_86"], None),
        ((12, 1), ["sm_90", "compute_90"], None),
        ((10, 0), ["sm_100a"], None),
        ((9, 0), [], None),
        ((5, 2), ["sm_52"], "4 bit from 6.0 on"),
        ((6, 1), ["sm_61"], None),
        ((6, 1), ["sm_75", "sm_80"], "no kernels.*it has sm_75"),
        ((7, 5), ["sm_75", "sm_80"], None),
        ((12, 0), ["sm_50", "sm_80", "sm_90"], "no kernels for RTX.*12.0; it has sm_50, sm_80, sm_90"),
        ((8, 0), ["sm_86"], "no kernels"),
        ((8, 0), ["compute_86", "nonsense"], "no kernels"),
    ],
)
def test_a_card_without_kernels_or_too_old_is_refused(
    capability: tuple[int, int], compiled: list[str], words: str | None
) -> None:
    error = cannot_compute("RTX", capability, compiled, CU126)
    assert (error is None) == (words is None)
    if error is not None and words is not None:
        assert re.search(words, error.what) and "CUDA_VISIBLE_DEVICES" in error.hint
        assert ("pip install" in error.hint) == ("kernels" in words)
        assert ("cu126" in error.hint) == ("kernels" in words and capability < (7, 5))  # which CUDA 13 left out
