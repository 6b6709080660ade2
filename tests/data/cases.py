"""Rows in files, and all rows of a source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora.data.sources import SourceRow, read_rows
from qlora.recipe.sections import SourceSection

ROWS = [{"text": "a"}, {"text": "b", "extra": {"k": [1, None]}}, {"text": "ç 🌧"}]


def read(path: Path | str, **keys: Any) -> list[SourceRow]:
    """All rows; a bad one fails the test."""
    rows = list(read_rows(SourceSection(path=str(path), **keys)))
    assert all(isinstance(row.row, dict) for row in rows), rows
    return rows


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
