"""`qlora-exam`: what it prints, and what it refuses in two lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.cli.exam import app
from qlora.events import Examined
from tests.report.cases import FIGURES


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of `examine`, which answers without a model."""
    calls: list[dict[str, Any]] = []

    def examine(run: Path, **asked: Any) -> dict[str, Any]:
        asked["sink"].emit(Examined(FIGURES))
        calls.append({"run": run, **asked})
        return FIGURES

    monkeypatch.setattr("qlora.examine.examine", examine)
    return calls


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        app(list(arguments))
    return int(end.value.code or 0)


def test_figures_are_drawn_or_printed_as_json(
    answered: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("runs/manuals", "--questions", "ours.csv", "--of", "export/hf") == 0
    assert "tuned + best 3 passages" in capfd.readouterr().out
    assert (answered[0]["questions"], answered[0]["of"]) == (Path("ours.csv"), Path("export/hf"))
    assert run("runs/manuals", "--json") == 0
    assert json.loads(capfd.readouterr().out) == FIGURES


def test_what_is_no_run_is_two_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "nothing")) == 2
    said = capfd.readouterr()
    assert len(said.err.strip().splitlines()) == 2 and not said.out
