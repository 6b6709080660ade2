"""One reader for each kind of file: its rows, or the reason why one is none, each with its place in the file.

A row stays the JSON object that stands in the file. A broken line takes one row's place and reading goes on after it; a
file that cannot be read on (a broken array, a bad header) raises DataError, since the rest of it would be lost in
silence. `READERS` is the table of endings: another kind of file is another line of it.

The elements of a JSON array are cut out here and parsed by Python's own `json`. ijson 3.6.0 was measured in its place:
its C parser turns half a surrogate pair into `?` in silence and crashes the process at a number of 4,301 digits; its
Python parser reads 7 MB/s (ours 52); and neither gives the line on which an element begins.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from qlora.data.formats import RowError, kind_of, load_json, reject_constant
from qlora.errors import DataError

# No row may be larger: a file without line breaks, or a cell without an end, would be read into memory whole.
MAX_ROW_BYTES = 1 << 28
_CHUNK_CHARS = 1 << 20
_PARQUET_ROWS = 256
_SPACE = re.compile(r"[ \t\r\n]*")


class Item(NamedTuple):
    """What stands at a row's place: the row, or why there is none.

    `number`: line of a text file, else rows counted from 1. `read_bytes`: how far into the file it ends, about.
    """

    number: int
    row: dict[str, Any] | RowError
    read_bytes: int


def _jsonl(file: Path, name: str) -> Iterator[Item]:
    read_bytes = number = 0
    with file.open("rb") as lines:
        while line := lines.readline(MAX_ROW_BYTES + 1):
            read_bytes += len(line)
            number += 1
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):  # its rest, in pieces
                    line = lines.readline(_CHUNK_CHARS)
                    read_bytes += len(line)
                yield Item(number, RowError(f"over {MAX_ROW_BYTES >> 20} MiB in one line"), read_bytes)
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Item(number, _json_object(line), read_bytes)


def _json_object(line: bytes) -> dict[str, Any] | RowError:
    try:
        return _as_row(load_json(line.decode().strip()))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 text at byte {error.start + 1} of the line")
    except RowError as error:
        return error


def _as_row(value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, dict):
        return value
    return RowError(f"not a JSON object but {'null' if value is None else kind_of(value)}")


def _json(file: Path, name: str) -> Iterator[Item]:
    """One array of objects; a .json file that does not begin with a bracket is read a row per line."""
    with file.open(encoding="utf-8-sig") as text:
        head = text.read(_CHUNK_CHARS)
        if head.lstrip()[:1] == "[":
            yield from _ArrayReader(text, name, head).items()
            return
    if head.partition("\n")[0].strip() == "{":
        what = f"{name}:1: one object over several lines, not rows"
        raise DataError(what, "a .json file holds one array of rows, or one row per line")
    yield from _jsonl(file, name)


class _ArrayReader:
    """Reads the elements of a JSON array one by one, without keeping the file: a window slides over the text."""

    def __init__(self, text: TextIO, name: str, head: str) -> None:
        self.text = text
        self.name = name
        self.window = head
        self.at = 0  # place in the window
        self.line = 1  # line of the file at that place
        self.read_chars = len(head)
        self.decoder = json.JSONDecoder(parse_constant=reject_constant)

    def items(self) -> Iterator[Item]:
        self._next_sign()
        sign = self._next_sign(behind=1)  # of the opening bracket
        while sign != "]":
            line, row = self.line, _as_row(self._element())
            yield Item(line, row, self.read_chars)
            if (sign := self._next_sign()) not in (",", "]"):
                found = repr(sign) if sign else "the end of the file"
                raise self._broken(f"expected a comma or ] after a row, found {found}")
            if sign == ",":
                self._next_sign(behind=1)
        if self._next_sign(behind=1):
            raise self._broken("text after the end of the array")

    def _next_sign(self, behind: int = 0) -> str:
        """Go to the next character that is no white space, from `behind` characters on; "" at the end of the file."""
        self._advance(self.at + behind)
        while True:
            space = _SPACE.match(self.window, self.at)
            self._advance(space.end() if space else self.at)
            if self.at < len(self.window) or not self._fill():
                return self.window[self.at : self.at + 1]

    def _element(self) -> Any:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.window, self.at)
            except json.JSONDecodeError as error:
                if self._fill():
                    continue  # it may only be cut off by the window's edge
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

    def _advance(self, to: int) -> None:
        self.line += self.window.count("\n", self.at, to)
        self.at = to

    def _fill(self) -> bool:
        """Read on; at least as much as is in the window, so that a long element is not scanned over and over."""
        rest = self.window[self.at :]
        if len(rest) > MAX_ROW_BYTES:
            raise self._broken(f"over {MAX_ROW_BYTES >> 20} MiB in one row")
        if more := self.text.read(max(_CHUNK_CHARS, len(rest))):
            self.window, self.at = rest + more, 0
            self.read_chars += len(more)
        return bool(more)

    def _broken(self, reason: str) -> DataError:
        hint = "repair the array (nothing after a break can be read), or use .jsonl: one row a line"
        return DataError(f"{self.name}:{self.line}: broken JSON: {reason}", hint)


def _csv(file: Path, name: str) -> Iterator[Item]:
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
                yield Item(number, RowError(f"broken CSV: {error}"), raw.tell())
                continue
            row: dict[str, Any] | RowError = dict(zip(header, cells, strict=False))
            if len(cells) != len(header):
                row = RowError(f"{len(cells)} cells, but the header names {len(header)} columns")
            if cells:
                yield Item(number, row, raw.tell())


def _parquet(file: Path, name: str) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    size_bytes, number = file.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            total = table.metadata.num_rows
            for rows in table.iter_batches(batch_size=_PARQUET_ROWS):
                for row in rows.to_pylist():
                    number += 1
                    yield Item(number, _without_nulls(row), size_bytes * number // total)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name}:{number + 1}: not a readable Parquet file: {reason}", "write it anew") from None


def _txt(file: Path, name: str) -> Iterator[Item]:
    """The whole file is one row."""
    if file.stat().st_size > MAX_ROW_BYTES:
        raise DataError(f"{name}: a text of over {MAX_ROW_BYTES >> 20} MiB", "split it into smaller files")
    data = file.read_bytes()
    yield Item(1, {"text": data.decode("utf-8-sig").replace("\r\n", "\n")}, len(data))


def _without_nulls(value: Any) -> Any:
    """A Parquet value without the nulls that its schema put where a row had no key."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# By the ending of a file: (file, its name in messages) to its rows, in order. Raises DataError.
READERS: dict[str, Callable[[Path, str], Iterator[Item]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
