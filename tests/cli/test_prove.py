"""`python -m qlora.prove`: what it answers, writes and leaves, and its exit codes."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from qlora.cli import prove
from qlora.prove import suite
from qlora.prove.proof import Outcome, Proof
from tests.cli.cases import expect_two_lines, run
from tests.floors import ROOT

HONEST = suite.run_all


def ask(monkeypatch: pytest.MonkeyPatch, *outcomes: Outcome, arguments: tuple[str, ...] = ()) -> Any:
    proofs = tuple(Proof(f"p{n}", "promise", "0", "s", lambda _, one=one: one) for n, one in enumerate(outcomes))  # type: ignore[misc]

    monkeypatch.setattr(suite, "run_all", lambda place, begin: HONEST(place, proofs, begin))
    return CliRunner().invoke(prove.app, ["--device", "cpu", *arguments])


def test_all_as_promised_is_0_and_else_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "found.json"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    good = ask(monkeypatch, Outcome(True, "yes"), Outcome(None, "no card"), arguments=("--json", str(file)))
    assert good.exit_code == 0, good.output
    assert json.loads(file.read_text())["outcomes"] == {"held": 1, "broken": 0, "not here": 1}
    bad = ask(monkeypatch, Outcome(True, "yes"), Outcome(False, "no"), arguments=("--json", str(file)))
    assert bad.exit_code == 4 and "not as promised on cpu: p1" in bad.stderr
    assert json.loads(file.read_text())["outcomes"]["broken"] == 1


def test_what_can_be_mended_is_2(tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--json", str(tmp_path / "no" / "such" / "f.json"))
    expect_two_lines(run("--device", "gpu", cwd=tmp_path, module="prove"), "not one of 'cpu', 'cuda'")
    expect_two_lines(run(*arguments, cwd=tmp_path, module="prove"), "no such folder")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.json", '{"mine": 1}', "holds no proofs of ours"),
        ("notes.txt", "my notes", "holds no proofs of ours"),
        ("f" * 300 + ".json", None, "File name too long"),
        ("", None, "holds no proofs of ours"),  # a folder
    ],
)
def test_a_file_of_somebody_else_is_not_written_over_nor_work_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, said: str
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    if content is not None:
        (folder / name).write_text(content)
    begun: list[str] = []
    monkeypatch.setattr(suite, "run_all", lambda place, begin: begun.append("proofs"))
    found = CliRunner().invoke(prove.app, ["--device", "cpu", "--json", str(folder / name)])
    assert found.exit_code == 2 and said in found.stderr and not begun
    assert [file.read_text() for file in folder.iterdir()] == ([] if content is None else [content])


def test_the_command_is_one() -> None:
    assert isinstance(prove.app, typer.Typer)


@pytest.mark.slow
def test_this_machine_is_as_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it, once: every proof, in a process of its own; and nothing is left but the file."""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it in a worker that has compiled
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "qlora.prove", "--device", "cpu", "--model", "mini", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    text = file.read_text()
    found = json.loads(text)
    assert {proof["name"] for proof in found["proofs"]} == {proof.name for proof in suite.PROOFS}
    assert found["outcomes"]["broken"] == 0 and found["outcomes"]["held"] >= 11
    for name in (str(Path.home()), getpass.getuser(), platform.node(), str(tmp_path), str(ROOT)):
        assert name not in text, name
    assert not any(scratch.iterdir()) and not (tmp_path / "cache").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"tmp", "found.json"}
