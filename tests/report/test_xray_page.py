"""The look at rows as a page: judged by a parser, and by a browser where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora.report.xray_page import page_of
from tests.report.pages import ATTACKS, browser, judged, opened


def seen_of(text: str) -> dict[str, Any]:
    """A look in which every string is a stranger's."""
    piece = {"text": text, "ids": [1, 2], "trained": True}
    row = {"where": text, "source": 0, "tokens": 90, "trained": 1, "pieces": [piece, {**piece, "trained": False}]}
    found = {"count": 1, "examples": [(text, text)]}
    split = {"rows": 3, "tokens": 40, "trained": 10, "longest": 9, "longest_at": text, "ended": 3, "bos": None}
    split |= {"copies": found, "alike": found, "compared": 3, "all_compared": True}
    reason = {"reason": text, "count": 1, "examples": [text]}
    source = {"path": f"/home/me/{text}", "side": "train", "reasons": [reason]}
    source |= dict.fromkeys(("rows", "cut", "dropped", "rejected", "tokens", "trained"), 1234)
    bars = [
        {"least": 1, "most": 8, "rows": 5, "over": False},
        {"least": 9, "most": None, "rows": 2, "over": True},
    ]
    rows = {
        "max_length": 16,
        "lengths": bars,
        "sources": [source],
        "train": split,
        "eval": split,
        "leaks": dict.fromkeys(("rows", "questions", "answers", "inside"), found),
        "packing": {"on": True, "packs": 3, "share": 0.5},
        "serving": {"compared": 4, "differ": []},
        "drawn": [{"number": 1, "documents": 2, "tokens": 9, "rows": [row]}],
        "warnings": [{"level": level, "what": text, "fix": text, **found} for level in ("wrong", "harm", "note")],
    }
    hours = {"study": (1, 2), "exam": (1, 2), "training": (1, 2), "where": text, "limited": True}
    memory = {"peak_bytes": 1, "limit_bytes": 2, "fits": True, "phases": {"study": 1}, "limit_source": text}
    file = {"path": text, "pages": 1, "language": text, "passages": 2, "left_out": [text]}
    papers = {
        "files": [file],
        "pages": 1,
        "passages": 2,
        "sentences": 3,
        "questions": 4,
        "left_out": [text],
        "takes": text,
        "ahead": {"hours": hours, "memory": memory},
    }
    asked = {"question": text, "answer": text, "detail": text}
    lost = {"reason": text, "said": text, "count": 2, "examples": [asked]}
    study = {"folder": text, "rows": 3, "questions": 2, "known": 1, "sentences": 4, "with_question": 3, "exam": 2}
    study |= {"left_out": 1, "without": [text], "examples": [asked], "dropped": [lost]}
    return {"recipe": text, "base": f"/home/me/{text}", "rows": rows, "documents": papers, "study": study}


@pytest.mark.parametrize("attack", [*ATTACKS, "plain"], ids=map(str, range(7)))
def test_a_strangers_strings_are_text_everywhere(attack: str) -> None:
    made = page_of(seen_of(attack))
    plain = judged(page_of(seen_of("plain")))
    assert judged(made).tags == plain.tags
    assert "/home/me" not in made


def test_nothing_to_mend_is_said() -> None:
    seen = seen_of("a")
    fine = {**seen, "rows": {**seen["rows"], "warnings": []}, "documents": None, "study": None}
    assert "Nothing." in judged(page_of(fine)).text


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="there is no Chromium here")
def test_a_browser_draws_it_and_complains_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(page_of(seen_of(ATTACKS[1])))
    assert "CONSOLE" not in opened(tmp_path / "a.html", tmp_path, width=400)
