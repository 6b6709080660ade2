"""Arrow files are decoded whole or refused: streams, files with a footer, and what breaks off or grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pytest

from qlora.data import parquet
from qlora.errors import DataError
from tests.data.cases import read

TABLE = pyarrow.table({"text": ["a", "ü"] * 400, "more": [[{"k": 1}], None] * 400})


def write(path: Path, make: Any = pyarrow.ipc.new_stream, table: Any = TABLE, **options: Any) -> Path:
    with make(str(path), table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=300)
    return path


@pytest.mark.parametrize("make", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_both_kinds_of_arrow_files(tmp_path: Path, make: Any, compression: str | None) -> None:
    path = write(tmp_path / "a.arrow", make, options=pyarrow.ipc.IpcWriteOptions(compression=compression))
    rows = read(path)
    assert [row.row for row in rows] == [{"text": "a", "more": [{"k": 1}]}, {"text": "ü"}] * 400
    assert rows[-1].where == "a.arrow:800"
    assert rows[-1].read_bytes == path.stat().st_size


def test_a_broken_file_is_refused_before_its_first_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow")
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"PAR1" + data[4:], b"no arrow at all", data[:40] + b"\xff" * 40):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.arrow:1: not a readable Arrow file"):
            read(path)


def test_what_a_file_becomes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = pyarrow.table({"text": pyarrow.nulls(3_000_000)})
    with pytest.raises(DataError, match="too many for a file of its size"):
        read(write(tmp_path / "rows.arrow", table=empty))
    packed = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    path = write(tmp_path / "grown.arrow", table=pyarrow.table({"text": ["x" * 1_000_000] * 40}), options=packed)
    with pytest.raises(DataError, match="more than 500 times its size"):
        read(path)
    monkeypatch.setattr(parquet, "SMALL_ROWS", 10)
    monkeypatch.setattr(parquet, "MAX_ROWS_PER_BYTE", 0)
    with pytest.raises(DataError, match="too many for a file of its size"):
        read(write(tmp_path / "a.arrow"))
