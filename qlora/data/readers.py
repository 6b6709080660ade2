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
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple, TextIO

from qlora.data.limits import MAX_ROW_BYTES
from qlora.data.parquet import parquet_rows
from qlora.data.row_json import (
    RowError,
    RowTooLong,
    UniqueKeys,
    check_value,
    finite_number,
    kind_of,
    load_json,
    number_error,
    reject_constant,
)
from qlora.data.source_files import SourceFile
from qlora.data.text_pieces import blocks
from qlora.errors import DataError

MAX_COLUMNS = 10_000  # of a table: each row becomes an object with as many keys
_CHUNK_CHARS = 1 << 20
_SIGNS = re.compile(r"\\.|[\"\[\]{},]", re.DOTALL)
_SEPARATORS = (",", ";", "\t", "|")  # of a table whose first line has several names by one of them
_ARRAY_IN_OBJECT = re.compile(r'\s*\{\s*"(\w{1,40})"\s*:\s*\[\s*\{')
_SPACE = re.compile(r"[ \t\r\n]*")


class Line(NamedTuple):
    """A line of a file with a JSON object on each, not parsed yet: whoever wants the row does that, in any process."""

    data: bytes

    def row(self) -> dict[str, Any] | RowError:
        """The object on it, or why there is none."""
        return _json_object(self.data)


class Item(NamedTuple):
    """What stands at a row's place: the row, its line, or why there is none.

    `number`: line of a text file, else rows counted from 1. `read_bytes`: how far into the file it ends, about.
    """

    number: int
    row: dict[str, Any] | RowError | Line
    read_bytes: int


def _jsonl(file: SourceFile) -> Iterator[Item]:
    read_bytes = number = 0
    with file.open() as lines:
        while line := lines.readline(MAX_ROW_BYTES + 1):
            read_bytes += len(line)
            number += 1
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):  # its rest, in pieces
                    line = lines.readline(_CHUNK_CHARS)
                    read_bytes += len(line)
                yield Item(number, _too_long("line"), read_bytes)
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Item(number, Line(line), read_bytes)


def _json_object(line: bytes) -> dict[str, Any] | RowError:
    try:
        return _as_row(load_json(line.decode().strip()))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 text at byte {error.start + 1} of the line")
    except RowError as error:
        hint = "a .jsonl file has one JSON object a line: write it anew, or give it the ending of what it is"
        return RowError(error.reason, file_hint=hint)


def _as_row(value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, dict):
        return value
    hint = 'each row is an object with names: {"messages": […]}, or {"text": "…"}'
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        if all({"role", "from"} & set(turn) for turn in value):
            return {"messages": value}  # a conversation without an object around it
        hint = "an array of rows is a .json file: give it that ending, or write a row a line"
    return RowError(f"not a JSON object but {'null' if value is None else kind_of(value)}", file_hint=hint)


def _too_long(place: str) -> RowTooLong:
    return RowTooLong(f"over {MAX_ROW_BYTES >> 20} MiB in one {place}")


def _json(file: SourceFile) -> Iterator[Item]:
    """One array of objects; a .json file that does not begin with a bracket is read a row per line."""
    with file.open() as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as text:
        head = text.read(_CHUNK_CHARS)
        if head.lstrip()[:1] == "[":
            yield from _ArrayReader(text, file.name, head).items()
            return
    if head.partition("\n")[0].strip() == "{":
        what = f"{file.name}:1: one object over several lines, not rows"
        hint = "a .json file holds one array of rows, or one row per line"
        if inner := _ARRAY_IN_OBJECT.match(head):
            hint = f"if its rows are the objects in {inner[1]}, write that array alone; {hint}"
        raise DataError(what, hint)
    yield from _jsonl(file)


class _ArrayReader:
    """Reads the elements of a JSON array one by one, without keeping the file: a window slides over the text."""

    def __init__(self, text: TextIO, name: str, head: str) -> None:
        self.text = text
        self.name = name
        self.window = head
        self.at = 0  # place in the window
        self.line = 1  # line of the file at that place
        self.read_chars = len(head)
        self.keys = UniqueKeys()
        self.decoder = json.JSONDecoder(
            parse_constant=reject_constant, parse_float=finite_number, object_pairs_hook=self.keys
        )

    def items(self) -> Iterator[Item]:
        self._next_sign()
        sign = self._next_sign(behind=1)  # of the opening bracket
        while sign != "]":
            line, row = self.line, self._row()
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

    def _row(self) -> dict[str, Any] | RowError:
        try:
            row = _as_row(self._element())
            self.keys.check()
            check_value(row)
        except RowTooLong as error:
            self._skip()
            return error
        except RowError as error:
            return error
        return row

    def _skip(self) -> None:
        """Go behind an element of any size without making it. Raises DataError when the file ends in it."""
        depth, in_text = 0, False
        while True:
            end = self.at
            for sign in _SIGNS.finditer(self.window, self.at):
                end = sign.end()
                if sign[0] == '"':
                    in_text = not in_text
                elif not in_text and sign[0] in "[{":
                    depth += 1
                elif not in_text and sign[0] in "]},":
                    depth -= sign[0] != ","
                    if depth < 0 or (depth == 0 and sign[0] == ","):  # of the array around it
                        self._advance(sign.start())
                        return
            # A backslash at the window's edge belongs to the sign that follows it.
            kept = 1 if end < len(self.window) and self.window.endswith("\\") else 0
            self._advance(len(self.window) - kept)
            if not self._fill():
                raise self._broken("the file ends within a row")

    def _element(self) -> Any:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.window, self.at)
            except json.JSONDecodeError as error:
                self.keys.twice = None
                if self._fill():
                    continue  # it may only be cut off by the window's edge
                self.line += self.window.count("\n", self.at, error.pos)
                raise self._broken(error.msg) from None
            except RecursionError:
                raise self._broken("nested too deep to read") from None
            except ValueError as error:
                raise self._broken(number_error(error)) from None
            if len(self.window) - end < 3 and self._fill():
                continue  # a number at the edge may go on: 1 and .5, 1 and e+5
            if end - self.at > MAX_ROW_BYTES:
                raise _too_long("row")
            self._advance(end)
            return value

    def _advance(self, to: int) -> None:
        self.line += self.window.count("\n", self.at, to)
        self.at = to

    def _fill(self) -> bool:
        """Read on; at least as much as is in the window, so that a long element is not scanned over and over."""
        rest = self.window[self.at :]
        if len(rest) > MAX_ROW_BYTES:
            raise _too_long("row")
        if more := self.text.read(max(_CHUNK_CHARS, min(len(rest), MAX_ROW_BYTES - len(rest)))):
            self.window, self.at = rest + more, 0
            self.read_chars += len(more)
        return bool(more)

    def _broken(self, reason: str) -> DataError:
        hint = "repair the array (nothing after a break can be read), or use .jsonl: one row a line"
        return DataError(f"{self.name}:{self.line}: broken JSON: {reason}", hint)


class _Lines:
    """The lines of a text for the csv module, not more of them for one row than it may be large."""

    def __init__(self, text: TextIO) -> None:
        self.text = text
        self.row_chars = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.text.readline(MAX_ROW_BYTES + 1)
        self.row_chars += len(line)
        if self.row_chars > MAX_ROW_BYTES:
            while line and not line.endswith("\n"):  # its rest, in pieces
                line = self.text.readline(_CHUNK_CHARS)
            raise _too_long("row")
        if not line:
            raise StopIteration
        return line


def _csv(file: SourceFile) -> Iterator[Item]:
    csv.field_size_limit(MAX_ROW_BYTES)  # the module's default stops at 128 KiB a cell
    with file.open() as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
        lines = _Lines(text)
        separator, head, skipped = _separator(lines, "\t" if file.ending == ".tsv" else ",", file.name)
        reader = csv.reader(chain(head, lines), delimiter=separator, strict=True)
        header = _csv_header(reader, file.name)
        while True:
            number, lines.row_chars = reader.line_num + 1 + skipped, 0
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                large = "field limit" in str(error)
                yield Item(number, _too_long("cell") if large else RowError(f"broken CSV: {error}"), raw.tell())
                continue
            except RowTooLong as error:
                yield Item(number, error, raw.tell())
                continue
            if cells:
                yield Item(number, _csv_row(header, cells), raw.tell())


def _separator(lines: _Lines, usual: str, name: str) -> tuple[str, list[str], int]:
    """What separates the cells: what makes the most names of the first line, or Excel's own line `sep=;` says.

    With it the first line, which is read by now, and how many lines stood before it.
    """
    try:
        first = next(lines, "")
        told = re.fullmatch(r"sep=(.)\r?\n", first)
        if told:
            return told[1], [], 1
        counts = {sign: len(next(csv.reader([first], delimiter=sign), [])) for sign in (usual, *_SEPARATORS)}
    except (csv.Error, RowTooLong) as error:
        raise _broken_header(name, error) from None
    return max(counts, key=lambda sign: counts[sign]), [first] if first else [], 0


def _broken_header(name: str, error: Exception) -> DataError:
    return DataError(f"{name}:1: broken header: {error}", "the first line names the columns")


def _csv_header(reader: Iterator[list[str]], name: str) -> list[str]:
    """The names of the columns; one without a name, such as the index that pandas writes, is known by its number."""
    try:
        header = next(reader, [])
    except (csv.Error, RowTooLong) as error:
        raise _broken_header(name, error) from None
    if len(header) > MAX_COLUMNS:
        hint = "keep the columns that the rows are made of"
        raise DataError(f"{name}:1: {len(header):,} columns are too many (at most {MAX_COLUMNS:,})", hint)
    header = [column if column.strip() else f"unnamed column {number}" for number, column in enumerate(header, 1)]
    if len(set(header)) != len(header):
        twice = next(column for column in header if header.count(column) > 1)
        raise DataError(f"{name}:1: two columns have the same name: {twice[:40]}", "give each column its own name")
    return header


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    if len(cells) != len(header):
        what = f"{len(cells):,} cells, but the header names {len(header):,} columns"
        hint = "name every column in the first line, and put cells that hold the separator or a line break in quotes"
        return RowError(what, file_hint=hint)
    if any("\0" in cell for cell in cells):
        return RowError("a text holds a NUL character")
    return dict(zip(header, cells, strict=True))


def _parquet(file: SourceFile) -> Iterator[Item]:
    yield from (Item(*item) for item in parquet_rows(file))


def _txt(file: SourceFile) -> Iterator[Item]:
    """The whole file is one row, a very large one several."""
    if file.size_bytes > MAX_ROW_BYTES:
        for number, block, read_bytes in blocks(file):
            yield Item(number, block if isinstance(block, RowError) else {"text": block}, read_bytes)
        return
    with file.open() as raw:
        text = raw.read().decode("utf-8-sig").replace("\r\n", "\n")
    nul = RowError("a text holds a NUL character") if "\0" in text else None
    yield Item(1, nul or {"text": text}, file.size_bytes)


READERS: dict[str, Callable[[SourceFile], Iterator[Item]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _parquet,
    ".txt": _txt,
}
