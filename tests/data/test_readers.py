"""Every kind of file: where each row stands, and rows that stay as they are."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.data import readers
from qlora.data.row_json import RowError
from qlora.data.sources import read_rows
from qlora.recipe.sections import SourceSection
from tests.data.cases import ROWS, lines, read


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("a.jsonl", lines(ROWS), [1, 2, 3]),
        ("a.ndjson", "\n\n" + lines(ROWS), [3, 4, 5]),
        ("a.JSONL", lines(ROWS).rstrip("\n"), [1, 2, 3]),
        ("a.json", json.dumps(ROWS), [1, 1, 1]),
        ("a.json", json.dumps(ROWS, indent=1), [2, 5, 14]),
        ("a.json", " \n [ \n" + ",\n\n".join(map(json.dumps, ROWS)) + "\n]\n\n", [3, 5, 7]),
        ("a.json", lines(ROWS), [1, 2, 3]),
    ],
)
@pytest.mark.parametrize("break_", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_rows_are_read_as_they_are(
    tmp_path: Path, name: str, text: str, places: list[int], break_: str, mark: str
) -> None:
    file = tmp_path / name
    file.write_bytes((mark + text.replace("\n", break_)).encode())
    found = read(file)
    assert [row.row for row in found] == ROWS
    assert [row.where for row in found] == [f"{name}:{line}" for line in places]
    assert found[-1].read_bytes <= file.stat().st_size


@given(
    rows=st.lists(st.dictionaries(st.text("ab\n", max_size=3), st.text(max_size=30)), max_size=8),
    edge=st.integers(1, 40),
)
def test_an_array_may_be_cut_anywhere_by_the_reading_window(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], edge: int
) -> None:
    file = tmp_path_factory.mktemp("window") / "a.json"
    rows = [{key: value.replace("\0", "") for key, value in row.items()} for row in rows]
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK_CHARS", edge)
        assert [row.row for row in read(file)] == rows


@pytest.mark.parametrize("edge", range(1, 12))
def test_elements_that_are_no_rows_are_named_wherever_the_window_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edge: int
) -> None:
    monkeypatch.setattr(readers, "_CHUNK_CHARS", edge)
    (tmp_path / "a.json").write_text('[12345,\n-1.5e10, true, "x",\n{"text": "a"}]')
    rows = list(read_rows(SourceSection(path=str(tmp_path / "a.json"))))
    assert [row.where for row in rows] == ["a.json:1", "a.json:2", "a.json:2", "a.json:2", "a.json:3"]
    assert [isinstance(row.row, RowError) for row in rows] == [True] * 4 + [False]


def test_csv_cells_are_texts_and_rows_know_their_first_line(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes('\ufeffprompt,completion\r\n"a\r\nb",c\r\n\r\nd,"1,""2"""\r\n'.encode())
    found = read(file)
    assert [row.row for row in found] == [
        {"prompt": "a\r\nb", "completion": "c"},
        {"prompt": "d", "completion": '1,"2"'},
    ]
    assert [row.where for row in found] == ["a.csv:2", "a.csv:5"]


def test_csv_cells_may_be_long(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text\n" + "x" * 300_000 + "\n")
    assert len(read(file)[0].row["text"]) == 300_000


def test_tsv(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("prompt\tcompletion\na, b\tc\n")
    assert read(file)[0].row == {"prompt": "a, b", "completion": "c"}


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_is_read_by_the_separator_of_its_first_line(
    tmp_path: Path, separator: str, ending: str, mark: str
) -> None:
    cells = [["prompt", "completion"], ["a, b; c", '"d"'], ["two\nlines", "e|f\tg"]]
    with (tmp_path / f"a{ending}").open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        csv.writer(file, delimiter=separator).writerows(cells)
    found = read(tmp_path / f"a{ending}")
    assert [row.row for row in found] == [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
    assert [row.where for row in found] == [f"a{ending}:2", f"a{ending}:3"]


@pytest.mark.parametrize("header", ["text", '"a;b"', '"a,b"', "a b"])
def test_a_table_of_one_column_has_no_separator(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\nx; y\n")
    assert read(tmp_path / "a.csv")[0].row == {header.strip('"'): "x; y"}


def test_excels_own_line_of_the_separator(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\r\nprompt;completion\r\na, b;c\r\n", newline="")
    (row,) = read(tmp_path / "a.csv")
    assert (row.row, row.where) == ({"prompt": "a, b", "completion": "c"}, "a.csv:3")


@pytest.mark.parametrize(
    ("head", "row", "left"),
    [
        (",prompt,completion", "0,a,b", {"unnamed column 1": "0"}),
        ("Unnamed: 0,prompt,completion", "0,a,b", {"Unnamed: 0": "0"}),
        ("prompt,completion,,", "a,b,,x", {"unnamed column 3": "", "unnamed column 4": "x"}),
        ('"",prompt," "," completion"', "0,a,1,b", None),
    ],
)
def test_a_column_without_a_name_is_known_by_its_number(
    tmp_path: Path, head: str, row: str, left: dict[str, str] | None
) -> None:
    (tmp_path / "a.csv").write_text(f"{head}\n{row}\n")
    found = read(tmp_path / "a.csv")[0].row
    if left is None:
        assert list(found) == ["unnamed column 1", "prompt", "unnamed column 3", " completion"]
    else:
        assert found == {"prompt": "a", "completion": "b", **left}


def test_parquet_rows_come_without_the_nulls_of_the_schema(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"arguments": {"x": 1}}]}], "tools": "[]"},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"arguments": {"y": "z"}}]}]},
    ]
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.Table.from_pylist([_merged(rows)]).schema)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = read(tmp_path / "a.parquet")
    assert [row.row for row in found] == rows
    assert [row.where for row in found] == ["a.parquet:1", "a.parquet:2", "a.parquet:3"]


def _merged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row with every key of all, for Arrow to infer the schema from."""
    message = {"role": "", "content": "", "tool_calls": [{"arguments": {"x": 1, "y": ""}}]}
    return {"messages": [message], "tools": ""}


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode())
    assert [row.row for row in read(tmp_path / "a.txt")] == [{"text": "one\ntwo\n"}]
