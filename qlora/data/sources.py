"""A source's files to rows, each with the `file:line` it came from.

A row stays the JSON object that stands in the file: it never passes through an Arrow schema, which would fill in
nulls for keys that other rows have. In a broken row's place stands the reason, and reading goes on after it; a file
that cannot be read on raises DataError. How each kind of file is read: `readers.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora.data import document_rows
from qlora.data.column_words import column_names, nearest_columns, renamed
from qlora.data.documents.kinds import KINDS
from qlora.data.readers import READERS, Item, Line
from qlora.data.row_json import RowError
from qlora.data.source_files import FoundFiles, SourceFile, find_files
from qlora.errors import DataError

if TYPE_CHECKING:
    from qlora.recipe.sections import SourceSection

# How files begin that are something else than their ending says. An archive is not unpacked: it may become anything.
_OTHER_KINDS = {
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
    **dict.fromkeys((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"), ("an archive", "unpack it")),
}


@dataclass(frozen=True)
class SourceRow:
    """One row as it stands in its file, or why there is none at `where`, its `file:line`.

    `read_bytes`: how far into `file` it ends, for progress bars.
    """

    row: dict[str, Any] | RowError
    where: str
    file: SourceFile
    read_bytes: int


def source_files(source: SourceSection) -> FoundFiles:
    """The local files of a source, sorted. Raises DataError when there are none or one is of an unknown kind."""
    return find_files(source.path, KINDS if source.format == "documents" else READERS)


def read_rows(source: SourceSection, files: Sequence[SourceFile] | None = None) -> Iterator[SourceRow]:
    """Every row of a source, in the order of its files, with its columns renamed to the format's own.

    `files` are the source's, where they have been looked for already. Raises as `raw_rows` does.
    """
    for row in raw_rows(source, files):
        yield row.named(source.columns)


class RawRow(NamedTuple):
    """A row whose columns are not renamed yet, or its line, which nobody has parsed; else as `SourceRow`."""

    row: dict[str, Any] | RowError | Line
    where: str
    file: SourceFile
    read_bytes: int

    def named(self, columns: Mapping[str, str]) -> SourceRow:
        return SourceRow(named_row(self.row, columns), self.where, self.file, self.read_bytes)


def named_row(row: dict[str, Any] | RowError | Line, columns: Mapping[str, str]) -> dict[str, Any] | RowError:
    """A row, parsed where it is still a line, under the format's own names; or why there is none."""
    read = row.row() if isinstance(row, Line) else row
    return read if isinstance(read, RowError) else renamed(read, columns)


def raw_rows(source: SourceSection, files: Sequence[SourceFile] | None = None) -> Iterator[RawRow]:
    """Every row of a source as it stands in its file; lines are parsed only until each of `columns` has been seen.

    Raises DataError for a file that cannot be read on, and when a column to be renamed is in no row at all.
    """
    unseen = set(source.columns.values())
    seen: list[str] = []
    for file in source_files(source).files if files is None else files:
        for number, row, read_bytes in document_rows.items(file) if source.format == "documents" else _items(file):
            if unseen:
                row = row.row() if isinstance(row, Line) else row
                if not isinstance(row, RowError):
                    unseen.difference_update(row)
                    seen = seen or list(row)
            yield RawRow(row, f"{file.name}:{number}", file, read_bytes)
    if unseen:
        raise DataError(
            f"{source.path}: no row has the column {' or '.join(sorted(unseen))}; there are: {column_names(seen)}",
            f"write your own column on the right, by its name in the file: {nearest_columns(source.columns, seen)}",
        )


def _items(file: SourceFile) -> Iterator[Item]:
    """A file's rows. Raises DataError when it cannot be opened, is empty, breaks off, or is not what it is called."""
    try:
        with file.open() as raw:
            start = raw.read(4)
        if not start:
            raise DataError(f"{file.name}: the file is empty", "remove it, or name the right file in path")
        for mark, (kind, hint) in _OTHER_KINDS.items():
            if start.startswith(mark):
                raise DataError(f"{file.name}: this is {kind}", hint)
        yield from READERS[file.ending](file)
    except OSError as error:
        raise file.unreadable(error) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name}: not UTF-8 text ({error.reason})", "save it as UTF-8") from error
