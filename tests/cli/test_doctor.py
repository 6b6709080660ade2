"""`qlora-doctor` as a user runs it: lines and exit codes, a broken torch, an old driver, caches, proofs."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qlora import nvidia, torch_build
from qlora.cli import doctor, prove
from qlora.doctor import checkup
from qlora.doctor.finding import Finding, green, red, yellow
from qlora.prove import suite
from qlora.prove.proof import Outcome, Proof
from qlora.torch_build import TorchBuild
from tests.cli.cases import expect_two_lines, run
from tests.doctor.cases import KEY, package, published
from tests.floors import ROOT

ROW = "0, GPU-5b1f3e2a-0c4d-11ee-be56-0242ac120002, 470.42.01, 24576, 24000, 8.6, NVIDIA GeForce RTX 3090"
posix = pytest.mark.skipif(sys.platform == "win32", reason="stands in for the driver with a shell script")


def ask(*arguments: str, answer: str | None = None) -> Any:
    return CliRunner().invoke(doctor.app, list(arguments), input=answer)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Finding]:
    """What the checks are made to find."""
    lines: list[Finding] = [green("RAM", "7 GiB", "on /home/maria")]
    monkeypatch.setattr(checkup, "findings", lambda *_: iter(lines))
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return lines


def test_warnings_are_0_and_errors_are_2(found: list[Finding]) -> None:
    found.append(yellow("hub", "not reached", "check the network"))
    good = ask()
    assert good.exit_code == 0 and "1 ok, 1 warning: training works here" in good.stdout
    found.append(red("disk: runs", "is full", "make room: `caches`"))
    bad = ask()
    assert bad.exit_code == 2 and "> make room: --caches" in bad.stdout and "(on /home/maria)" in bad.stdout


def test_json_is_one_line_without_what_is_private(found: list[Finding]) -> None:
    found.append(red("torch", "broken", "pip install torch"))
    answer = ask("--json")
    value = json.loads(answer.stdout)
    assert answer.exit_code == 2 and value["worst"] == "red" and "maria" not in answer.stdout
    assert [one["name"] for one in value["checks"]] == ["RAM", "torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cpu"), "belong to --prove"),
        (("--yes",), "belongs to --clear"),
        (("--prove", "--caches"), "two things"),
        (("--clear", "everything"), "not one of"),
        (("--runs", "~nobody-of-that-name/x"), "no such home"),
        (("here",), "unexpected extra argument"),
    ],
)
def test_what_does_not_fit_together_is_two_lines(arguments: tuple[str, ...], message: str) -> None:
    answer = ask(*arguments)
    expect_two_lines((answer.exit_code, answer.stdout, answer.stderr, 0.0), message)


@posix
def test_an_old_driver_is_found_and_who_holds_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program that answers as the driver's does, without torch."""
    smi = tmp_path / "nvidia-smi"
    holder = "GPU-5b1f3e2a-0c4d-11ee-be56-0242ac120002, 77, 2048, /usr/bin/blender"
    smi.write_text(f'#!/bin/sh\ncase "$1" in *compute-apps*) echo "{holder}";; *) echo "{ROW}";; esac\n')
    smi.chmod(0o755)
    monkeypatch.setattr(nvidia, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch_build, "installed", lambda: TorchBuild("2.13.0+cu130", cuda="13.0"))
    facts = doctor.card_facts()
    assert facts.too_old is not None and "470.42.01" in facts.too_old[0] and "580" in facts.too_old[1]
    assert list(facts.held.values()) == [["blender (77): 2.0 GiB"]] and facts.is_there


@posix
def test_a_torch_that_crashes_is_a_red_line_and_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command, in a process of its own, with everything else as it is here."""
    package(tmp_path / "site", "torch", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "site" / "torch" / "version.py").write_text("__version__ = '2.13.0+cu130'\ncuda = '13.0'\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(ROOT)]))
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("USER", "maria.rossi")
    code, out, error, _ = run("--json", cwd=tmp_path, module="doctor")
    assert code == 2 and error.startswith("error: not well: torch"), error
    checks = {one["name"]: one for one in json.loads(out)["checks"]}
    assert checks["torch"]["colour"] == "red" and "SIGSEGV" in checks["torch"]["said"]
    assert 'pip install --force-reinstall --no-cache-dir "torch' in checks["torch"]["mend"]
    assert checks["NF4"]["colour"] == "yellow" and "mend what is said of torch" in checks["NF4"]["mend"]
    assert checks["disk: runs"]["figures"]["free_bytes"] and checks["hub"]["said"].startswith("HF_HUB_OFFLINE")
    for word in (str(tmp_path), str(Path.home()), getpass.getuser(), platform.node(), "maria.rossi"):
        assert word not in out, word
    assert {path.name for path in tmp_path.iterdir()} == {"site"}


@posix
def test_a_disk_on_which_nothing_can_be_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a limit of no byte a file, which the child has too; with that, Python finds no folder for temporary files."""
    package(tmp_path / "site", "torch", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(ROOT)]))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    here = tmp_path / "here"
    here.mkdir()
    command = f"cd {here}; rmdir {here}; ulimit -f 0; {sys.executable} -m qlora.cli.doctor --json | cat"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    checks = {one["name"]: one for one in json.loads(done.stdout)["checks"]}
    assert checks["disk: runs"]["colour"] == checks["disk: temporary"]["colour"] == "red", done.stderr
    assert "gone" in checks["disk: runs"]["said"] and "ulimit -f" in checks["disk: temporary"]["mend"]
    assert checks["torch"]["colour"] == "red" and checks["terminal"]["colour"] == "green"


@pytest.mark.slow
def test_this_machine_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, error, _ = run(cwd=tmp_path, module="doctor")
    assert code == 0, out + error
    for name in ("libraries", "bf16", "NF4", "paged memory", "locked memory", "llama.cpp"):
        assert f"ok      {name} " in out, out
    assert not list(tmp_path.iterdir())


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield published(tmp_path / "cache" / "tokens" / KEY, "tokens")


def test_caches_are_listed_and_nothing_is_touched(tokens: Path) -> None:
    answer = ask("--caches")
    assert answer.exit_code == 0 and KEY in answer.stdout and tokens.is_dir()
    value = json.loads(ask("--caches", "--json").stdout)
    assert {one["kind"] for one in value["entries"]} >= {"tokens"} and tokens.is_dir()


def test_clearing_is_agreed_to_first(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = ask("--clear", "tokens")
    assert nobody.exit_code == 2 and "nobody can be asked" in nobody.stderr and tokens.is_dir()
    monkeypatch.setattr(doctor, "is_answered", lambda: True)
    no = ask("--clear", "tokens", answer="no\n")
    assert no.exit_code == 2 and "nothing was removed" in no.stderr and tokens.is_dir()
    yes = ask("--clear", "tokens", answer="y\n")
    assert yes.exit_code == 0 and "removed 1 (" in yes.stdout and not tokens.exists()


def test_only_what_was_named_goes(tokens: Path) -> None:
    assert ask("--clear", "reports", "--yes").exit_code == 0 and tokens.is_dir()
    assert ask("--clear", "all", "--yes").exit_code == 0 and not tokens.exists()


# --- proofs ----------------------------------------------------------------------------------------------------------


def test_proofs_are_shown_written_and_kept_for_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    measured = {"1 x 2: predicted_tensor_bytes": 100, "1 x 2: measured_tensor_bytes": 101}
    outcomes = [Outcome(True, "yes", measured)]
    honest = suite.run_all

    def run_all(place: Any, begin: Any) -> Any:
        return honest(place, [Proof("memory", "promise", "0", "s", lambda _: outcomes[0])], begin)

    monkeypatch.setattr(suite, "run_all", run_all)
    file = tmp_path / "found.json"
    answer = ask("--prove", "--device", "cpu", "--out", str(file))
    assert answer.exit_code == 0, answer.output
    assert json.loads(file.read_text())["outcomes"]["held"] == 1 and "estimates for this card" in answer.stdout
    assert len(list((tmp_path / "cache" / "proofs").iterdir())) == 1
    outcomes[0] = Outcome(False, "no")
    broken = ask("--prove", "--device", "cpu", "--json")
    assert broken.exit_code == 4 and "not as promised" in broken.stderr
    assert json.loads(broken.stdout)["outcomes"]["broken"] == 1


def test_nothing_is_proved_with_a_broken_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(prove, "prove_here", broken)
    answer = ask("--prove")
    assert answer.exit_code == 2 and "libcudart.so.13" in answer.stderr and "without --prove" in answer.stderr
