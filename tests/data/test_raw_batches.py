"""Rows in batches as they stand in their files, and what is known of these by then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.data import raw_batches as module
from qlora.data.raw_batches import raw_batches
from qlora.data.readers import Line
from qlora.data.row_json import RowError
from qlora.data.sources import source_files
from qlora.recipe.sections import SourceSection
from tests.data.cases import GOOD, GOOD_LINE, ROWS, lines


def test_lines_stay_lines_once_the_format_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 3)
    (tmp_path / "a.jsonl").write_text("{broken\n" + (GOOD_LINE + "\n") * 4)
    (tmp_path / "b.json").write_text(json.dumps([GOOD, GOOD]))
    source, formats = SourceSection(path=str(tmp_path)), dict[str, str]()
    batches = list(raw_batches(7, source, source_files(source).files, formats))
    assert [len(batch.rows) for batch in batches] == [3, 3, 1] and [batch.last for batch in batches] == [
        False,
        False,
        True,
    ]
    kinds = [type(raw) for batch in batches for _, raw in batch.rows]
    assert kinds == [RowError, Line, Line, Line, Line, dict, dict]
    assert formats == {"a.jsonl": "messages", "b.json": "messages"}
    assert [sorted(batch.readings) for batch in batches] == [["a.jsonl"], ["a.jsonl", "b.json"], ["b.json"]]
    assert {batch.source for batch in batches} == {7}
    assert batches[-1].read_bytes == batches[-1].total_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())


def test_a_batch_ends_by_its_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 40)
    (tmp_path / "a.jsonl").write_text(lines(ROWS * 4))
    source = SourceSection(path=str(tmp_path / "a.jsonl"), format="text")
    batches = list(raw_batches(0, source, source_files(source).files, {}))
    assert sum(len(batch.rows) for batch in batches) == 12 and len(batches) > 4
