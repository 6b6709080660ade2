"""A document's text and its line in a study's list."""

from __future__ import annotations

import json

from qlora.data.documents.blocks import Block
from qlora.data.documents.document import Document, Documents, LeftOut

ONE = Document("a.md", "ab" * 32, 2, "pumps", "en", (Block("heading", "A", 1), Block("paragraph", "b")),
               (LeftOut("a.md", "macros, which are never run", 3),))  # fmt: skip


def test_text_and_record() -> None:
    assert ONE.text == "# A\n\nb"
    record = json.loads(json.dumps(ONE.as_dict()))
    assert record["sha256"] == "ab" * 32 and record["pages"] == 2 and "blocks" not in record
    assert record["left_out"] == [{"where": "a.md", "reason": "macros, which are never run", "count": 3}]
    assert Documents((ONE, ONE)).pages == 4
