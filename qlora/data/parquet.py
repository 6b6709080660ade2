"""Rows of a Parquet or Arrow file, decoded by a process of its own (`parquet_worker.py`, `arrow_worker.py`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import IO, Any

from qlora import child_process
from qlora.data import arrow_worker, parquet_worker
from qlora.data.limits import MAX_ROW_BYTES
from qlora.data.render import KEPT_VARIABLES
from qlora.data.row_json import RowError, RowTooLong, check_value
from qlora.data.source_files import SourceFile
from qlora.errors import DataError

# A file of rows has at least a byte a row, and becomes at most so many times its bytes; small ones a little more.
MAX_ROWS_PER_BYTE, SMALL_ROWS = 1, 10_000
MAX_GROWTH, SMALL_BYTES = 500, 4 << 20
_MARK = '{"\\u0000": '
Item = tuple[int, dict[str, Any] | RowError, int]
_HINT = "write it anew from its source, or convert it to .jsonl"


@dataclass(frozen=True)
class ParquetValue:
    """A value of a kind that JSON does not have; formats name it where they wanted another."""

    kind: str

    def __str__(self) -> str:
        return self.kind


def parquet_rows(file: SourceFile) -> Iterator[Item]:
    """Each row's number from 1, the row or why there is none, and about how far into the file it ends.

    Raises DataError for a file that cannot be read on, or becomes more than its size lets one believe.
    """
    worker = arrow_worker if file.ending == ".arrow" else parquet_worker
    command = [sys.executable, "-I", str(worker.__file__), json.dumps(child_process.import_path())]
    most_rows = SMALL_ROWS + MAX_ROWS_PER_BYTE * file.size_bytes
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    # pyarrow's own allocator reserves a GiB of addresses, which is all that the process may have.
    environment |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    with file.open() as opened:
        try:
            process = subprocess.Popen(
                [*command, str(MAX_ROW_BYTES), str(most_rows)],
                stdin=opened.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            what = f"{file.name}: no process could be started to read it ({error.strerror or error})"
            raise DataError(what, "close other programs, or raise the limit on processes (ulimit -u)") from error
        assert process.stdout is not None
        try:
            number, total = yield from _rows(file, process.stdout)
            file.check_unchanged(os.fstat(opened.fileno()))
            # When all rows are here, a native library that crashes while its process ends has lost none of them.
            if number != total:
                code = process.wait()
                ended = bool(code) or total is None
                raise _broken(file, number, _end_of(code) if ended else f"it has {number:,} rows, but says {total:,}")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _rows(file: SourceFile, lines: IO[bytes]) -> Generator[Item, None, tuple[int, int | None]]:
    """The rows, and in the end how many came and how many there should be: None where not even that came."""
    number = decoded_bytes = 0
    total = None
    while (line := lines.readline(MAX_ROW_BYTES + 2)).endswith(b"\n"):  # without one the process has gone
        if line.startswith(b"["):
            raise _broken(file, number, json.loads(line)[0])
        if total is None:
            total = int(line)
            continue
        number += 1
        decoded_bytes += len(line) if line.startswith(b"{") else int(line)
        if decoded_bytes > SMALL_BYTES + MAX_GROWTH * file.size_bytes:
            raise _broken(file, number, f"it becomes more than {MAX_GROWTH} times its size")
        yield number, _row(line.decode()), file.size_bytes * number // max(total, 1)
    return number, total


def _row(line: str) -> dict[str, Any] | RowError:
    if not line.startswith("{"):
        return RowTooLong(f"over {MAX_ROW_BYTES >> 20} MiB in one row")
    row: dict[str, Any] = json.loads(line, object_hook=unmarked if _MARK in line else None)
    try:
        check_value(row, escapes="\\u0000" in line)
    except RowError as error:
        return error
    return row


def as_marked(value: object) -> dict[str, str]:
    """For json's `default`: a ParquetValue as `unmarked` reads it. Raises TypeError for anything else."""
    if isinstance(value, ParquetValue):
        return {"\0": value.kind}
    raise TypeError(f"{type(value).__name__} is no value of a row")


def unmarked(value: dict[str, Any]) -> Any:
    """For json's `object_hook`: a value of a kind that JSON does not have, where it has been marked as one."""
    kind = value.get("\0")
    return ParquetValue(kind) if isinstance(kind, str) and len(value) == 1 else value


def _end_of(code: int) -> str:
    if code == -getattr(signal, "SIGPROF", 0):
        return f"a few of its rows take more than {parquet_worker.BATCH_SECONDS} s to decode"
    return f"it ended the process that reads it ({child_process.how_it_ended(code)})"


def _broken(file: SourceFile, number: int, reason: str) -> DataError:
    kind = file.ending.removeprefix(".").capitalize()
    return DataError(f"{file.name}:{number + 1}: not a readable {kind} file: {reason}", _HINT)
