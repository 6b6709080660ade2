"""Rows of Parquet files: every type is a row or a bad row with its place, and no file becomes what it does not show."""

from __future__ import annotations

import datetime as dt
import decimal
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from qlora.data import parquet, parquet_worker
from qlora.data.formats import to_conversation
from qlora.data.row_json import RowError, RowTooLong
from qlora.data.source_files import find_files
from qlora.data.sources import read_rows
from qlora.errors import DataError
from qlora.recipe.sections import SourceSection


def write(path: Path, columns: Any, **keys: Any) -> Path:
    pyarrow.parquet.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **keys)
    return path


def rows(path: Path) -> list[Any]:
    return [item.row for item in read_rows(SourceSection(path=str(path)))]


VALUES: dict[str, tuple[pa.Array, str]] = {
    "date": (pa.array([dt.date(2024, 1, 1)]), "a date"),
    "date64": (pa.array([dt.date(2024, 1, 1)], pa.date64()), "a date"),
    "time": (pa.array([dt.time(1)]), "a time"),
    "timestamp": (pa.array([dt.datetime(2024, 1, 1)], pa.timestamp("us", "UTC")), "a datetime"),
    "nanoseconds": (pa.array([1], pa.timestamp("ns")), "a timestamp[ns]"),
    "a year beyond Python's": (pa.array([2**62], pa.timestamp("us")), "a timestamp[us]"),
    "duration": (pa.array([dt.timedelta(1)]), "a duration"),
    "a duration beyond Python's": (pa.array([2**62], pa.duration("ms")), "a duration[ms]"),
    "decimal": (pa.array([decimal.Decimal("1.50")]), "a decimal number"),
    "bytes": (pa.array([b"text"]), "a bytes value"),
    "fixed bytes": (pa.array([b"text"], pa.binary(4)), "a bytes value"),
    "large bytes": (pa.array([b"text"], pa.large_binary()), "a bytes value"),
    "text that is no text": (pa.array([b"caf\xe9"]).cast(pa.string(), safe=False), "a text that is not UTF-8"),
    "bytes of a dictionary": (pa.array([b"x"]).dictionary_encode(), "a bytes value"),
    "number": (pa.array([1.5]), "a number"),
    "half": (pa.array([1.5], pa.float16()), "a number"),
    "not finite": (pa.array([float("nan")]), "a number"),
    "truth": (pa.array([True]), "true or false"),
    "list": (pa.array([["a"]]), "a list"),
    "list of fixed size": (pa.array([["a", "b"]], pa.list_(pa.string(), 2)), "a list"),
    "struct": (pa.array([{"a": "b"}]), "an object"),
    "map": (pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())), "an object"),
    "map of dates": (pa.array([[(dt.date(2024, 1, 1), "b")]], pa.map_(pa.date32(), pa.string())), "an object"),
    "null": (pa.array([None], pa.null()), "text needs the column text; this row has: id"),
    "NUL": (pa.array(["a\0b"]), "a text holds a NUL character"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_any_type_is_named_where_it_is_used_and_harmless_elsewhere(tmp_path: Path, name: str) -> None:
    values, kind = VALUES[name]
    (row,) = rows(write(tmp_path / "a.parquet", {"text": values, "id": ["x"]}))
    if isinstance(row, RowError):
        assert row.reason == kind
        return
    with pytest.raises(RowError) as caught:
        to_conversation(row, "text")
    assert caught.value.reason.startswith(kind if "needs" in kind else f"text is {kind}")
    (row,) = rows(write(tmp_path / "b.parquet", {"text": ["good"], "other": values}))
    assert row["text"] == "good"


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_text_is_text_in_every_coding(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(["é🌧", None, ""], pa.string()).cast(kind)
    assert rows(write(tmp_path / "a.parquet", {"text": values})) == [{"text": "é🌧"}, {}, {"text": ""}]


@pytest.mark.parametrize("value", [dt.date(2024, 1, 1), float("nan"), b"x", decimal.Decimal(1)])
def test_what_has_no_json_is_no_argument_of_a_tool(tmp_path: Path, value: Any) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"when": value}}]}
    (row,) = rows(write(tmp_path / "a.parquet", pa.Table.from_pylist([{"messages": [message]}])))
    with pytest.raises(RowError, match=r"messages\[0\]\.tool_calls\[0\]\.arguments holds a"):
        to_conversation(row, "messages")
    tool = {"name": "f", "parameters": {"default": value}}
    good = {"role": "assistant", "content": "x"}
    (row,) = rows(write(tmp_path / "b.parquet", pa.Table.from_pylist([{"messages": [good], "tools": [tool]}])))
    with pytest.raises(RowError, match=r"tools\[0\] holds a"):
        to_conversation(row, "messages")


def test_times_inside_messages_are_let_pass(tmp_path: Path) -> None:
    """Logs of conversations (WildChat) have them beside role and content."""
    message = {"role": "assistant", "content": "x", "timestamp": dt.datetime(2024, 1, 1)}
    (row,) = rows(write(tmp_path / "a.parquet", pa.Table.from_pylist([{"messages": [message]}])))
    assert to_conversation(row, "messages").messages[0]["content"] == "x"


def repeated(path: Path) -> Path:
    """One text, 5,000,000 times, as a run of a dictionary."""
    indices = pa.nulls(5_000_000, pa.int32()).fill_null(0)
    return write(path, {"text": pa.DictionaryArray.from_arrays(indices, ["x"])})


def long_list(path: Path) -> Path:
    """One row with a list of 100,000,000 zeros."""
    zeros = pa.nulls(100_000_000, pa.int8()).fill_null(0)
    return write(path, {"text": ["a"], "list": pa.ListArray.from_arrays(pa.array([0, len(zeros)], pa.int32()), zeros)})


def long_text(path: Path) -> Path:
    return write(path, {"text": ["a" * 200_000_000]}, compression="zstd")


def many_texts(path: Path) -> Path:
    return write(path, {"text": ["a" * 1_000_000] * 50}, compression="zstd")


def many_columns(path: Path) -> Path:
    return write(path, {f"column {number}": ["x"] for number in range(parquet_worker.MAX_COLUMNS + 1)})


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (repeated, "5,000,000 rows are too many for a file of its size"),
        (many_texts, "it becomes more than 500 times its size"),
        pytest.param(long_text, "it needs more than 1 GiB|it becomes|it ended", marks=pytest.mark.slow),
        pytest.param(
            long_list, "a few of its rows take more|it needs more than 1 GiB|it ended", marks=pytest.mark.slow
        ),
        pytest.param(many_columns, "10,001 columns are too many", marks=pytest.mark.slow),
    ],
)
def test_a_small_file_that_becomes_large_is_refused(tmp_path: Path, make: Callable[[Path], Path], what: str) -> None:
    path = make(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a.parquet:\d+: not a readable Parquet file: ({what})") as caught:
        rows(path)
    assert caught.value.hint


def test_a_row_over_the_limit_is_left_out_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_ROW_BYTES", 1 << 20)
    found = rows(write(tmp_path / "a.parquet", {"text": ["a", "b" * (1 << 20), "c"]}))
    assert found[0] == {"text": "a"} and found[2] == {"text": "c"} and isinstance(found[1], RowTooLong)


def test_bytes_changed_anywhere_are_rows_or_one_error(tmp_path: Path) -> None:
    """Whatever a header or a page says then, the parent gets rows, bad rows or one line."""
    data = write(tmp_path / "a.parquet", {"text": ["good", "rows", "here"]}).read_bytes()
    for at in range(4, len(data) - 8, len(data) // 5):
        (tmp_path / "b.parquet").write_bytes(data[:at] + bytes([data[at] ^ 0x7F]) + data[at + 1 :])
        try:
            assert len(rows(tmp_path / "b.parquet")) == 3
        except DataError as error:
            assert "b.parquet:" in error.what and "\n" not in error.what


def test_a_file_that_says_more_rows_than_it_has_is_refused(tmp_path: Path) -> None:
    (file,) = find_files(str(write(tmp_path / "a.parquet", {"text": ["a", "b"]})), [".parquet"]).files
    lines = parquet._rows(file, io.BytesIO(b'3\n{"text": "a"}\n{"text": "b"}\n{"text'))
    with pytest.raises(StopIteration) as end:
        while True:
            next(lines)
    assert end.value.value == (2, 3)


@pytest.mark.parametrize("ending", ["os.abort()", "os._exit(3)"])
def test_a_process_that_crashes_behind_its_last_row_has_lost_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Native libraries may crash while their process ends; one that ends before all rows are here is told."""
    path = write(tmp_path / "a.parquet", {"text": ["a"] * 700})
    script = tmp_path / "worker.py"
    source = Path(parquet_worker.__file__).read_text(encoding="utf-8")
    script.write_text(f"{source}    sys.stdout.flush()\n    {ending}\n", encoding="utf-8")
    monkeypatch.setattr(parquet_worker, "__file__", str(script))
    assert rows(path) == [{"text": "a"}] * 700
    early = source.replace("            set_alarm()\n        return\n", f"            {ending}\n        return\n")
    assert early != source
    script.write_text(early, encoding="utf-8")
    how = "SIGABRT" if "abort" in ending else "exit code 3"
    with pytest.raises(DataError, match=rf"a\.parquet:257: .*it ended the process that reads it \({how}\)"):
        rows(path)
    # One that says nothing at all has not said that the file is empty.
    for nothing, end in ((ending, how), ("os._exit(0)", "exit code 0")):
        script.write_text(source.replace("    confine()\n", f"    {nothing}\n", 1), encoding="utf-8")
        with pytest.raises(DataError, match=rf"a\.parquet:1: .*it ended the process that reads it \({end}\)"):
            rows(path)


def test_decoding_ends_when_nobody_reads_on(tmp_path: Path) -> None:
    found = parquet.parquet_rows(
        find_files(str(write(tmp_path / "a.parquet", {"text": ["a"] * 9_000})), [".parquet"]).files[0]
    )
    assert next(found)[1] == {"text": "a"}
    found.close()  # type: ignore[attr-defined]
