"""All checks together: in order, each alone with its faults and bounded in time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qlora import hub
from qlora.doctor import checkup, machine, places, requirements
from qlora.doctor.card import CardFacts
from qlora.doctor.checkup import bounded
from qlora.doctor.finding import Check, Colour, Finding, green
from qlora.doctor.machine import TerminalFacts
from qlora.doctor.trial import Trial
from qlora.errors import UserError
from qlora.hub import Reach
from tests.doctor.cases import only, trials

SCREEN = TerminalFacts(True, 120, "truecolor", "utf-8")


def fails(error: BaseException) -> Check:
    def run() -> Sequence[Finding]:
        raise error

    return Check("disks", 5, run)


@pytest.mark.parametrize(
    ("error", "said", "mend"),
    [
        (UserError("no home", "set HOME"), "no home", "set HOME"),
        (
            ModuleNotFoundError("No module named 'psutil'", name="psutil"),
            "psutil is not installed",
            "pip install psutil",
        ),
        (ZeroDivisionError("oh"), "the check failed (ZeroDivisionError: oh)", "see what it names"),
        (MemoryError(), "the check failed (MemoryError", "see what it names"),
    ],
)
def test_a_check_that_breaks_is_one_red_line(error: BaseException, said: str, mend: str) -> None:
    (found,) = bounded(fails(error))
    assert found.colour == Colour.RED and said in found.said and found.mend == mend


def test_a_check_that_hangs_is_left_behind() -> None:
    over = threading.Event()
    (found,) = bounded(Check("disks", 0.05, lambda: over.wait(30) and ()))
    over.set()
    assert found.colour == Colour.YELLOW and "did not answer" in found.said


def test_what_is_found_steers_no_terminal() -> None:
    (found,) = bounded(Check("GPU", 5, lambda: [green("GPU", "RTX\x1b[2J", "a\nb")]))
    assert "\x1b" not in found.said and "\n" not in found.here


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This machine without its card, libraries, disks and network."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkup, "attempt", lambda module, stages, begin: trials().values())
    monkeypatch.setattr(places, "written", lambda folder: 1e9)
    monkeypatch.setattr(hub, "reach", lambda seconds: Reach(True, token="sent", status=200))
    return tmp_path


def ask(folder: Path, **facts: object) -> list[Finding]:
    return list(checkup.findings(lambda: CardFacts(), "none", SCREEN, folder / "runs"))


def test_every_subject_has_a_line(here: Path) -> None:
    names = [one.name for one in ask(here)]
    assert names[:2] == ["Python", "packages"] and names[-1] == "terminal"
    subjects = ("RAM", "GPU", "libraries", "bf16", "bitsandbytes", "NF4", "paged memory", "locked memory", "llama.cpp")
    assert {*subjects, "system", "hub", "disk: runs", "disk: tokens", "disk: hub", "disk: temporary"} <= set(names)


def test_one_that_breaks_ends_no_other(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(machine, "memory", breaks)
    monkeypatch.setattr(hub, "cache_folder", breaks)
    monkeypatch.setattr(hub, "reach", breaks)
    dead = {**trials(), "device": Trial("device", failure="it crashed (SIGSEGV)")}
    monkeypatch.setattr(checkup, "attempt", lambda module, stages, begin: dead.values())
    found = list(checkup.findings(breaks, "none", SCREEN, here / "runs"))  # type: ignore[arg-type]
    assert {one.name for one in found if one.colour == Colour.RED} == {"RAM", "driver", "device", "hub"}
    assert only(found, "disk: runs") and only(found, "terminal")


def test_metadata_and_processes_that_fail_end_no_other(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> Iterator[Trial]:
        yield trials()["torch"]
        raise OSError(24, "Too many open files")

    def unreadable() -> None:
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "METADATA")

    monkeypatch.setattr(checkup, "attempt", none)
    monkeypatch.setattr(requirements, "read", unreadable)
    found = ask(here)
    assert [one.colour for one in found if one.name == "packages"] == [Colour.RED, Colour.YELLOW]
    assert "Too many open files" in only(found, "peft").said and only(found, "disk: runs")


def test_a_cache_without_a_place_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", "~nobody-of-that-name/x")
    assert only(ask(here), "disks").colour == Colour.RED
