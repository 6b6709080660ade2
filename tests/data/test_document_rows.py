"""format = "documents": files that people read as rows of plain text, cut at paragraphs, in folders and alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.data.conversations import conversations
from qlora.data.formats import Conversation
from qlora.data.hub_rows import localize
from qlora.data.prepare import check_files
from qlora.errors import DataError
from qlora.events import Recorder
from qlora.recipe.sections import DataSection, SourceSection

TEXT = "# Manual\n\nThe lamp runs for nine hours.\n\n- press the button\n- wait\n"


def source(path: Path) -> SourceSection:
    return SourceSection(path=str(path), format="documents")


def test_a_folder_of_documents_is_rows_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(TEXT)
    (tmp_path / "train.html").write_text("<h1>Prices</h1><p>The lamp costs 12 euros.</p>")
    data = localize(DataSection(train=(source(tmp_path),)), Recorder()).local
    check_files(data)
    found = [(row.where, item) for row, item in conversations(data.train[0], {})]
    assert [where for where, _ in found] == ["a.md:1", "train.html:1"]
    texts = [item.text or "" for _, item in found if isinstance(item, Conversation)]
    assert "nine hours" in texts[0] and "press the button" in texts[0] and "12 euros" in texts[1]


def test_what_cannot_be_read_is_a_bad_row_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(TEXT)
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.7 nothing follows")
    with pytest.raises(DataError, match=r"b\.pdf:1"):
        check_files(DataSection(train=(source(tmp_path),)))
    check_files(DataSection(train=(source(tmp_path),), max_bad_rows=1))
