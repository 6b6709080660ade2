"""Files to rows, each with the `file:line` it came from.

A row stays the JSON object that stands in the file: it never passes through an Arrow schema, which would fill in
nulls for keys that other rows have. A broken line is handed to `on_bad` and reading goes on after it; a file that
cannot be read on (a broken array, a wrong encoding) raises DataError, since the rest of it would be lost in silence.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora.data.formats import RowError, check_text, kind_of, load_json, reject_constant
from qlora.errors import DataError

if TYPE_CHECKING:
    from qlora.recipe.sections import SourceSection

OnBad = Callable[[str, str], None]  # (file:line, reason)

_CHUNK_CHARS = 1 << 20
_PARQUET_ROWS = 256
# No row may be larger: a file without line breaks, or a cell without an end, would be read into memory whole.
MAX_ROW_BYTES = 1 << 28
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class SourceRow:
    """One row as it stands in its file. `read_bytes`: how far into `file` it ends, for progress bars."""

    row: dict[str, Any]
    where: str
    file: Path
    read_bytes: int


class _Item(NamedTuple):
    """What a reader yields: a row or, in its place, the reason why there is none."""

    number: int
    row: dict[str, Any] | RowError
    read_bytes: int


def source_files(source: SourceSection) -> list[Path]:
    """The files of a source, sorted. Raises DataError when there are none or one is of an unknown kind."""
    if source.path.startswith("hub:"):
        raise DataError(
            f"{source.path}: data sets of the hub are not read", "download it, and name the file or folder in path"
        )
    path = Path(source.path)
    if path.is_dir():
        files = sorted(_known_files(path))
        if not files:
            raise DataError(f"{path}: no data file in this folder", f"known endings: {', '.join(_READERS)}")
        return files
    if path.exists() or not glob.has_magic(source.path):
        return [_checked_file(path)]
    files = sorted(Path(name) for name in glob.glob(source.path, recursive=True) if not os.path.isdir(name))
    if not files:
        raise DataError(f"{source.path}: no file matches", "check the pattern; it is relative to the recipe's folder")
    return [_checked_file(file) for file in files]


def read_rows(source: SourceSection, on_bad: OnBad) -> Iterator[SourceRow]:
    """Every row of a source, in the order of its files, with the source's columns renamed to the format's own.

    `on_bad(where, reason)` is called in a broken row's place. Raises DataError for a file that cannot be read on,
    and when a column to be renamed is in no row at all.
    """
    unseen = set(source.columns.values())
    for file in source_files(source):
        name = file_name(source, file)
        for number, row, read_bytes in _items(file, name):
            where = f"{name}:{number}"
            if isinstance(row, RowError):
                on_bad(where, row.reason)
                continue
            if source.columns:
                unseen.difference_update(row)
                row = _renamed(row, source.columns)
            yield SourceRow(row, where, file, read_bytes)
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


def _items(file: Path, name: str) -> Iterator[_Item]:
    """A file's rows. Raises DataError when it cannot be opened, is empty, or breaks off."""
    try:
        with file.open("rb") as raw:
            start = raw.read(4)
        if not start:
            raise DataError(f"{name}: the file is empty", "remove it, or name the right file in path")
        if start[:2] in _UTF16_MARKS:
            raise DataError(f"{name}: this is UTF-16 text", "save it as UTF-8")
        for item in _READERS[file.suffix.lower()](file, name):
            yield _checked_item(item)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})", "check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text ({error.reason})", "save it as UTF-8") from error


def _checked_item(item: _Item) -> _Item:
    if isinstance(item.row, RowError):
        return item
    try:
        check_text(item.row)
    except RowError as error:
        return item._replace(row=error)
    return item


def _jsonl(file: Path, name: str) -> Iterator[_Item]:
    read_bytes = number = 0
    with file.open("rb") as lines:
        while line := lines.readline(MAX_ROW_BYTES + 1):
            read_bytes += len(line)
            number += 1
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):  # its rest, in pieces
                    line = lines.readline(_CHUNK_CHARS)
                    read_bytes += len(line)
                yield _Item(number, RowError(f"over {MAX_ROW_BYTES >> 20} MiB in one line"), read_bytes)
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _Item(number, _json_object(line), read_bytes)


def _json_object(line: bytes) -> dict[str, Any] | RowError:
    try:
        value = load_json(line.decode().strip())
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 text at byte {error.start + 1} of the line")
    except RowError as error:
        return error
    return value if isinstance(value, dict) else RowError(f"not a JSON object but {_json_kind(value)}")


def _json(file: Path, name: str) -> Iterator[_Item]:
    """One array of objects; a .json file that starts with an object is read a row per line."""
    with file.open(encoding="utf-8-sig") as text:
        first = text.read(_CHUNK_CHARS).lstrip()[:1]
    if first != "[":
        with file.open("rb") as lines:
            opening = lines.readline().removeprefix(b"\xef\xbb\xbf").strip()
        if opening == b"{":
            raise DataError(
                f"{name}:1: one object over several lines, not rows",
                "a .json file holds one array of rows, or one row per line",
            )
        yield from _jsonl(file, name)
        return
    with file.open(encoding="utf-8-sig") as text:
        yield from _ArrayReader(text, name).items()


class _ArrayReader:
    """Reads the elements of a JSON array one by one, without holding the file: a window slides over the text."""

    def __init__(self, text: Any, name: str) -> None:
        self.text = text
        self.name = name
        self.window = ""
        self.at = 0  # place in the window
        self.line = 1  # line of the file at that place
        self.read_chars = 0
        self.decoder = json.JSONDecoder(parse_constant=reject_constant)

    def items(self) -> Iterator[_Item]:
        self._skip_space()
        self._advance(self.at + 1)  # the opening bracket
        self._skip_space()
        if self._peek() == "]":
            self._finish()
            return
        while True:
            line, value = self.line, self._element()
            row = value if isinstance(value, dict) else RowError(f"not a JSON object but {_json_kind(value)}")
            yield _Item(line, row, self.read_chars)
            self._skip_space()
            separator = self._peek()
            if separator not in (",", "]"):
                found = repr(separator) if separator else "the end of the file"
                raise self._broken(f"expected a comma or ] after a row, found {found}")
            if separator == "]":
                self._finish()
                return
            self._advance(self.at + 1)
            self._skip_space()

    def _element(self) -> Any:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.window, self.at)
            except json.JSONDecodeError as error:
                # It may only be cut off by the window's edge: then more text tells.
                if self._fill():
                    continue
                self.line += self.window.count("\n", self.at, error.pos)
                raise self._broken(error.msg) from None
            except RecursionError:
                raise self._broken("nested too deep to read") from None
            except ValueError as error:
                raise self._broken(str(error)) from None
            if len(self.window) - end < 3 and self._fill():
                continue  # a number at the edge may go on: 1 and .5, 1 and e+5
            self._advance(end)
            return value

    def _finish(self) -> None:
        self._advance(self.at + 1)
        self._skip_space()
        if self._peek():
            raise self._broken("text after the end of the array")

    def _peek(self) -> str:
        return self.window[self.at : self.at + 1]

    def _skip_space(self) -> None:
        while True:
            end = self.at
            while end < len(self.window) and self.window[end] in " \t\r\n":
                end += 1
            self._advance(end)
            if self.at < len(self.window) or not self._fill():
                return

    def _advance(self, to: int) -> None:
        self.line += self.window.count("\n", self.at, to)
        self.at = to

    def _fill(self) -> bool:
        """Read on; at least as much as is held, so that a long element is not scanned over and over."""
        if len(self.window) - self.at > MAX_ROW_BYTES:
            raise self._broken(f"over {MAX_ROW_BYTES >> 20} MiB in one row")
        more = self.text.read(max(_CHUNK_CHARS, len(self.window) - self.at))
        if not more:
            return False
        self.window = self.window[self.at :] + more
        self.at = 0
        self.read_chars += len(more)
        return True

    def _broken(self, reason: str) -> DataError:
        return DataError(
            f"{self.name}:{self.line}: broken JSON: {reason}",
            "repair the array (nothing after a break can be read), or use .jsonl: one row a line",
        )


def _csv(file: Path, name: str) -> Iterator[_Item]:
    csv.field_size_limit(MAX_ROW_BYTES)  # the module's default stops at 128 KiB a cell
    with file.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{name}:1: broken header: {error}", "the first line names the columns") from None
        if len(set(header)) != len(header) or not all(column.strip() for column in header):
            raise DataError(f"{name}:1: a column has no name, or two have the same", "give each column its own name")
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield _Item(number, RowError(f"broken CSV: {error}"), raw.tell())
                continue
            if not cells:
                continue
            row: dict[str, Any] | RowError = dict(zip(header, cells, strict=False))
            if len(cells) != len(header):
                row = RowError(f"{len(cells)} cells, but the header names {len(header)} columns")
            yield _Item(number, row, raw.tell())


def _parquet(file: Path, name: str) -> Iterator[_Item]:
    import pyarrow
    import pyarrow.parquet

    size_bytes, number = file.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            total = table.metadata.num_rows
            for rows in table.iter_batches(batch_size=_PARQUET_ROWS):
                for row in rows.to_pylist():
                    number += 1
                    yield _Item(number, _without_nulls(row), size_bytes * number // total)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name}:{number + 1}: not a readable Parquet file: {reason}", "write it anew") from None


def _txt(file: Path, name: str) -> Iterator[_Item]:
    """The whole file is one row."""
    if file.stat().st_size > MAX_ROW_BYTES:
        raise DataError(f"{name}: a text of over {MAX_ROW_BYTES >> 20} MiB", "split it into smaller files")
    data = file.read_bytes()
    yield _Item(1, {"text": data.decode("utf-8-sig").replace("\r\n", "\n")}, len(data))


def _without_nulls(value: Any) -> Any:
    """A Parquet value without the nulls that its schema put where a row had no key."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """`columns` gives the row's column by the format's own name; what is renamed hides a column of that name."""
    renamed = {own: row[theirs] for own, theirs in columns.items() if theirs in row}
    taken = set(columns.values())
    return {**{key: value for key, value in row.items() if key not in taken}, **renamed}


def _known_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.suffix.lower() in _READERS and path.is_file():
            yield path


def _checked_file(path: Path) -> Path:
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix.lower() in _READERS)[:5]
        hint = f"data files in that folder: {', '.join(near)}" if near else "check data.train.path in the recipe"
        raise DataError(f"{path}: no such file", hint)
    if not path.is_file():
        raise DataError(f"{path}: not a regular file", "name a file, a folder or a pattern")
    if path.suffix.lower() not in _READERS:
        ending = path.suffix or "no ending"
        raise DataError(f"{path}: unknown kind of file ({ending})", f"known endings: {', '.join(_READERS)}")
    return path


def _json_kind(value: Any) -> str:
    return "null" if value is None else kind_of(value)


_READERS: dict[str, Callable[[Path, str], Iterator[_Item]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
