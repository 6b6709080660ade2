"""RAM, WSL and Windows, terminals."""

from __future__ import annotations

import pytest

from qlora.doctor import machine
from qlora.doctor.finding import Colour
from qlora.doctor.machine import SystemFacts, TerminalFacts

GIB = 2**30
WSL2 = SystemFacts("Linux", "6.6.87.2-microsoft-standard-WSL2", is_wsl=True)


@pytest.mark.parametrize(("available", "colour"), [(8, Colour.GREEN), (2, Colour.YELLOW), (0.5, Colour.RED)])
def test_ram(available: float, colour: Colour) -> None:
    found = machine.of_memory(int(available * GIB), 16 * GIB, 0)
    assert found.colour == colour and "of 16.0 GiB" in found.said


def test_this_machine_has_ram_and_a_system() -> None:
    assert machine.memory()[0].figures["total_bytes"] and machine.system()[0].said


def test_wsl_and_windows_have_their_notes() -> None:
    assert machine.of_system(SystemFacts("Linux", "6.8.0-41-generic"))[0].said == "Linux 6.8.0"
    assert ".wslconfig" in machine.of_system(WSL2)[0].said and machine.of_system(WSL2)[0].colour == Colour.GREEN
    old = machine.of_system(SystemFacts("Linux", "4.4.0-19041-Microsoft", is_wsl=True))
    assert old[0].colour == Colour.RED and "no GPU" in old[0].said
    slow = machine.of_system(SystemFacts("Linux", WSL2.release, is_wsl=True, on_windows_disk=True))
    assert [one.colour for one in slow] == [Colour.GREEN, Colour.YELLOW]
    short = machine.of_system(SystemFacts("Windows", "11", has_long_paths=False))
    assert short[0].colour == Colour.YELLOW and "LongPathsEnabled" in short[0].mend


@pytest.mark.parametrize(
    ("facts", "colour", "said"),
    [
        (TerminalFacts(True, 120, "truecolor", "utf-8"), Colour.GREEN, "120 columns"),
        (TerminalFacts(True, 40, None, "UTF8"), Colour.YELLOW, "tables are cut"),
        (TerminalFacts(True, 120, "256", "ascii"), Colour.YELLOW, "in ASCII"),
        (TerminalFacts(False, 80, None, "utf-8"), Colour.GREEN, "plain lines"),
    ],
)
def test_terminals(facts: TerminalFacts, colour: Colour, said: str) -> None:
    found = machine.terminal(facts)
    assert found.colour == colour and said in found.said
