"""Warnings: the worst first, each with its fix, and none where all is well."""

from __future__ import annotations

from pathlib import Path

from qlora.data.xray.warnings import NOTE, WASTE, WRONG, warnings_of
from tests.data.xray.cases import pair, section, seen, sentence, write


def test_the_worst_comes_first(tmp_path: Path) -> None:
    rows = [pair(f"Question {n}?", f"Answer {n} is {sentence(n, 5 + n % 7)}.") for n in range(60)]
    bad = [
        *rows,
        rows[0],
        pair("Question 1?", "Otherwise."),
        "broken",
        *[pair("Long?", sentence(n, 300)) for n in range(20)],
    ]
    paths = [write(tmp_path / "t.jsonl", bad)], [write(tmp_path / "e.jsonl", [rows[5], pair("Other?", "Answer 9.")])]
    found = warnings_of(seen(tmp_path, section(*paths, max_length=128, max_bad_rows=3)))
    said = [(one.level, one.count) for one in found]
    assert [level for level, _ in said] == sorted((level for level, _ in said), key=(WRONG, WASTE, NOTE).index)
    assert said[0] == (WRONG, 20) and "data.max_length = 128" in found[0].what
    assert "1 of 2 evaluation rows stand in training rows" in found[1].what
    assert any(
        one.level == WASTE and "left out: they are" in one.what and one.examples == (("t.jsonl:63",),) for one in found
    )
    assert any("2 rows answer a question that other rows answer otherwise" in one.what for one in found)
    assert all(one.fix and "--" not in one.fix for one in found)


def test_nothing_to_warn_of(tmp_path: Path) -> None:
    rows = [pair(f"Question {n}?", f"Answer {n} is {sentence(n, 5 + n % 7)}.") for n in range(80)]
    asked = [pair(f"Asked {n}?", f"Said {n} by {sentence(n + 40, 4)}.") for n in range(5)]
    paths = [write(tmp_path / "t.jsonl", rows)], [write(tmp_path / "e.jsonl", asked)]
    assert warnings_of(seen(tmp_path, section(*paths, max_length=256))) == []


def test_cut_rows_are_said_once(tmp_path: Path) -> None:
    """A cut row has no end token because it was cut: one thing, one warning."""
    rows = [pair(f"Question {n}?", sentence(n, 200)) for n in range(4)]
    found = warnings_of(seen(tmp_path, section([write(tmp_path / "t.jsonl", rows)], max_length=64, truncation="cut")))
    assert [one.what for one in found if one.level == WRONG] == [
        "4 rows are cut to their first 64 tokens: their ends are not learnt"
    ]


def test_special_tokens_in_the_rows_are_worse_in_answers(tmp_path: Path) -> None:
    rows = [pair(f"Question {n}?", f"Answer {n} is {sentence(n, 5 + n % 7)}.") for n in range(80)]
    rows += [pair("What is <|im_start|>?", "It begins a turn."), pair("And <|im_end|>?", "<|im_start|> begins one.")]
    found = warnings_of(seen(tmp_path, section([write(tmp_path / "t.jsonl", rows)], max_length=256)))
    said = [(one.level, one.count, one.examples) for one in found if "special tokens" in one.what]
    assert said == [
        (WASTE, 1, (("t.jsonl: <|im_start|>",),)),
        (NOTE, 2, (("t.jsonl: <|im_end|>",), ("t.jsonl: <|im_start|>",))),
    ]
