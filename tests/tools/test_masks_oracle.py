"""Masks beside templates that mark their answers: the differences have a reason, and one without a reason is shown."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.data.toys import TEMPLATES, chatml
from tools import masks_oracle


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["masks_oracle.py", "--templates", str(folder)])
    return masks_oracle.main()


def test_our_masks_are_those_of_templates_with_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("gemma", "qwen2", "smollm3"):
        (tmp_path / f"{name}.jinja").write_text((TEMPLATES / f"{name}.jinja").read_text())
    assert run(tmp_path, monkeypatch) == 0
    out = capsys.readouterr().out
    assert f"3 templates x {len(masks_oracle.CONVERSATIONS)} conversations" in out
    assert "qwen2: 18 equal, 1 joined" in out
    assert "unexplained" not in out


def test_a_mask_that_is_wrong_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.jinja").write_text(chatml("{{ m.content }}{% generation %}<|im_end|>{% endgeneration %}\n"))
    assert run(tmp_path, monkeypatch) == 1
    assert "ours alone: 'It is cold.'" in capsys.readouterr().out


def test_a_folder_without_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain.jinja").write_text(chatml("{{ m.content }}<|im_end|>\n"))
    assert run(tmp_path, monkeypatch) == 2
