"""The machine and the terminal: RAM, what Windows and WSL do differently, what a screen can draw."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from qlora import device
from qlora.doctor.finding import Figure, Finding, green, red, yellow
from qlora.units import GIB
from qlora.wsl import is_wsl

# A process that trains takes 0.6 GiB on a CPU and 2 GiB beside a GPU before its tensors (memory/overheads.py).
LEAST_RAM_BYTES, USUAL_RAM_BYTES = 1 * GIB, 4 * GIB
LEAST_COLUMNS = 60  # the narrowest that tables are drawn for


def memory() -> list[Finding]:
    import psutil

    swap = int(psutil.swap_memory().total)
    return [of_memory(device.available_ram(), int(psutil.virtual_memory().total), swap)]


def of_memory(available: int, total: int, swap: int) -> Finding:
    """The line of the RAM; `available` is what a new process can have, by the system or by its control group."""
    said = f"{available / GIB:.1f} of {total / GIB:.1f} GiB are available, {swap / GIB:.1f} GiB of swap"
    figures: dict[str, Figure] = {"available_bytes": available, "total_bytes": total, "swap_bytes": swap}
    if available < LEAST_RAM_BYTES:
        return red("RAM", said, "end other programs, or raise the container's limit of memory", figures=figures)
    if available < USUAL_RAM_BYTES:
        return yellow("RAM", said, "end other programs before a long run", figures=figures)
    return green("RAM", said, figures=figures)


@dataclass(frozen=True)
class SystemFacts:
    """`release` is the kernel's. `on_windows_disk`: the current folder is one of Windows', seen from WSL."""

    system: str
    release: str
    is_wsl: bool = False
    on_windows_disk: bool = False
    has_long_paths: bool = True


def system() -> list[Finding]:
    try:
        here = str(Path.cwd())
    except OSError:  # it has been removed
        here = ""
    wsl = is_wsl()
    on_windows = wsl and here.startswith("/mnt/") and len(here.split("/")[2]) == 1
    facts = SystemFacts(platform.system(), platform.release(), wsl, on_windows, _has_long_paths())
    return of_system(facts)


def _has_long_paths() -> bool:
    """Whether Windows lets a path have more than 260 characters: a value of its registry. True elsewhere."""
    if sys.platform != "win32":
        return True
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key:
            return bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
    except OSError:
        return False


def of_system(facts: SystemFacts) -> list[Finding]:
    name = f"{facts.system} {facts.release.partition('-')[0]}"
    if facts.is_wsl:
        found = [_of_wsl(facts, name)]
        if facts.on_windows_disk:
            said = "this folder is on a disk of Windows', which Linux reads many times slower than its own"
            found.append(yellow("folder", said, "move the project into Linux' own file system (~)"))
        return found
    if not facts.has_long_paths:
        said = f"{name}: paths of more than 260 characters fail, and names of the hub's files are long"
        mend = "set LongPathsEnabled (https://learn.microsoft.com/windows/win32/fileio/maximum-file-path-limitation)"
        return [yellow("system", said, mend)]
    return [green("system", name)]


def _of_wsl(facts: SystemFacts, name: str) -> Finding:
    """WSL 1 has Windows' own kernel behind it, of version 4.4 in name, and no GPU."""
    if facts.release.startswith("4.4.0") and "wsl2" not in facts.release.lower():
        return red(
            "system",
            f"{name} under WSL 1, which has no GPU",
            "wsl.exe with set-version: https://learn.microsoft.com/windows/wsl/install",
        )
    said = f"{name} under WSL 2: half of Windows' RAM unless .wslconfig says more, and the driver is Windows' own"
    return green("system", said)


@dataclass(frozen=True)
class TerminalFacts:
    """What rich found of stdout: `colours` is its name for them ("truecolor"), None without any."""

    is_terminal: bool
    columns: int
    colours: str | None
    encoding: str


def terminal(facts: TerminalFacts) -> Finding:
    """The line of the screen; a pipe or a file gets plain lines, and is no fault."""
    said = f"{facts.columns} columns, {facts.colours or 'no colours'}, {facts.encoding}"
    if facts.encoding.lower().replace("-", "").replace("_", "") not in ("utf8", "utf16", "cp65001"):
        mend = "export LANG=C.UTF-8" if os.name != "nt" else "set PYTHONUTF8=1"
        return yellow("terminal", f"{said}: bars and lines are drawn in ASCII", mend)
    if not facts.is_terminal:
        return green("terminal", f"none: the output goes to a pipe or a file, as plain lines ({facts.encoding})")
    if facts.columns < LEAST_COLUMNS:
        return yellow("terminal", f"{said}: tables are cut", f"make it {LEAST_COLUMNS} columns wide or more")
    return green("terminal", said)
