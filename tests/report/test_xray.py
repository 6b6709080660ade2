"""The look at rows on a terminal and in a pipe."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from qlora.report.console import Terminal
from qlora.report.xray import lengths_view, readable, show, sources_view, study_view, tokens_view

SOURCE = {"rows": 3, "cut": 1, "dropped": 2, "rejected": 1, "tokens": 40, "trained": 10}
REASON = {"reason": "[bold]bad\x1b", "count": 1, "examples": ["a.jsonl:7"]}


def piece(text: str, trained: bool) -> dict[str, Any]:
    return {"text": text, "ids": [1], "trained": trained}


def row(*pieces: dict[str, Any], tokens: int = 0) -> dict[str, Any]:
    trained = sum(one["trained"] for one in pieces)
    return {"where": "a.jsonl:1", "source": 0, "tokens": tokens or len(pieces), "trained": trained, "pieces": pieces}


def drawn(width: int = 60, colour: bool = False, *parts: Any) -> str:
    file = io.StringIO()
    console = Terminal(file=file, width=width, force_terminal=colour, color_system="standard" if colour else None)
    for part in parts:
        console.print(part)
    return file.getvalue()


def test_what_is_trained_can_be_read_without_colour() -> None:
    rows = [row(piece("user\n", False), piece("Say[", False), piece("Yes", True), piece(".", True), piece("\n", False))]
    packs = [{"number": 1, "documents": 2, "tokens": 9, "rows": [*rows, row(piece("x", True), tokens=500)]}]
    text = drawn(60, False, tokens_view(packs, 16, coloured=False))
    assert "user↵\nSay[«Yes.»↵" in text and "«x» … 499 more tokens" in text
    assert "pack 1: 2 rows, 9 of 16 tokens" in text and "\x1b" not in text
    coloured = drawn(60, True, tokens_view(packs, 16, coloured=True))
    assert "\x1b[1;32mYes" in coloured and "\x1b[2muser" in coloured and "«" not in coloured


def test_wide_letters_and_long_words_stay_within_the_terminal() -> None:
    pieces = [piece("日本語" * 40, True), piece("x" * 200, False)]
    text = drawn(
        60, False, tokens_view([{"number": 1, "documents": 1, "tokens": 2, "rows": [row(*pieces)]}], 16, False)
    )
    widths = [Console(width=200).measure(line).maximum for line in text.splitlines()]
    assert max(widths) <= 60 and text.count("日") == 40


def test_controls_are_symbols() -> None:
    assert readable("a\x1b[31m\tb\r\n\u202e") == "a␛[31m\u2409\tb↵\n\\u202e"


def test_sources_of_one_name_are_told_apart() -> None:
    sources = [{**SOURCE, "path": f"/d/{name}/rows.jsonl", "side": "train", "reasons": [REASON]} for name in ("a", "b")]
    text = drawn(100, False, sources_view(sources))
    assert "a/rows.jsonl (train)" in text and "b/rows.jsonl (train)" in text and "[bold]bad" in text
    many = [{**sources[0], "tokens": 123_456_789, "trained": 12_345_678}]
    assert "123,456,789" in drawn(60, False, sources_view(many))


def test_the_limit_stands_among_the_lengths() -> None:
    bars = [
        {"least": 1, "most": 8, "rows": 5, "over": False},
        {"least": 9, "most": 16, "rows": 0, "over": False},
        {"least": 17, "most": None, "rows": 2, "over": True},
    ]
    lines = drawn(80, False, lengths_view(bars, 16)).splitlines()
    assert ["max_length" in line for line in lines] == [False, False, True, False]
    assert "max_length" in drawn(80, False, lengths_view(bars[:2], 16))


def test_all_of_it_is_shown() -> None:
    split = {
        "rows": 3,
        "tokens": 40,
        "trained": 10,
        "longest": 9,
        "longest_at": "a.jsonl:2",
        "ended": 3,
        "bos": (0, 3, 0),
    }
    split |= {"copies": {"count": 1}, "alike": {"count": 2}, "compared": 2, "all_compared": False}
    leaks = {kind: {"count": 1} for kind in ("rows", "questions", "answers", "inside")}
    seen = {
        "max_length": 16,
        "drawn": [],
        "sources": [],
        "lengths": [],
        "train": split,
        "eval": split,
        "leaks": leaks,
        "packing": {"on": True, "packs": 3, "share": 0.5},
        "serving": {"compared": 4, "differ": ["a.jsonl:3"]},
        "warnings": [{"level": "harm", "what": "[a]", "fix": "b", "count": 1, "examples": [("a:1", "a:2")]}],
    }
    file = io.StringIO()
    show(Terminal(file=file, width=100), seen)
    text = file.getvalue()
    for words in (
        "3 packs of 16 tokens, 50.0% full",
        "in 3 of 4 rows compared",
        "one in 3",
        "a:1 like a:2",
        "harm  [a]",
    ):
        assert words in text
    assert "1 the same as an earlier row, at least 2 nearly of the first 2" in text


def test_what_a_study_gave_is_shown_with_what_was_dropped() -> None:
    asked = {"question": "How [bold]heavy[/]?", "answer": "84 kg", "detail": ""}
    lost = {"reason": "form", "said": "not one line", "count": 7, "examples": [{**asked, "detail": "2 words"}]}
    figures = {"rows": 9, "questions": 6, "known": 1, "sentences": 8, "with_question": 6, "exam": 2, "left_out": 1}
    study = {"folder": "runs/x/study", **figures, "without": ["It is red."], "examples": [asked], "dropped": [lost]}
    text = " ".join(drawn(100, False, study_view(study)).split())
    assert "learnt How [bold]heavy[/]? → 84 kg" in text and "coverage: 75% of 8 sentences" in text
    assert "7 dropped: not one line How [bold]heavy[/]? → 84 kg (2 words)" in text and "about: It is red." in text
