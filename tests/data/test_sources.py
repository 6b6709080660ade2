"""A source's files, in which order they are read, and columns by the format's own names."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.data.sources import source_files
from qlora.errors import DataError
from qlora.recipe.sections import SourceSection
from tests.data.cases import ROWS, lines, read


def test_a_folder_is_all_its_data_files_and_those_below(tmp_path: Path) -> None:
    for name in ("b.jsonl", "sub/a.jsonl", "sub/.hidden/c.jsonl", "notes.md", ".d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(lines(ROWS[:1]))
    assert [row.where for row in read(tmp_path)] == ["b.jsonl:1", "sub/a.jsonl:1"]


def test_a_glob_is_what_it_matches_in_order(tmp_path: Path) -> None:
    for name in ("x/2.jsonl", "x/1.jsonl", "y/1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines(ROWS[:1]))
    assert [row.where for row in read(f"{tmp_path}/x/*.jsonl")] == ["1.jsonl:1", "2.jsonl:1"]
    assert [row.where for row in read(f"{tmp_path}/**/1.jsonl")] == ["x/1.jsonl:1", "y/1.jsonl:1"]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text(lines(ROWS[:1]))
    assert len(read(tmp_path / "a[1].jsonl")) == 1


def test_columns_are_renamed_to_the_formats_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"question": "q", "instruction": "old", "reply": "r", "id": 1}]))
    found = read(tmp_path / "a.jsonl", columns={"instruction": "question", "output": "reply"})
    hidden = {"instruction (replaced by question)": "old"}
    assert found[0].row == {"instruction": "q", "output": "r", "id": 1, **hidden}


def test_a_column_that_no_row_has_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"question": "q"}]))
    with pytest.raises(DataError, match="no row has the column query") as caught:
        read(tmp_path / "a.jsonl", columns={"instruction": "query"})
    assert 'columns = { instruction = "question" }' in caught.value.hint
    assert "there are: question" in caught.value.what


@pytest.mark.parametrize(
    ("path", "what", "hint"),
    [
        ("none.jsonl", "no such file", "rows.jsonl"),
        ("rows.docx", "unknown kind of file (.docx)", ".jsonl"),
        ("*.xyz", "no file matches", "pattern"),
        ("empty", "no data file in this folder", ".parquet"),
    ],
)
def test_what_is_no_data_file_is_named_with_a_way_out(tmp_path: Path, path: str, what: str, hint: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.docx").touch()
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(DataError) as caught:
        source_files(SourceSection(path=str(tmp_path / path)))
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        source_files(SourceSection(path=str(tmp_path / "a.jsonl")))
