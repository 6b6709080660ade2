"""A source's rows as conversations, and what is said of those that are none.

Why a row is bad decides the way out: a broken row is repaired, but where most rows of a file fail, the file is read in
a wrong way, and the hint is the line of the recipe that reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qlora.data.column_words import Reading, detect, renamed
from qlora.data.formats import Conversation, to_conversation
from qlora.data.judged import to_judged
from qlora.data.rewarded import to_rewarded
from qlora.data.row_json import RowError, RowTooLong
from qlora.data.source_files import SourceFile
from qlora.data.sources import SourceRow, raw_rows
from qlora.errors import DataError
from qlora.objective_keys import JUDGED

if TYPE_CHECKING:
    from qlora.recipe.sections import DataSection, SourceSection

_SHARE_OF_FILE = 0.9  # from so many of its rows on, the fault is the file's and not the row's
_OTHER_WAY = 'name what the file has: format = "…", columns = { … }; or write its rows anew'


def conversations(
    source: SourceSection, readings: dict[str, Reading], files: Sequence[SourceFile] | None = None
) -> Iterator[tuple[SourceRow, Conversation | RowError]]:
    """The source's rows as conversations. Formats known by the first good row of a file are put into `readings`."""
    for row in raw_rows(source, files):
        named = row.named(source.columns)
        yield named, conversation_of(named.row, named.where, str(source.format), readings)


def conversation_of(
    row: dict[str, Any] | RowError, where: str, format: str, readings: dict[str, Reading]
) -> Conversation | RowError:
    """A row of a source of that format as a conversation, or why it is none. `readings` as in `conversations`."""
    try:
        if isinstance(row, RowError):
            raise row
        if format in JUDGED:
            return to_judged(row, format)
        if format == "grpo":
            return to_rewarded(row)
        reading, name = Reading(format.replace("documents", "text")), file_of(where)
        if format == "auto":
            reading = readings.get(name) or detect(row)
        conversation = to_conversation(renamed(row, reading.columns), reading.format)
        if format == "auto":
            readings.setdefault(name, reading)
        return conversation
    except RowError as error:
        return error


def file_of(where: str) -> str:
    """The file in a row's `file:line`."""
    return where.rpartition(":")[0]


def bad_row(where: str, error: RowError, max_bad_rows: int, looked_at: Sequence[object]) -> DataError:
    """What ends a reading. `looked_at`: the rows around it as they were read, each a RowError or not."""
    failed = sum(isinstance(row, RowError) and not isinstance(row, RowTooLong) for row in looked_at)
    of_file = failed > 1 and failed >= _SHARE_OF_FILE * len(looked_at)
    if error.hint:
        hint = error.hint if of_file else f"{error.hint}; data.max_bad_rows leaves out that many rows"
    elif of_file:
        hint = f"{failed} of {len(looked_at)} rows looked at fail: {error.file_hint or _OTHER_WAY}"
    elif error.file_hint and len(looked_at) == 1:
        hint = f"repair the row; where all are like it: {error.file_hint}"
    elif 2 * failed > len(looked_at) > 1:
        hint = f"{failed} of {len(looked_at)} rows looked at are bad: repair them, or raise data.max_bad_rows"
    elif max_bad_rows:
        hint = f"more than data.max_bad_rows = {max_bad_rows} rows are bad: repair them, or raise it"
    else:
        hint = "repair the row, or set data.max_bad_rows to leave out that many"
    return DataError(f"{where}: {error.reason}", hint)


def leave_out(data: DataSection, error: RowTooLong, where: str) -> None:
    """Raise DataError for a row that is too long to be read, where rows over max_length are errors."""
    if data.truncation == "error":
        hint = 'shorten the row, or set data.truncation to "drop"'
        raise DataError(f"{where}: {error.reason}: that is over data.max_length = {data.max_length} tokens", hint)
