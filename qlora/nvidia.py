"""What the system says of NVIDIA's cards, without torch: files of its driver, the driver's library, `nvidia-smi`.

Where nothing hints at a card, nothing is started: a look at a few paths takes a millisecond or two. The program and the
library belong to a driver that may hang, have lost its card, or be another version than its kernel module: both are
asked in a child process for a few seconds at most, and of what comes back only what has the right form is believed.
`nvidia-smi` is taken from the folders of PATH that are absolute and not the current one, or from where drivers put it.
"""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qlora import child_process, files, shown
from qlora.wsl import is_wsl

ROOT = Path("/")  # of the file system that is looked at
SECONDS = 10.0  # without persistence mode a driver wakes its cards up first: two to three seconds a card
MOST_BYTES = 64 * 1024  # of an answer: a row a card takes 150
MOST_CARDS = 64
_MAKER = "0x10de"  # NVIDIA's number on the PCI bus (pci.ids)
_DISPLAYS = ("0x0300", "0x0302")  # PCI classes: a VGA controller, a 3D controller
_LIBRARY = "libcuda.so.1"
_LIBRARY_FOLDERS = (
    *("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "usr/lib/wsl/lib"),
    *("run/opengl-driver/lib", "usr/local/nvidia/lib64"),
)
_FIELDS = ("index", "uuid", "driver_version", "memory.total", "memory.free", "compute_cap", "name")
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE (cuda.h): the driver is well and has no card
# What only a kernel module that is loaded brings its programs to say, or to hang for.
_OF_A_MODULE = ("version mismatch", "device handle", "is lost", "did not answer")


@dataclass(frozen=True)
class Signs:
    """What of NVIDIA's lies in this system. `on_bus` counts cards on the PCI bus, with or without a driver.

    `tells_bus`: every card that this system can have would stand on a bus that it lists.
    """

    smi: Path | None
    library: Path | None
    has_driver: bool
    on_bus: int
    tells_bus: bool = False

    @property
    def proves_none(self) -> bool:
        """Whether no card is here, whatever of a driver was left behind: none on the bus, and no module is loaded."""
        return self.tells_bus and not self.on_bus and not self.has_driver

    @property
    def of_a_card(self) -> bool:
        return bool(self.smi or self.library or self.has_driver or self.on_bus)


@dataclass(frozen=True)
class Card:
    """A card as `nvidia-smi` lists it. `capability` is None where its version does not tell."""

    index: int
    uuid: str
    name: str
    driver_version: str  # "535.183.01"
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None

    @property
    def driver(self) -> tuple[int, ...]:
        """Its version to be compared: (535, 183, 1)."""
        return tuple(int(part) for part in self.driver_version.split("."))


@dataclass(frozen=True)
class Answer:
    """What the driver answers: its cards; or why there is no list of them, in its own words ("" if it wasn't asked)."""

    cards: tuple[Card, ...] = ()
    failure: str = ""
    cuda: int | None = None  # the newest CUDA that the driver's library has: 12040 is 12.4 (cuDriverGetVersion)
    has_no_card: bool = False

    def means_no_card(self, found: Signs) -> bool:
        """Whether no card is here: by the driver's word, or by the bus where its programs reach no driver.

        Images of machines and of CI keep `nvidia-smi` and the libraries where they are started without a GPU.
        """
        left_behind = self.failure != "" and not any(words in self.failure.lower() for words in _OF_A_MODULE)
        return (left_behind and found.proves_none) or (self.has_no_card and not found.on_bus)

    @property
    def driver(self) -> tuple[int, ...] | None:
        return self.cards[0].driver if self.cards else None

    @property
    def names(self) -> str:
        """For people: "NVIDIA GeForce RTX 3090", or how many cards."""
        if len(self.cards) == 1:
            return self.cards[0].name
        return f"{len(self.cards)} NVIDIA cards" if self.cards else "an NVIDIA card"


def signs() -> Signs:
    """What lies in this system. Starts nothing, imports nothing."""
    has_driver = (ROOT / "proc/driver/nvidia/version").exists() or (ROOT / "dev/nvidiactl").exists()
    on_bus = sum(_on_bus(_MAKER))
    return Signs(smi=_smi(), library=_library(), has_driver=has_driver, on_bus=on_bus, tells_bus=_tells_bus())


def listed_by_driver() -> int | None:
    """How many cards the loaded driver lists; None where it keeps no such list (Windows, WSL)."""
    folder = ROOT / "proc/driver/nvidia/gpus"
    return len(_listed(folder, "*")) if folder.is_dir() else None


def amd_on_bus() -> bool:
    """Whether a card of AMD's is here that could compute: by the kernel driver's list, with 4 GiB of its own memory.

    A processor's own graphics are on that list too, with half a GiB or so.
    """
    for bank in _listed(ROOT / "sys/class/kfd/kfd/topology/nodes", "*/mem_banks/*/properties"):
        properties = dict(line.split(" ", 1) for line in _text(bank).splitlines() if " " in line)
        size = properties.get("size_in_bytes", "")
        if properties.get("heap_type") in ("1", "2") and size.isdecimal() and int(size) >= 4 << 30:
            return True
    return False


def ask(found: Signs) -> Answer:
    """The driver's answer, in `SECONDS` at most. A driver without `nvidia-smi` is asked through its library."""
    if found.smi is not None:
        return _ask_smi(found.smi)
    if found.library is not None:
        return _ask_library()
    return Answer(failure="" if found.has_driver or not found.on_bus else "no driver is loaded")


def holders(smi: Path) -> dict[str, list[str]]:
    """Who has memory of each card, by its UUID: "python (1234): 20.1 GiB". Empty where the driver does not tell."""
    found: dict[str, list[str]] = {}
    query = ["--query-compute-apps=gpu_uuid,pid,used_memory,process_name", "--format=csv,noheader,nounits"]
    for row in _rows(_output_of([str(smi), *query], SECONDS)[1]):
        if len(row) >= 4 and row[1].isdecimal():
            program = shown.one_line(re.split(r"[\\/]", ",".join(row[3:]))[-1])[:40] or "a program"
            size = f": {int(row[2]) / 1024:.1f} GiB" if row[2].isdecimal() else ""
            found.setdefault(row[0], []).append(f"{program} ({row[1][:10]}){size}")
    return found


# --- where to look ---------------------------------------------------------------------------------------------------


def _smi() -> Path | None:
    name = "nvidia-smi.exe" if sys.platform == "win32" else "nvidia-smi"
    here = _resolved(Path())
    named = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if os.path.isabs(entry)]
    folders = [folder for folder in named if _resolved(folder) != here]
    folders += [ROOT / "usr/bin", ROOT / "usr/lib/wsl/lib"]
    if sys.platform == "win32":
        folders.append(Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32")
    places = (folder / name for folder in folders)
    return next((place for place in places if os.path.isfile(place) and os.access(place, os.X_OK)), None)


def _library() -> Path | None:
    if sys.platform == "win32":
        places = [Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvcuda.dll"]
    else:
        places = [ROOT / folder / _LIBRARY for folder in _LIBRARY_FOLDERS]
    return next((place for place in places if os.path.isfile(place)), None)


def _on_bus(maker: str) -> Iterator[int]:
    for device in _listed(ROOT / "sys/bus/pci/devices", "*"):
        if _text(device / "vendor").strip() == maker and _text(device / "class").strip()[:6] in _DISPLAYS:
            yield 1


def _tells_bus() -> bool:
    """Whether a card would be on the listed bus. WSL's is a device of Windows' (dev/dxg), Jetson's a part of the chip
    (dev/nvmap, L4T's memory manager); sandboxes list an empty bus.
    """
    if not sys.platform.startswith("linux") or is_wsl():
        return False
    if (ROOT / "dev/dxg").exists() or (ROOT / "dev/nvmap").exists():
        return False
    return bool(_listed(ROOT / "sys/bus/pci/devices", "*"))


def _listed(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))[:4096]
    except OSError:
        return []


def _text(file: Path) -> str:
    """A short file of the kernel's; "" where it cannot be read."""
    try:
        with files.open_to_read(file) as stream:
            return stream.read(4096).decode("utf-8", "replace")
    except (OSError, files.UnsafePathError):
        return ""


def _resolved(path: Path) -> Path | None:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return None


# --- asking ----------------------------------------------------------------------------------------------------------


def _ask_smi(smi: Path) -> Answer:
    text = ""
    for fields in (_FIELDS, [field for field in _FIELDS if field != "compute_cap"]):  # which came with driver 470
        query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        code, text = _output_of([str(smi), *query], SECONDS)
        if code is None:
            return Answer(failure=f"it did not answer within {SECONDS:.0f} s")
        cards = tuple(card for row in _rows(text) if (card := _card(dict(zip(fields, row, strict=False)), fields)))
        if cards:
            return Answer(cards[:MOST_CARDS])
        if "not a valid field" not in text:
            break
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[0][:160] if lines else "it said nothing"
    if not (said.isascii() and said.isprintable()):
        said = "what it said cannot be read"
    return Answer(failure=said, has_no_card="no devices were found" in text.lower())


def _rows(text: str) -> list[list[str]]:
    with suppress(csv.Error):
        return [[value.strip() for value in row] for row in csv.reader(text.splitlines()[:1024])]
    return []


def _card(row: dict[str, str], fields: Sequence[str]) -> Card | None:
    """A row of `nvidia-smi`, where it has the form of one: memory in MiB, `8.6` for a compute capability."""
    numbers = [row.get(name, "") for name in ("index", "memory.total", "memory.free")]
    if len(row) != len(fields) or not all(re.fullmatch(r"[0-9]{1,8}", number) for number in numbers):
        return None
    if not re.fullmatch(r"(GPU|MIG)-[0-9A-Za-z/-]{8,80}", row["uuid"]):
        return None
    if not re.fullmatch(r"[0-9]{2,4}(\.[0-9]{1,4}){1,3}", row["driver_version"]):
        return None
    index, total, free = map(int, numbers)
    capability = re.fullmatch(r"([0-9]{1,2})\.([0-9])", row.get("compute_cap", ""))
    return Card(
        index=index,
        uuid=row["uuid"],
        name=shown.one_line(row["name"])[:80],
        driver_version=row["driver_version"],
        total_bytes=total << 20,
        free_bytes=free << 20,
        capability=(int(capability[1]), int(capability[2])) if capability else None,
    )


def _ask_library() -> Answer:
    code, text = _output_of(child_process.command("qlora.nvidia_child"), SECONDS)
    if code is None:
        return Answer(failure=f"it did not answer within {SECONDS:.0f} s")
    answer = re.fullmatch(r"status ([0-9]{1,6}) cuda ([0-9]{1,6}) cards ([0-9]{1,4})", text.strip())
    if answer is None:
        return Answer(failure="its library cannot be loaded")
    status, cuda, cards = (int(number) for number in answer.groups())
    failure = f"CUDA error {status}" if status not in (0, NO_DEVICE) else ""
    return Answer(failure=failure, cuda=cuda or None, has_no_card=status == NO_DEVICE or (status == 0 and not cards))


def _output_of(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit code and the first of what a program writes; None and "" where it takes longer, and it is ended then.

    It has a session of its own, so that what it has started ends with it. One that hangs inside the kernel cannot be
    ended at all: it is left.
    """
    got: list[bytes] = []
    with child_process.life_line() as line:
        try:
            child = subprocess.Popen(
                command, stdin=line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:  # not a program for this machine
            return 1, str(error.strerror or error)
        assert child.stdout is not None
        reader = threading.Thread(target=lambda: got.append(child.stdout.read(MOST_BYTES)), daemon=True)  # type: ignore[union-attr]
        reader.start()
        reader.join(seconds)
        ended = not reader.is_alive()
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.2 if ended else 0)
        if child.poll() is None:
            with suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
            with suppress(subprocess.TimeoutExpired):
                child.wait(1.0)
    if not ended:
        return None, ""
    child.stdout.close()
    return child.returncode if child.returncode is not None else 1, b"".join(got).decode("utf-8", "replace")
