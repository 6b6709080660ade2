"""The process that decodes one Parquet file. Run by its path, by `parquet.py`, and by nobody else.

What a Parquet file becomes stands nowhere in it that could be trusted: a page of a few bytes may say "the same value a
billion times", and a header may ask for 2 GiB. So it is decoded here, in a process with a limit on memory and, for each
batch, on time; a file that leaves them ends this process and no other.

In: the file as stdin. Out: a line with the number of rows, then a line of JSON for each row. A value that JSON does not
have (a date, bytes) is `{"\\0": "its type"}` there; in place of a row that is too large stands its number of bytes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any

MEMORY_BYTES = 1 << 30
BATCH_SECONDS = 2  # of computing, for the rows of one batch: 256 usual rows take 0.01 s
BATCH_ROWS, BATCH_BYTES = 256, 8 << 20
MAX_COLUMNS = 10_000


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])  # the parent's: pyarrow may lie in a user's own site folder
    max_row_bytes, max_rows = int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # when to end is the parent's business
    sys.modules["pandas"] = None  # type: ignore[assignment]  # pyarrow would ask it for nanoseconds, and take 2 s
    import pyarrow
    import pyarrow.parquet

    from qlora.errors import foreign_failures

    confine()
    out = sys.stdout.buffer
    with foreign_failures(memory_too=True) as failure:
        set_alarm()
        # A small buffer: without one, a whole column of a row group is read at once, by sizes that the file claims.
        table = pyarrow.parquet.ParquetFile(os.fdopen(0, "rb"), buffer_size=1 << 20, pre_buffer=False)
        metadata = table.metadata
        if metadata.num_columns > MAX_COLUMNS:
            raise ValueError(f"{metadata.num_columns:,} columns are too many (at most {MAX_COLUMNS:,})")
        if metadata.num_rows > max_rows:
            raise ValueError(f"{metadata.num_rows:,} rows are too many for a file of its size")
        out.write(f"{metadata.num_rows}\n".encode())
        for batch in table.iter_batches(batch_size=batch_rows(metadata), use_threads=False):
            write_rows(out, batch, max_row_bytes)
            set_alarm()
        return
    out.write(json.dumps([reason_of(failure.error)]).encode() + b"\n")
    out.flush()


def batch_rows(metadata: Any) -> int:
    """Rows of a batch: few where rows are large, as far as the file's own sizes can be believed."""
    size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    rows: int = BATCH_BYTES * max(metadata.num_rows, 1) // max(size, 1)
    return max(1, min(BATCH_ROWS, rows))


def write_rows(out: IO[bytes], batch: Any, max_row_bytes: int) -> None:
    """A line for each row of a batch: its JSON, or where that is too large its number of bytes."""
    for row in rows_of(batch):
        line = json.dumps(row, ensure_ascii=False, default=marked).encode()
        out.write((line if len(line) <= max_row_bytes else str(len(line)).encode()) + b"\n")
    out.flush()


def rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch, without the nulls that the schema put where a row had no key."""
    from qlora.errors import foreign_failures

    with foreign_failures(memory_too=True) as failure:
        rows = batch.to_pylist(maps_as_pydicts="lossy")
    if isinstance(failure.error, MemoryError):
        raise failure.error
    if failure.error is None:
        yield from map(without_nulls, rows)
        return
    for number in range(batch.num_rows):  # text that is no UTF-8, a date beyond Python's: only the one value is lost
        row: dict[str, Any] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            with foreign_failures(memory_too=True) as failure:
                row[name] = column[number].as_py(maps_as_pydicts="lossy")
            if failure.error:
                text = isinstance(failure.error, UnicodeDecodeError)
                row[name] = marked("text that is not UTF-8" if text else column.type)
        yield without_nulls(row)


def without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def marked(value: Any) -> dict[str, str]:
    """How a value travels that JSON does not have."""
    kinds = {"bytes": "bytes value", "Decimal": "decimal number", "timedelta": "duration"}
    name = type(value).__name__
    return {"\0": value if isinstance(value, str) else kinds.get(name, str(value) if name.endswith("Type") else name)}


def reason_of(error: Exception | None) -> str:
    lines = str(error).splitlines()
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY_BYTES >> 30} GiB of memory"
    return lines[0][:300] if lines else type(error).__name__


def confine() -> None:
    """Give up memory beyond the limit. Windows has no such limits: there the parent counts what comes out."""
    from qlora.child_process import limit_itself

    limit_itself({"AS": MEMORY_BYTES, "FSIZE": 0, "CORE": 0})


def set_alarm() -> None:
    """The system ends the process when it has computed for BATCH_SECONDS from now on. Windows cannot."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, BATCH_SECONDS)


if __name__ == "__main__":
    main()
