"""A large plain text as rows: cut at its blank lines, else at line ends, else between words, never within one.

A `.txt` file is one row where it fits into `max_length` tokens. A book does not, and would be left out whole: it is
made rows of as many paragraphs as fit, in their order, each known by the line of the file on which it begins. A file
over MAX_ROW_BYTES is read in blocks of whole paragraphs first (`blocks`), so that it is never held as one text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from qlora.data.limits import MAX_ROW_BYTES
from qlora.data.row_json import RowError, RowTooLong
from qlora.data.source_files import SourceFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_BYTES = 1 << 20
SPARE_TOKENS = 4  # of a row: BOS, EOS, and what a tokenizer may join otherwise where paragraphs meet
_COUNTED_TEXTS = 1_000  # in one call of the tokenizer
# Where a text may be cut, the best place first; what stands between two rows is in neither.
_BREAKS = (re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+"), re.compile(r"\n"), re.compile(r"\s+"))
Counter = Callable[[Sequence[str]], list[int]]  # tokens of each text by itself


def blocks(file: SourceFile) -> Iterator[tuple[int, str | RowError, int]]:
    """A text of any size as (line, text, bytes read so far): of whole paragraphs as far as these are not too large.

    Raises UnicodeDecodeError for what is no UTF-8.
    """
    kept: list[bytes] = []
    size = read_bytes = 0
    first = number = 1
    with file.open() as lines:
        while line := lines.readline(MAX_ROW_BYTES + 1):
            read_bytes += len(line)
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):  # its rest, in pieces
                    line = lines.readline(BLOCK_BYTES)
                    read_bytes += len(line)
                yield number, RowTooLong(f"over {MAX_ROW_BYTES >> 20} MiB in one line"), read_bytes
            else:
                kept.append(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                size += len(line)
            number += 1
            if size > MAX_ROW_BYTES // 2 or (size > BLOCK_BYTES and not line.strip()):
                yield first, _text(kept), read_bytes
                kept, size, first = [], 0, number
    if b"".join(kept).strip():
        yield first, _text(kept), read_bytes


def is_text_file(where: str) -> bool:
    """Whether a row that stands at `where`, its `file:line`, is one of a text file."""
    return where.rpartition(":")[0].lower().endswith(".txt")


def cut(text: str, where: str, limit: int, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """(`file:line`, piece) of a text that begins at `where`: as much as fits into `limit` tokens with BOS and EOS.

    A word of more tokens than that is a piece of its own.
    """

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]

    name, _, first = where.rpartition(":")
    found, line, at = [], int(first), 0
    for start, end in _spans(text, 0, len(text), limit - SPARE_TOKENS, count):
        line += text.count("\n", at, start)
        at = start
        found.append((f"{name}:{line}", text[start:end]))
    return found


def _spans(text: str, start: int, end: int, limit: int, count: Counter, level: int = 0) -> Iterator[tuple[int, int]]:
    """Parts of text[start:end] within the limit, cut at the breaks of `level`, those too large at the next ones."""
    parts = list(_parts(text, start, end, _BREAKS[level]))
    # A part is counted with the break behind it: what is joined has at most as many tokens as its parts together.
    ends = [*(begin for begin, _ in parts[1:]), end]
    sizes: list[int] = []
    for at in range(0, len(parts), _COUNTED_TEXTS):
        chunk = zip(parts[at : at + _COUNTED_TEXTS], ends[at : at + _COUNTED_TEXTS], strict=True)
        sizes += count([text[begin:stop] for (begin, _), stop in chunk])
    open_at, total = None, 0
    last = start
    for (begin, stop), size in zip(parts, sizes, strict=True):
        if open_at is not None and total + size > limit:
            yield open_at, last
            open_at, total = None, 0
        if size > limit and level + 1 < len(_BREAKS):
            yield from _spans(text, begin, stop, limit, count, level + 1)
            continue
        open_at, total, last = begin if open_at is None else open_at, total + size, stop
    if open_at is not None:
        yield open_at, last


def _parts(text: str, start: int, end: int, breaks: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """The parts of text[start:end] between breaks, without those that are blank."""
    for found in breaks.finditer(text, start, end):
        if text[start : found.start()].strip():
            yield start, found.start()
        start = found.end()
    if text[start:end].strip():
        yield start, end


def _text(lines: Sequence[bytes]) -> str | RowError:
    text = b"".join(lines).decode().replace("\r\n", "\n")
    return RowError("a text holds a NUL character") if "\0" in text else text
