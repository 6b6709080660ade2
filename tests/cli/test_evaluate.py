"""`qlora-eval`: which of its names are models and which are rows, and what a user can get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.cli.evaluate import _split
from qlora.errors import ExportError
from tests.cli.cases import expect_two_lines, run


def test_the_last_name_is_that_of_the_rows(tmp_path: Path) -> None:
    assert _split(["runs/a", "runs/b", "rows.jsonl"], False) == (["runs/a", "runs/b"], "rows.jsonl")
    with pytest.raises(ExportError, match="only one name is given"):
        _split(["runs/a"], False)


def test_a_harness_needs_no_rows(tmp_path: Path) -> None:
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    model.mkdir()
    (model / "config.json").write_text("{}")
    rows.write_text("{}\n")
    assert _split([str(model)], True) == ([str(model)], None)
    assert _split([str(model), str(model)], True) == ([str(model), str(model)], None)
    assert _split([str(model), str(rows)], True) == ([str(model)], str(rows))
    assert _split([str(model), "hub:owner/rows"], True) == ([str(model)], "hub:owner/rows")


def test_the_command_refuses_in_two_lines(tmp_path: Path) -> None:
    expect_two_lines(run(str(tmp_path), cwd=tmp_path, module="evaluate"), "only one name is given")
