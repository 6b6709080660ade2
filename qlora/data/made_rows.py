"""A batch of raw rows to rows of tokens: one function of the batch alone, here or in a process of its own.

What is counted over all rows, and which row is one bad row too many, is decided by whoever asked, in the order of the
rows (`prepare.py`). So it does not matter how many processes make the batches, or which of them is ready first.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora.data import judged_rows
from qlora.data.chat import ChatTokenizer, TokenRow
from qlora.data.column_words import Reading
from qlora.data.control_tokens import told
from qlora.data.conversations import conversation_of
from qlora.data.formats import Conversation
from qlora.data.limits import TextLimits
from qlora.data.parquet import as_marked, unmarked
from qlora.data.readers import Line
from qlora.data.row_json import RowError, RowTooLong
from qlora.data.sources import named_row
from qlora.data.text_pieces import cut, is_text_file
from qlora.data.token_cache import MadeRow
from qlora.data.unread import Remark
from qlora.errors import QloraError, TokenizerError
from qlora.objective_keys import JUDGED

Raw = dict[str, Any] | RowError | Line


@dataclass(frozen=True)
class RawBatch:
    """Rows of one source as they stand in its files, with their `file:line`.

    `readings`: how files are read whose format is known by now; a file's rows are in a batch only when it is, but for
    such as have no format. `read_bytes` of `total_bytes` of the source are read with it; `last`: it has no more.
    """

    source: int
    format: str
    columns: Mapping[str, str]
    readings: Mapping[str, Reading]
    rows: Sequence[tuple[str, Raw]]
    read_bytes: int
    total_bytes: int
    last: bool = False


@dataclass
class MadeBatch:
    """What became of a batch. `rows`: `file:line` and the row, or why there is none; a text that was cut is several.

    remarks   of each row that has any: its `file:line`, and what there is to say
    pieces    `file:line` of each text that was cut, and into how many rows
    dropped   what the template left out of trained answers, by kind (dropped.py)
    tools     whether tools were met which the template does not show the model
    bounds    that the template left while it rendered these rows, each by force
    error     what ended the making; the rows are worth nothing then
    """

    rows: list[tuple[str, MadeRow | RowError]] = field(default_factory=list)
    remarks: list[tuple[str, tuple[Remark, ...]]] = field(default_factory=list)
    pieces: list[tuple[str, int]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    tools: bool = False
    bounds: list[str] = field(default_factory=list)
    error: QloraError | None = None


class RowMaker:
    """Makes batches with one ChatTokenizer. `max_length`: where texts are cut, in tokens."""

    def __init__(self, chat: ChatTokenizer, limits: TextLimits, max_length: int) -> None:
        self.chat, self.limits, self.max_length = chat, limits, max_length

    def made(self, batch: RawBatch) -> MadeBatch:
        """Never raises what the rows, the template or the tokenizer are to blame for: it is the batch's `error`."""
        made, chat, is_document = MadeBatch(), self.chat, batch.format == "documents"
        dropped, bounds, chat.hidden_tools = chat.dropped.copy(), len(chat.bounds), False
        readings, items = dict(batch.readings), list[tuple[str, Conversation | RowError]]()
        for where, raw in batch.rows:
            item = conversation_of(named_row(raw, batch.columns), where, batch.format, readings)
            if isinstance(item, Conversation):
                item = told(chat, item, is_document)
                if item.remarks:
                    made.remarks.append((where, item.remarks))
            items.append((where, item))
        try:
            if batch.format in JUDGED:
                made.rows = list(judged_rows.rows(chat, self.limits, items))
            else:
                made.rows = list(self._rows(items, made, is_document))
        except TokenizerError as error:
            made.error = error
        made.dropped = dict(chat.dropped - dropped)
        made.bounds, made.tools = list(chat.bounds[bounds:]), chat.hidden_tools
        return made

    def _rows(
        self, batch: Sequence[tuple[str, Conversation | RowError]], made: MadeBatch, in_pieces: bool
    ) -> Iterator[tuple[str, MadeRow | RowError]]:
        batch = self.chat.as_served(batch, self.limits)
        good = [item for _, item in batch if isinstance(item, Conversation)]
        encoded = iter(self.chat.encode_many(good, self.limits))
        for where, item in batch:
            row = next(encoded) if isinstance(item, Conversation) else item
            if isinstance(item, Conversation) and (in_pieces or is_text_file(where)) and self._is_long(row):
                parts = cut(item.text or "", where, self.max_length, self.chat.tokenizer)
                if len(parts) > 1:
                    made.pieces.append((where, len(parts)))
                    texts = [(place, Conversation(text=text)) for place, text in parts]
                    yield from self._rows(texts, made, in_pieces)
                    continue
            if isinstance(row, TokenRow):
                assert isinstance(item, Conversation)
                yield where, MadeRow.of(row, item)
            else:
                yield where, row

    def _is_long(self, row: TokenRow | RowError) -> bool:
        return isinstance(row, RowTooLong) or (isinstance(row, TokenRow) and len(row.input_ids) > self.max_length)


# --- between processes ------------------------------------------------------------------------------------------------


def asked(batch: RawBatch) -> bytes:
    """A raw batch as bytes: a line of JSON, then all lines that are not parsed yet."""
    rows: list[list[Any]] = []
    lines: list[bytes] = []
    for where, raw in batch.rows:
        if isinstance(raw, RowError):
            rows.append(_error_as_json(where, raw))
        elif isinstance(raw, Line):
            lines.append(raw.data)
            rows.append([where, len(raw.data)])
        else:
            rows.append([where, raw])
    readings = {file: [reading.format, dict(reading.columns)] for file, reading in batch.readings.items()}
    place = [batch.source, batch.format, dict(batch.columns)]
    head = json.dumps([place, readings, rows, batch.read_bytes, batch.total_bytes, batch.last], default=as_marked)
    return b"".join((head.encode(), b"\n", *lines))


def understood(data: bytes) -> RawBatch:
    """The batch that `asked` made into `data`."""
    head, _, rest = data.partition(b"\n")
    (source, format, columns), readings, rows, *read = json.loads(head, object_hook=unmarked)
    at, found = 0, list[tuple[str, Raw]]()
    for row in rows:
        if len(row) != 2:
            found.append((row[0], _error_of_json(row)))
        elif isinstance(row[1], int):
            found.append((row[0], Line(rest[at : at + row[1]])))
            at += row[1]
        else:
            found.append((row[0], row[1]))
    known = {file: Reading(*values) for file, values in readings.items()}
    return RawBatch(source, format, columns, known, found, *read)


def _error_as_json(where: str, error: RowError) -> list[Any]:
    return [where, error.reason, error.hint, error.file_hint, isinstance(error, RowTooLong)]


def _error_of_json(row: Sequence[Any]) -> RowError:
    return (RowTooLong if row[4] else RowError)(*row[1:4])


def packed(made: MadeBatch) -> bytes:
    """A made batch as bytes: a line of JSON, then all token ids, all weights, and all prompts."""
    rows: list[list[Any]] = []
    ids, weights, prompts = array("i"), array("f"), list[bytes]()
    for where, row in made.rows:
        if isinstance(row, RowError):
            rows.append(_error_as_json(where, row))
            continue
        ids += row.ids
        weights += row.weights
        prompts.append(row.prompt.encode())
        rows.append([where, len(row.ids), len(prompts[-1])])
    error = made.error and [made.error.what, made.error.hint]
    counted = [made.remarks, made.pieces, made.dropped, made.tools, made.bounds, error]
    head = json.dumps([rows, *counted]).encode()
    return b"".join((head, b"\n", ids.tobytes(), weights.tobytes(), *prompts))


def unpacked(data: bytes) -> MadeBatch:
    """The batch that `packed` made into `data`."""
    head, _, rest = data.partition(b"\n")
    rows, remarks, pieces, dropped, tools, bounds, error = json.loads(head)
    tokens, at = sum(row[1] for row in rows if len(row) == 3), 0
    ids, weights = array("i"), array("f")
    ids.frombytes(rest[: 4 * tokens])
    weights.frombytes(rest[4 * tokens : 8 * tokens])
    prompts_at, found = 8 * tokens, list[tuple[str, MadeRow | RowError]]()
    for row in rows:
        if len(row) != 3:
            found.append((row[0], _error_of_json(row)))
            continue
        where, length, prompt_bytes = row
        prompt = rest[prompts_at : prompts_at + prompt_bytes].decode()
        found.append((where, MadeRow(ids[at : at + length], weights[at : at + length], prompt)))
        at, prompts_at = at + length, prompts_at + prompt_bytes
    said = [(where, tuple(Remark(*remark) for remark in of_row)) for where, of_row in remarks]
    cuts = [(where, count) for where, count in pieces]
    return MadeBatch(found, said, cuts, Counter(dropped), tools, bounds, TokenizerError(*error) if error else None)
