"""The rows of a source in batches, as they stand in its files: what becomes of one is a matter of the batch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from qlora.data.column_words import Reading
from qlora.data.conversations import conversation_of, file_of
from qlora.data.limits import text_chars
from qlora.data.made_rows import Raw, RawBatch
from qlora.data.readers import Line
from qlora.data.row_json import RowError
from qlora.data.source_files import SourceFile
from qlora.data.sources import named_row, raw_rows

if TYPE_CHECKING:
    from qlora.recipe.sections import SourceSection

BATCH_ROWS = 256
BATCH_BYTES = 1 << 20  # of its rows' text; one row may have eight times as much


def raw_batches(
    number: int, source: SourceSection, files: Sequence[SourceFile], formats: dict[str, str]
) -> Iterator[RawBatch]:
    """All rows of source `number`. Into `formats` goes how files are read whose format is told by their columns.

    The first good row of such a file tells it, so rows up to that one are read here, and are in a batch as what they
    are: bad, or good.
    """
    *starts_bytes, total_bytes = accumulate((file.size_bytes for file in files), initial=0)
    start_of = dict(zip(files, starts_bytes, strict=True))
    auto = source.format == "auto"
    readings: dict[str, Reading] = {}

    def batch_of(rows: list[tuple[str, Raw]], read_bytes: int, last: bool = False) -> RawBatch:
        met = {file_of(where) for where, _ in rows} if auto else ()
        known = {file: readings[file] for file in met if file in readings}
        return RawBatch(number, str(source.format), source.columns, known, rows, read_bytes, total_bytes, last)

    rows: list[tuple[str, Raw]] = []
    size = 0
    for row in raw_rows(source, files):
        raw: Raw = row.row
        if auto and file_of(row.where) not in readings:
            found = conversation_of(named_row(raw, source.columns), row.where, "auto", readings)
            raw = found if isinstance(found, RowError) else raw
        rows.append((row.where, raw))
        size += len(raw.data) if isinstance(raw, Line) else 0 if isinstance(raw, RowError) else text_chars(raw)
        if len(rows) >= BATCH_ROWS or size > BATCH_BYTES:
            yield batch_of(rows, start_of[row.file] + row.read_bytes)
            rows, size = [], 0
    yield batch_of(rows, total_bytes, last=True)
    formats.update({file: str(reading) for file, reading in readings.items()})
