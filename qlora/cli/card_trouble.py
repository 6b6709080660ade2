"""A card that is there and that torch can't use: why, and the command that mends it."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass

from qlora.device import FINDS_NONE, OLDEST
from qlora.errors import HardwareError
from qlora.nvidia import Answer, Signs
from qlora.torch_build import TorchBuild
from qlora.wsl import is_wsl

# The oldest driver of each major version of CUDA, as (Linux, Windows): within one, a newer toolkit runs on an older
# driver (CUDA Toolkit Release Notes, table "Minimum Required Driver Version for CUDA Minor Version Compatibility").
DRIVERS = {
    11: ((450, 80), (452, 39)),
    12: ((525, 60), (528, 33)),
    13: ((580,), (580,)),
}
# The first driver with CUDA 12.8, whose compiler knows compute capability 10.0 and 12.0 (same notes, table 3).
BLACKWELL_DRIVER = (570,)
BF16 = (8, 0)
CUDA_13 = (7, 5)  # the oldest that it compiles for (CUDA 13.0 release notes: Maxwell, Pascal and Volta are removed)
_WHEELS = "https://download.pytorch.org/whl"
# The torch that this package takes (pyproject.toml). An index of wheels need not have the release that is installed.
RANGE = "torch>=2.10,<2.14"


@dataclass(frozen=True)
class Found:
    """All that is known of this system when it is refused. `said` are torch's own words, "" if it wasn't asked.

    `visible` is what the user has set CUDA_VISIBLE_DEVICES to: by then it may name the card that was chosen.
    """

    build: TorchBuild
    signs: Signs
    answer: Answer
    said: str = ""
    visible: str | None = None


def hide() -> str:
    """How a card is hidden, so that the CPU trains on purpose. Windows has no empty variables."""
    value = "-1" if sys.platform == "win32" else ""
    return f"set CUDA_VISIBLE_DEVICES={value} to train on the CPU on purpose"


def cannot_be_used(found: Found) -> HardwareError:
    """The error of a card that torch does not use."""
    what, mend = _cause(found)
    return HardwareError(what, f"{mend}; or {hide()}")


def _cause(found: Found) -> tuple[str, str]:
    """What is wrong and how it is mended: the first thing that stands in the way, from the driver up to torch."""
    build, answer, name = found.build, found.answer, found.answer.names
    if not (found.signs.smi or found.signs.library or found.signs.has_driver):
        return "an NVIDIA card is on the bus, and its driver is not installed", _driver(13, is_there=False)
    if answer.cards and all(card.capability is not None and card.capability < OLDEST for card in answer.cards):
        best = max(answer.cards, key=lambda card: card.capability or OLDEST)
        return too_old(best.name, best.capability or OLDEST)
    if (old := driver_too_old(build, answer)) is not None:
        return old
    if answer.failure and (build.cuda is not None or _is_lost(answer.failure)):
        return f"an NVIDIA card is here, and its driver does not serve it: {answer.failure}", _revive(answer.failure)
    if build.cuda is None:
        kind = "AMD's GPUs (ROCm)" if build.hip else "Intel's GPUs" if build.xpu else "CPUs"
        what = f"{name} is here, and the torch that is installed ({build.version}) is built for {kind}"
        wheel = _cuda_for(answer)
        return what, _pip(wheel) if wheel else f"{_driver(13, is_there=True)}, then {_pip('cu130')}"
    if found.visible is not None and (found.said == FINDS_NONE or _is_lost(found.said) is None):
        what = (
            f"CUDA_VISIBLE_DEVICES={found.visible[:60]} names no card that torch {build.version} finds ({name} is here)"
        )
        return what, "name one that nvidia-smi -L lists, or unset it"
    return f"{name} is here, and torch {build.version} can't use it: {found.said}", _revive(found.said)


def driver_too_old(build: TorchBuild, answer: Answer) -> tuple[str, str] | None:
    """What is wrong and how it is mended where the driver is older than torch's CUDA takes; None where it isn't."""
    needs = DRIVERS.get(build.cuda_major or 0)
    if needs is None or not (too_old := _too_old(answer, build.cuda_major or 0)):
        return None
    least = ".".join(str(part) for part in needs[sys.platform == "win32"])
    what = f"{answer.names}: its driver ({too_old}) is too old for torch {build.version}, which needs {least} or newer"
    older = _cuda_for(answer)
    other = f", or take torch's build for that driver: {_pip(older)}" if older else ""
    return what, f"{_driver(build.cuda_major or 13, is_there=True)}{other}"


def cannot_compute(
    name: str, capability: tuple[int, int], compiled: list[str], build: TorchBuild
) -> HardwareError | None:
    """The error of a card that torch reaches and has no kernels for, or that is too old; None where it will compute.

    `compiled` is torch's list of architectures ("sm_86" runs on 8.6 and later 8.x, "compute_90" on all from 9.0 on).
    """
    number = "{}.{}".format(*capability)
    if capability < OLDEST:
        what, mend = too_old(name, capability)
        return HardwareError(what, f"{mend}; or {hide()}")
    if not compiled or any(_runs(one, capability) for one in compiled):
        return None
    what = (
        f"torch {build.version} has no kernels for {name} (compute capability {number}; it has {', '.join(compiled)})"
    )
    return HardwareError(what, f"{_pip('cu130' if capability >= CUDA_13 else 'cu126')}; or {hide()}")


def too_old(name: str, capability: tuple[int, int]) -> tuple[str, str]:
    """What no driver and no other torch mends."""
    number = "{}.{}".format(*capability)
    what = f"{name} (compute capability {number}): bitsandbytes computes 4 bit from 6.0 on (GTX 10 and newer)"
    return what, "use a newer GPU"


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    found = re.fullmatch(r"(sm|compute)_([0-9]{1,2})([0-9])[a-z]?", architecture)
    if found is None:
        return False
    compiled = int(found[2]), int(found[3])
    return compiled <= capability and (found[1] == "compute" or compiled[0] == capability[0])


def _too_old(answer: Answer, major: int) -> str:
    """The driver's version for people where it is too old for that CUDA; "" where it isn't, or isn't known."""
    if (driver := answer.driver) is not None:
        return answer.cards[0].driver_version if driver < DRIVERS[major][sys.platform == "win32"] else ""
    if answer.cuda is not None and answer.cuda // 1000 < major:
        return f"it has CUDA {answer.cuda // 1000}.{answer.cuda % 1000 // 10}"
    return ""


def _cuda_for(answer: Answer) -> str | None:
    """The newest of torch's builds that the driver serves; None where it serves none of them."""
    windows = sys.platform == "win32"
    driver = answer.driver or {13: DRIVERS[13][windows], 12: DRIVERS[12][windows]}.get((answer.cuda or 13000) // 1000)
    if driver is None or driver < DRIVERS[12][windows]:
        return None
    if driver >= DRIVERS[13][windows]:
        return "cu130"
    needs_12_8 = any(card.capability is not None and card.capability >= (10, 0) for card in answer.cards)
    if needs_12_8:
        return "cu128" if driver >= BLACKWELL_DRIVER else None
    return "cu126"


def _pip(cuda: str) -> str:
    """Installing torch for that CUDA. Windows' package on PyPI is a build for the CPU: the index is named."""
    return f'pip install --force-reinstall "{RANGE}" --index-url {_WHEELS}/{cuda}'


def _driver(major: int, is_there: bool) -> str:
    """Installing a driver, where this system takes one from."""
    least = DRIVERS[major][sys.platform == "win32"][0]
    if sys.platform == "win32":
        return f"install NVIDIA's driver {least} or newer (https://www.nvidia.com/drivers)"
    if is_wsl():
        return f"install NVIDIA's driver {least} or newer in Windows, not in Linux (https://www.nvidia.com/drivers)"
    if os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv"):
        if is_there:
            return f"install NVIDIA's driver {least} or newer on the container's host"
        return f"start the container with --gpus all, on a host with NVIDIA's driver {least} or newer"
    return f"install NVIDIA's driver {least} or newer (Ubuntu: sudo ubuntu-drivers install; then restart)"


# Words by which driver, CUDA and torch tell what has happened to a card, and what helps.
_LOST = (
    ("version mismatch", "restart the machine: the driver was updated while its older module is loaded"),
    ("forward compatibility", "restart the machine: the driver was updated while its older module is loaded"),
    ("couldn't communicate", "load the driver (sudo modprobe nvidia), or install it again for this kernel"),
    ("no driver is loaded", "load the driver (sudo modprobe nvidia), or install it again for this kernel"),
    (FINDS_NONE, "let torch find libcuda.so.1 (a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility)"),
    ("not yet initialized", "start the fabric manager (sudo systemctl start nvidia-fabricmanager)"),
    ("gpu is lost", "restart the machine: the card has fallen off the bus (dmesg | grep Xid says why)"),
    ("device handle", "restart the machine: the card has fallen off the bus (dmesg | grep Xid says why)"),
    ("unknown error", "restart the machine, or sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm"),
    ("unspecified launch failure", "restart the machine: the card has failed (dmesg | grep Xid says why)"),
    ("no kernel image", "install a torch whose kernels are for this card (https://pytorch.org/get-started)"),
    ("out of memory", "end the programs that hold its memory (nvidia-smi lists them)"),
)


def _is_lost(said: str) -> str | None:
    return next((mend for words, mend in _LOST if words in said.lower()), None)


def _revive(said: str) -> str:
    return _is_lost(said) or "see what nvidia-smi says, and restart the machine"
