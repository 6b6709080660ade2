"""How rows of the hub are named."""

from __future__ import annotations

import pytest

from qlora.recipe.pins import parse_hub_rows


@pytest.mark.parametrize(
    ("path", "rows"),
    [
        ("hub:rows", ("rows", "main", "train")),
        ("hub:owner/rows@v1.0", ("owner/rows", "v1.0", "train")),
        ("hub:owner/rows:test", ("owner/rows", "main", "test")),
        ("hub:owner/rows@refs/pr/1:test", ("owner/rows", "refs/pr/1", "test")),
        ("hub:a/b/c", None),
        ("hub:", None),
        ("rows.jsonl", None),
    ],
)
def test_names_of_rows(path: str, rows: tuple[str, str, str] | None) -> None:
    parsed = parse_hub_rows(path)
    assert parsed == rows
    assert parsed is None or parse_hub_rows(str(parsed)) == parsed
