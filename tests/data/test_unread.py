"""What a row brings and nothing reads is named once a file, with its count."""

from __future__ import annotations

from qlora.data.unread import (
    CONTEXT,
    MAX_NAMES,
    MAX_SAID,
    NOT_ANSWERS,
    OTHERS,
    UNREAD,
    Counts,
    Ledger,
    Remark,
    count_remarks,
    first_of,
    notices,
)
from qlora.events import Notice


def test_keys_that_say_something_and_were_not_read_are_remarks_without_numbers() -> None:
    ledger = Ledger()
    row = ledger.open({"id": 3, "text": "a", "empty": "", "none": None, "blank": " ", "list": [], "zero": 0})
    assert row.get("text") == "a"
    for number in range(2):
        ledger.open({"score": 1}, f"messages[{number}].content[7]")
    assert ledger.remarks() == tuple(Remark(UNREAD, name) for name in ("id", "messages[].content[].score", "zero"))


def test_of_several_names_only_the_one_that_was_taken_is_read() -> None:
    ledger = Ledger()
    row = ledger.open({"a": "", "b": "x", "c": "y"})
    assert row.get("a", "b", "c") == "x" and row.peek("c") == "y"
    assert [remark.name for remark in ledger.remarks()] == ["c"]


def test_one_notice_a_file_and_kind_with_every_name_and_its_rows() -> None:
    counts: Counts = {}
    for row in range(3):
        count_remarks(counts, "a.jsonl", (Remark(UNREAD, "id"), *([Remark(UNREAD, "odd\x1b")] if row else [])))
    count_remarks(counts, "b.jsonl", (Remark(CONTEXT, "messages[].train"),))
    first, second = notices(counts)
    assert first.message == "a.jsonl: nothing reads id (3 rows), odd␛ (2 rows): left out"
    assert (first.topic, first.count) == ("columns", 5)
    assert "b.jsonl: answers are context and not trained, by their messages[].train (1 row)" in second.message


def test_switches_of_turns_are_said_in_other_words_where_every_token_is_trained() -> None:
    counts: Counts = {}
    count_remarks(counts, "a.jsonl", (Remark(CONTEXT, "messages[].train"), Remark(NOT_ANSWERS, "messages[].weight")))
    assert "only answers are" in list(notices(counts))[1].message
    (notice,) = notices(counts, "all")
    assert notice.message.endswith('messages[].train (1 row): data.loss_on = "all" trains them all the same')


def test_a_million_names_are_a_few_and_others() -> None:
    counts: Counts = {}
    for row in range(1000):
        count_remarks(counts, "a.jsonl", (Remark(UNREAD, f"{row:04}" + "x" * 1000),))
    names = counts["a.jsonl"][UNREAD]
    assert len(names) == MAX_NAMES + 1 and names[OTHERS] == 1000 - MAX_NAMES
    assert max(map(len, names)) < 100


def test_of_very_many_files_the_first_are_named() -> None:
    said = list(first_of(Notice("format", f"{number}.jsonl") for number in range(100_000)))
    assert len(said) == MAX_SAID + 1
    assert said[-1] == Notice("rows", "99,980 more like these are not listed", 99_980)
    assert list(first_of([])) == []


def test_a_report_of_a_stranger_names_few_keys() -> None:
    (notice,) = notices({"rows.jsonl": {UNREAD: {f"key{number}": 1 for number in range(100_000)}}})
    assert notice.message.count("key") <= MAX_NAMES + 1
