"""A source's files to rows, each with the `file:line` it came from.

A row stays the JSON object that stands in the file: it never passes through an Arrow schema, which would fill in
nulls for keys that other rows have. In a broken row's place stands the reason, and reading goes on after it; a file
that cannot be read on raises DataError. How each kind of file is read: `readers.py`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.data.formats import RowError, check_text
from qlora.data.readers import READERS, Item
from qlora.errors import DataError

if TYPE_CHECKING:
    from qlora.recipe.sections import SourceSection

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class SourceRow:
    """One row as it stands in its file, or why there is none at `where`, its `file:line`.

    `read_bytes`: how far into `file` it ends, for progress bars.
    """

    row: dict[str, Any] | RowError
    where: str
    file: Path
    read_bytes: int


def source_files(source: SourceSection) -> list[Path]:
    """The local files of a source, sorted. Raises DataError when there are none or one is of an unknown kind."""
    path = Path(source.path)
    if path.is_dir():
        files = sorted(_known_files(path))
        if not files:
            raise DataError(f"{path}: no data file in this folder", f"known endings: {', '.join(READERS)}")
        return files
    if path.exists() or not glob.has_magic(source.path):
        return [_checked_file(path)]
    files = sorted(Path(name) for name in glob.glob(source.path, recursive=True) if not os.path.isdir(name))
    if not files:
        raise DataError(f"{source.path}: no file matches", "check the pattern; it is relative to the recipe's folder")
    return [_checked_file(file) for file in files]


def read_rows(source: SourceSection) -> Iterator[SourceRow]:
    """Every row of a source, in the order of its files, with the source's columns renamed to the format's own.

    Raises DataError for a file that cannot be read on, and when a column to be renamed is in no row at all.
    """
    unseen = set(source.columns.values())
    for file in source_files(source):
        name = file_name(source, file)
        for number, row, read_bytes in _items(file, name):
            try:
                if not isinstance(row, RowError):
                    check_text(row)
                    unseen.difference_update(row)
                    row = _renamed(row, source.columns)
            except RowError as error:
                row = error
            yield SourceRow(row, f"{name}:{number}", file, read_bytes)
    if unseen:
        raise DataError(
            f"{source.path}: no row has the column {' or '.join(sorted(unseen))}",
            "columns gives your column's name by the format's own: columns = { instruction = 'question' }",
        )


def file_name(source: SourceSection, file: Path) -> str:
    """A file's name in messages: inside its folder for sources that are one, else the bare name."""
    folder = Path(source.path)
    while glob.has_magic(str(folder)) and not folder.exists():
        folder = folder.parent
    return file.relative_to(folder).as_posix() if file != folder and file.is_relative_to(folder) else file.name


def _items(file: Path, name: str) -> Iterator[Item]:
    """A file's rows, unchecked. Raises DataError when it cannot be opened, is empty, or breaks off."""
    try:
        with file.open("rb") as raw:
            start = raw.read(4)
        if not start:
            raise DataError(f"{name}: the file is empty", "remove it, or name the right file in path")
        if start[:2] in _UTF16_MARKS:
            raise DataError(f"{name}: this is UTF-16 text", "save it as UTF-8")
        yield from READERS[file.suffix.lower()](file, name)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})", "check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text ({error.reason})", "save it as UTF-8") from error


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """`columns` gives the row's column by the format's own name; what is renamed hides a column of that name."""
    renamed = {own: row[theirs] for own, theirs in columns.items() if theirs in row}
    taken = set(columns.values())
    return {**{key: value for key, value in row.items() if key not in taken}, **renamed}


def _known_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.suffix.lower() in READERS and path.is_file():
            yield path


def _checked_file(path: Path) -> Path:
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix.lower() in READERS)[:5]
        hint = f"data files in that folder: {', '.join(near)}" if near else "check data.train.path in the recipe"
        raise DataError(f"{path}: no such file", hint)
    if not path.is_file():
        raise DataError(f"{path}: not a regular file", "name a file, a folder or a pattern")
    if path.suffix.lower() not in READERS:
        ending = path.suffix or "no ending"
        raise DataError(f"{path}: unknown kind of file ({ending})", f"known endings: {', '.join(READERS)}")
    return path
