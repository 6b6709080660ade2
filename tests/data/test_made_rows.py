"""What a batch becomes, and that it comes through a pipe as it was."""

from __future__ import annotations

from qlora.data.column_words import Reading
from qlora.data.limits import TextLimits
from qlora.data.made_rows import MadeBatch, RawBatch, RowMaker, asked, packed, understood, unpacked
from qlora.data.parquet import ParquetValue
from qlora.data.readers import Line
from qlora.data.row_json import RowError, RowTooLong
from qlora.data.token_cache import MadeRow
from qlora.errors import TokenizerError
from tests.data.cases import GOOD, GOOD_LINE
from tests.data.toys import family_chat


def batch_of(*rows: object, format: str = "auto") -> RawBatch:
    placed = [(f"a.jsonl:{number}", row) for number, row in enumerate(rows, 1)]
    return RawBatch(0, format, {}, {"a.jsonl": Reading("messages")}, placed, 0, 0)  # type: ignore[arg-type]


def test_rows_errors_remarks_and_counts_of_a_batch() -> None:
    long = RowTooLong("over 8 MiB in one line")
    odd = {**GOOD, "odd": 3}
    maker = RowMaker(family_chat("qwen2"), TextLimits(), 64)
    made = maker.made(batch_of(Line(GOOD_LINE.encode()), Line(b"{broken"), long, odd))
    (first, row), (second, error), (_, too_long), (_, other) = made.rows
    assert (
        isinstance(row, MadeRow) and first == "a.jsonl:1" and len(row.ids) == len(row.weights) and '"It."' in row.prompt
    )
    assert isinstance(error, RowError) and second == "a.jsonl:2" and too_long is long and other == row
    assert [(where, [remark.name for remark in said]) for where, said in made.remarks] == [("a.jsonl:4", ["odd"])]
    again = unpacked(packed(made))
    assert again.rows[0] == made.rows[0] and again.rows[3] == made.rows[3] and again.remarks == made.remarks
    assert [type(row) for _, row in again.rows] == [MadeRow, RowError, RowTooLong, MadeRow]
    assert vars(again.rows[1][1]) == vars(error)


def test_a_text_that_is_cut_and_an_error_come_through() -> None:
    maker = RowMaker(family_chat("qwen2"), TextLimits(), 16)
    text = {"text": "\n\n".join(f"Paragraph {number}." for number in range(20))}
    rows = RawBatch(0, "documents", {}, {}, [("a.md:1", text)], 0, 0)
    made = maker.made(rows)
    assert len(made.rows) > 4 and made.pieces == [("a.md:1", len(made.rows))]
    failed = MadeBatch(error=TokenizerError("what", "hint"), bounds=["it takes long"], tools=True, dropped={"long": 2})
    again = unpacked(packed(failed))
    assert again.error is not None and (again.error.what, again.error.hint) == ("what", "hint")
    assert (again.bounds, again.tools, dict(again.dropped)) == (["it takes long"], True, {"long": 2})
    assert unpacked(packed(made)).rows == made.rows and unpacked(packed(made)).pieces == made.pieces


def test_a_raw_batch_comes_through_as_it_was() -> None:
    lines = [Line(b'{"text": "\xe9 no UTF-8"}\n'), Line("größer\n".encode())]
    values = {"messages": [{"n": 1.5, "deep": [None, True, ParquetValue("bytes value")]}], "text": "🌧"}
    error = RowError("reason", "hint", "file hint")
    batch = batch_of(lines[0], values, error, lines[1], RowTooLong("long"))
    again = understood(asked(batch))
    assert [raw for _, raw in again.rows if not isinstance(raw, RowError)] == [lines[0], values, lines[1]]
    errors = [raw for _, raw in again.rows if isinstance(raw, RowError)]
    assert vars(errors[0]) == vars(error) and type(errors[1]) is RowTooLong
    assert again.readings == batch.readings and [where for where, _ in again.rows] == [where for where, _ in batch.rows]
