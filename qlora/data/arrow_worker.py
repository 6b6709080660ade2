"""The process that decodes one Arrow file. Run by its path, by `parquet.py`, and by nobody else.

What it may take, what it reads and writes is as in `parquet_worker.py`. A file is a stream of batches (what the library
datasets saves) or an Arrow file with a footer; either way the batches are read twice, since nothing in front of them
says how many rows there are, and a file that breaks off is to be known before the first row is used.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import IO, Any

FOOTED = b"ARROW1"  # how an Arrow file with a footer begins


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])  # the parent's: pyarrow may lie in a user's own site folder
    max_row_bytes, max_rows = int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # when to end is the parent's business
    sys.modules["pandas"] = None  # type: ignore[assignment]  # pyarrow would ask it for nanoseconds, and take 2 s
    import pyarrow.ipc

    from qlora.data import parquet_worker
    from qlora.errors import foreign_failures

    parquet_worker.confine()
    out, file = sys.stdout.buffer, os.fdopen(0, "rb")
    with foreign_failures(memory_too=True) as failure:
        count = 0
        for batch in batches(pyarrow, file):
            parquet_worker.set_alarm()
            if batch.num_columns > parquet_worker.MAX_COLUMNS:
                raise ValueError(f"{batch.num_columns:,} columns are too many (at most {parquet_worker.MAX_COLUMNS:,})")
            count += batch.num_rows
            if count > max_rows:
                raise ValueError("its rows are too many for a file of its size")
        out.write(f"{count}\n".encode())
        for batch in batches(pyarrow, file):
            # A batch may be all of a file: it is turned into rows piece by piece.
            for start in range(0, batch.num_rows, parquet_worker.BATCH_ROWS):
                parquet_worker.set_alarm()
                parquet_worker.write_rows(out, batch.slice(start, parquet_worker.BATCH_ROWS), max_row_bytes)
        return
    out.write(json.dumps([parquet_worker.reason_of(failure.error)]).encode() + b"\n")
    out.flush()


def batches(pyarrow: Any, file: IO[bytes]) -> Iterator[Any]:
    """The record batches of a file, from its beginning."""
    file.seek(0)
    footed = file.read(len(FOOTED)) == FOOTED
    file.seek(0)
    if footed:
        opened = pyarrow.ipc.open_file(pyarrow.PythonFile(file, mode="r"))
        yield from (opened.get_batch(number) for number in range(opened.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(pyarrow.PythonFile(file, mode="r"))


if __name__ == "__main__":
    main()
