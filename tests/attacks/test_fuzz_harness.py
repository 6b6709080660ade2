"""The harness sees each kind of finding, and goes on with the next input; what is no finding is none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from qlora.errors import DataError, DoesNotFit, Problem, QloraError, RecipeError
from tests.attacks.fuzz import here_door, nasty, seen
from tests.attacks.fuzz.harness import Door, Fuzzer, Item, Outcome, Scene
from tests.attacks.fuzz.seen import Command, Work


def raising(error: BaseException) -> Callable[[Scene], Work]:
    def work() -> None:
        raise error

    return lambda scene: work


def eats(scene: Scene) -> Work:
    return lambda: bytearray(b"x") * (1200 << 20)


def changes(scene: Scene) -> Work:
    return lambda: scene.bystander.write_text("gone")


def deletes(scene: Scene) -> Work:
    return lambda: scene.bystander.unlink()


def adds(scene: Scene) -> Work:
    return lambda: (scene.bystander.parent / "new").touch()


FINDINGS: dict[str, tuple[Callable[[Scene], Work], str]] = {
    "hangs": (lambda scene: lambda: time.sleep(60), "took over 1 s"),
    "computes without end": (lambda scene: lambda: all(iter(lambda: True, None)), "took over 1 s"),
    "waits for a pipe": (lambda scene: lambda: scene.pipe().open().close(), "took over 1 s"),
    "eats 1.2 GiB": (eats, "grew by 1.2 GiB"),
    "eats all there is": (lambda scene: lambda: bytearray(1 << 36), "MemoryError"),
    "raises": (raising(KeyError("key")), "KeyError: 'key'"),
    "raises what is no Exception": (raising(GeneratorExit()), "GeneratorExit"),
    "is refused by the system": (raising(PermissionError(13, "no", "file")), "PermissionError"),
    "leaves": (raising(SystemExit(2)), "SystemExit"),
    "a command that leaves with 1": (lambda scene: Command(lambda: 1), "exit code 1"),
    "nests": (lambda scene: lambda: nests(), "RecursionError"),
    "leaves a marker": (lambda scene: lambda: scene.marker.touch(), "a marker was left"),
    "changes a file of the user's": (changes, "a bystander's file was changed"),
    "deletes a file of the user's": (deletes, "a bystander's file was changed"),
    "puts a file beside them": (adds, "a bystander's file was changed"),
    "prints an escape": (lambda scene: lambda: print("\x1b[2J"), "control characters on the screen: ['0x1b']"),
    "prints one of one byte": (lambda scene: lambda: print("\x9b31m", file=sys.stderr), "['0x9b']"),
    "has no hint": (raising(DataError("what", " ")), "a message of"),
    "has too long a message": (raising(RecipeError([Problem("file", "x" * 2000, "hint")])), "a message of 2000"),
    "has two lines": (raising(RecipeError([Problem("file", "one\ntwo", "hint")])), "and 2 lines"),
    "has no exit code of ours": (raising(type("Odd", (QloraError,), {"exit_code": 5})("what", "hint")), "exit code 5"),
    "is killed": (lambda scene: lambda: os.kill(os.getpid(), signal.SIGKILL), "the process died (exit code -9)"),
    "ends the process": (lambda scene: lambda: os._exit(0), "the process died (exit code 0)"),
    "cannot be made": (lambda scene: Path("/nowhere").read_text(), "the door itself failed"),  # type: ignore[return-value,dict-item]
}
HARMLESS: dict[str, tuple[Callable[[Scene], Work], int]] = {
    "nothing": (lambda scene: lambda: None, 0),
    "refused": (raising(DataError("rows.jsonl:1: \x1b[2J", "hint")), 2),
    "does not fit": (raising(DoesNotFit("what", "hint")), 3),
    "several problems": (raising(RecipeError([Problem("file", "what", "hint")] * 3)), 2),
    "a command that ended": (lambda scene: Command(lambda: 2), 2),
    "takes 300 MiB": (lambda scene: lambda: bytearray(b"x") * (300 << 20), 0),
    "writes in its own place": (lambda scene: lambda: (scene.place / "x").touch(), 0),
}


def nests() -> None:
    nests()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All of them one after the other, in children that go on after each finding."""
    place = tmp_path_factory.mktemp("fuzz")
    makes = {name: make for name, (make, _) in {**FINDINGS, **HARMLESS}.items()}
    doors = {
        name: Door(name, lambda scene: lambda: None, seconds) for name, seconds in (("hasty", 1.0), ("calm", 60.0))
    }
    fuzzer = Fuzzer(doors, None, place / "scratch", place / "documents", named=dict.fromkeys(doors, makes))
    wanted: list[Item] = [
        ("hasty" if "took over" in FINDINGS.get(name, ("", ""))[1] else "calm", name) for name in makes
    ]
    found = {str(outcome.index): outcome for outcome in fuzzer.run(wanted, 1)}
    assert len(found) == len(makes)
    return found


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_is_seen(outcomes: dict[str, Outcome], name: str) -> None:
    assert FINDINGS[name][1] in outcomes[name].fault


def test_where_a_child_hung_is_told(outcomes: dict[str, Outcome]) -> None:
    assert "test_fuzz_harness.py" in outcomes["hangs"].detail


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_none_is_none(outcomes: dict[str, Outcome], name: str) -> None:
    assert (outcomes[name].fault, outcomes[name].code) == ("", HARMLESS[name][1])


def test_an_input_is_a_function_of_door_seed_and_index(tmp_path: Path) -> None:
    def drawn(seed: int, index: int) -> list[object]:
        scene = Fuzzer({}, None, tmp_path / "scratch", tmp_path / "documents", seed).scene("door", index)
        return [repr(nasty.value(scene.chance, [1, 2], scene.paths)) for _ in range(20)]

    here = Path.cwd()
    try:
        assert drawn(1, 7) == drawn(1, 7) != drawn(1, 8)
        assert drawn(1, 7) != drawn(2, 7)
    finally:
        os.chdir(here)


def test_a_trap_is_one(tmp_path: Path) -> None:
    """A program that looks for modules in the current folder leaves the marker, one that does not leaves none."""
    scene = Scene(tmp_path, None, Random(1), tmp_path / "bystander", tmp_path / "marker")
    for package in (False, True):
        here_door.trap(scene, "colorsys", package)
        for flags, caught in (("-P", False), ("-s", True)):
            subprocess.run(
                [sys.executable, flags, "-c", "import colorsys"], cwd=tmp_path, capture_output=True, check=False
            )
            assert scene.marker.exists() is caught
        scene.marker.unlink()
        (tmp_path / "colorsys.py").unlink(missing_ok=True)


def test_what_terminals_obey() -> None:
    for text in nasty.ESCAPES:
        assert seen.control_characters(text) or "\n" in text
    assert not seen.control_characters("é 🌧 [x]\n\t")
