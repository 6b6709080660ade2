"""What the system says of its cards: signs in its files, an `nvidia-smi` that answers, lies, hangs or is foreign."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from qlora import nvidia, wsl
from qlora.nvidia import Signs

ROW = "0, GPU-5b1f3e2a-0c4d-11ee-be56-0242ac120002, 535.183.01, 24576, 24000, 8.6, NVIDIA GeForce RTX 3090"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="stands in for the driver with shell scripts")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty file system whose PATH is its folder bin/."""
    monkeypatch.setattr(nvidia, "ROOT", tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def smi(system: Path, script: str, folder: str = "bin") -> Path:
    file = system / folder / "nvidia-smi"
    write(file, f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def prints(text: str) -> str:
    return f"/bin/cat <<'EOF'\n{text}\nEOF"


def test_a_system_without_nvidia_has_no_sign_and_starts_nothing(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(system / "sys/bus/pci/devices/0000:00:02.0/vendor", "0x8086\n")
    write(system / "sys/bus/pci/devices/0000:00:02.0/class", "0x030000\n")
    monkeypatch.setattr(nvidia.subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    assert nvidia.signs() == Signs(None, None, False, 0, tells_bus=True) and not nvidia.signs().of_a_card


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("proc/driver/nvidia/version", "NVRM version: 535"),
        ("dev/nvidiactl", ""),
        ("usr/lib/wsl/lib/libcuda.so.1", ""),
        ("usr/lib/x86_64-linux-gnu/libcuda.so.1", ""),
        ("sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n"),
        ("sys/bus/pci/devices/0000:01:00.0/class", "0x030200\n"),
    ],
)
def test_each_sign_is_seen(file: str, text: str, system: Path) -> None:
    write(system / file, text)
    write(system / "sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
    assert nvidia.signs().of_a_card


def test_nvidias_sound_device_is_no_card(system: Path) -> None:
    write(system / "sys/bus/pci/devices/0000:01:00.1/vendor", "0x10de\n")
    write(system / "sys/bus/pci/devices/0000:01:00.1/class", "0x040300\n")
    assert not nvidia.signs().of_a_card


def test_a_program_of_the_current_folder_is_not_the_drivers(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(system, "touch ran", folder="here")
    monkeypatch.chdir(system / "here")
    for path in ("", ".", f":{system / 'bin'}", f"{system / 'here'}:{system / 'bin'}", "../here"):
        monkeypatch.setenv("PATH", path)
        assert nvidia.signs().smi is None, path
    found = smi(system, prints(ROW))
    monkeypatch.setenv("PATH", f"{system / 'here'}:{system / 'bin'}")
    assert nvidia.signs().smi == found


def test_cards_are_read(system: Path) -> None:
    smi(system, prints(f"{ROW}\n{ROW.replace('0, GPU-5', '1, GPU-6').replace('24000', '512')}"))
    first, second = nvidia.ask(nvidia.signs()).cards
    assert (first.index, first.name, first.driver) == (0, "NVIDIA GeForce RTX 3090", (535, 183, 1))
    assert (first.total_bytes, first.free_bytes, first.capability) == (24576 << 20, 24000 << 20, (8, 6))
    assert second.index == 1 and second.free_bytes == 512 << 20


def test_an_old_driver_knows_no_compute_capability(system: Path) -> None:
    old = ROW.replace("8.6, ", "").replace("535.183.01", "460.91.03")
    says = prints('Field "compute_cap" is not a valid field to query.')
    smi(system, f'case "$1" in *compute_cap*) {says}\nexit 2;; *) {prints(old)}\n;; esac')
    (card,) = nvidia.ask(nvidia.signs()).cards
    assert card.capability is None and card.driver == (460, 91, 3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x1b[31mred",
        "0, GPU-5b1f3e2a-0c4d, 535.183.01, 24576",
        ROW.replace("24576", "[N/A]"),
        ROW.replace("GPU-", "../"),
        ROW.replace("535.183.01", "newest"),
        ROW.replace("24000", "9" * 30),
        ROW.replace("0, GPU", "-1, GPU"),
        "²" + ROW,
    ],
)
def test_what_has_not_the_form_of_a_card_is_none(text: str, system: Path) -> None:
    smi(system, prints(text))
    answer = nvidia.ask(nvidia.signs())
    assert not answer.cards and answer.failure and "\x1b" not in answer.failure and len(answer.failure) <= 160


def test_its_own_words_are_kept_and_no_devices_means_none(system: Path) -> None:
    smi(system, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert "version mismatch" in nvidia.ask(nvidia.signs()).failure
    smi(system, "echo 'No devices were found'; exit 6")
    assert nvidia.ask(nvidia.signs()).has_no_card


@pytest.mark.parametrize("script", ["sleep 600", "sleep 600 & wait", "trap '' TERM; while :; do :; done"])
def test_one_that_hangs_is_ended_with_what_it_started(
    script: str, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "SECONDS", 0.3)
    monkeypatch.setenv("PATH", f"{system / 'bin'}:{os.defpath}")
    smi(system, f"echo $$ > {system / 'pid'}; {script}")
    assert "did not answer" in nvidia.ask(nvidia.signs()).failure
    group = int((system / "pid").read_text())
    for _ in range(100):
        if not any(runs_in(group, process) for process in psutil.process_iter()):
            return
        time.sleep(0.02)
    pytest.fail("it is still there")


def runs_in(group: int, process: psutil.Process) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def test_one_that_never_stops_writing_is_cut(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "SECONDS", 5.0)
    smi(system, "while :; do echo 0, GPU-, 535.1; done")
    assert nvidia.ask(nvidia.signs()).failure


@pytest.mark.parametrize(
    ("more", "release", "proves"),
    [
        ({}, "6.8.0-45-generic", True),
        ({"dev/nvidiactl": ""}, "6.8.0-45-generic", False),
        ({"sys/bus/pci/devices/1/vendor": "0x10de\n", "sys/bus/pci/devices/1/class": "0x030200\n"}, "6.8.0", False),
        ({}, "5.15.167.4-microsoft-standard-WSL2", False),
        ({"dev/dxg": ""}, "6.8.0-45-generic", False),
        ({"dev/nvmap": ""}, "5.15.148-tegra", False),
        (None, "4.4.0", False),
    ],
)
def test_a_bus_without_a_card_proves_that_there_is_none(
    more: dict[str, str] | None, release: str, proves: bool, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not under WSL, on a Jetson, in a sandbox that lists no bus, nor where a driver is loaded."""
    monkeypatch.setattr(wsl.platform, "release", lambda: release)
    monkeypatch.setattr(nvidia.sys, "platform", "linux")
    smi(system, "exit 9")
    if more is not None:
        write(system / "sys/bus/pci/devices/0/vendor", "0x8086\n")
        for file, text in more.items():
            write(system / file, text)
    assert nvidia.signs().of_a_card and nvidia.signs().proves_none is proves


def test_who_holds_memory_is_named_by_program_and_not_by_path(system: Path) -> None:
    uuid = "GPU-5b1f3e2a-0c4d-11ee-be56-0242ac120002"
    rows = f"{uuid}, 1234, 20580, /home/anna/secret,project/bin/python\n{uuid}, 99, [N/A], Xorg\n{uuid}, x, 1, y"
    found = nvidia.holders(smi(system, prints(rows)))
    assert found == {uuid: ["python (1234): 20.1 GiB", "Xorg (99)"]}


@pytest.mark.parametrize(
    ("said", "has_no_card", "failure", "cuda"),
    [
        ("status 0 cuda 12040 cards 1", False, "", 12040),
        ("status 100 cuda 12040 cards 0", True, "", 12040),
        ("status 999 cuda 0 cards 0", False, "CUDA error 999", None),
        ("Segmentation fault", False, "its library cannot be loaded", None),
    ],
)
def test_without_the_program_the_drivers_library_is_asked(
    said: str, has_no_card: bool, failure: str, cuda: int | None, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(system / "usr/lib64/libcuda.so.1", "")
    monkeypatch.setattr(nvidia, "_output_of", lambda command, seconds: (0, said))
    answer = nvidia.ask(nvidia.signs())
    assert (answer.has_no_card, answer.failure, answer.cuda, answer.cards) == (has_no_card, failure, cuda, ())


def test_the_drivers_list_counts_the_cards(system: Path) -> None:
    assert nvidia.listed_by_driver() is None
    for place in ("0000:01:00.0", "0000:02:00.0"):
        (system / "proc/driver/nvidia/gpus" / place).mkdir(parents=True)
    assert nvidia.listed_by_driver() == 2


@pytest.mark.parametrize(("nbytes", "counts"), [(512 << 20, False), (16 << 30, True)])
def test_a_processors_own_graphics_are_no_amd_card(nbytes: int, counts: bool, system: Path) -> None:
    bank = system / "sys/class/kfd/kfd/topology/nodes/1/mem_banks/0/properties"
    write(bank, f"heap_type 1\nsize_in_bytes {nbytes}\nflags 0\n")
    assert nvidia.amd_on_bus() is counts
