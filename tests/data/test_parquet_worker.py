"""The process that decodes Parquet: what it may take, and how many rows it holds at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from qlora.data import parquet_worker


def metadata(path: Path, texts: list[str]) -> pyarrow.parquet.FileMetaData:
    pyarrow.parquet.write_table(pa.table({"text": texts}), path)
    return pyarrow.parquet.ParquetFile(path).metadata


def test_the_process_that_decodes_has_a_gibibyte() -> None:
    """Before the limit of two seconds is reached, a page of a few bytes can ask for 2 GiB."""
    code = "from qlora.data import parquet_worker as worker\nworker.confine()\nbytearray(5 << 28)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stderr.strip().endswith("MemoryError")


def test_rows_of_a_batch_are_few_where_rows_are_large(tmp_path: Path) -> None:
    small = metadata(tmp_path / "a.parquet", ["a"] * 1000)
    large = metadata(tmp_path / "b.parquet", [str(number) * 500_000 for number in range(8)])
    assert parquet_worker.batch_rows(small) == parquet_worker.BATCH_ROWS
    assert 1 <= parquet_worker.batch_rows(large) < 40
