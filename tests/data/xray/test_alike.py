"""Rows that are nearly the same are found, others are not, whatever they share of their frame."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from qlora.data.xray import alike
from tests.data.xray.cases import pair, prepared, section, write


def texts(count: int, words: int = 60) -> list[str]:
    """Of words that nobody has written before."""
    draws = numpy.random.default_rng(3)
    return [" ".join(f"{letters:x}" for letters in draws.integers(1 << 12, 1 << 24, words)) for _ in range(count)]


def found(folder: Path, rows: list[dict[str, object]]) -> alike.Alike:
    return alike.find(prepared(folder, section([write(folder / "a.jsonl", rows)])).train, [])


def test_planted_rows_are_found_and_no_others(tmp_path: Path) -> None:
    """10 of 100 rows are earlier ones with one word more; all share a system prompt that is longer than they are, and
    says something new in each sentence."""
    system = {"role": "system", "content": " ".join(f"Lamp {n} costs {n * 37} euros." for n in range(100, 170))}
    own = texts(90, 14)
    changed = [text.replace(" ", " indeed ", 1) for text in own[::9]]
    rows = [{"messages": [system, *pair("Say it.", text)["messages"]]} for text in (*own, *changed)]
    result = found(tmp_path, rows)
    assert result.whole and result.compared == 100
    assert {later for later, _ in result.pairs} == set(range(90, 100))
    assert dict(result.pairs) == {90 + at: 9 * at for at in range(10)}


def test_an_answer_in_one_frame_is_not_alike(tmp_path: Path) -> None:
    rows = [
        pair(f"What is the price of lamp number {n * 37 % 1000}?", f"It costs {n * 91 % 977} euros.") for n in range(80)
    ]
    assert found(tmp_path, rows).pairs == ()


def test_what_was_not_compared_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "MAX_PAIRS", 3)
    words = texts(1)[0].split()
    rows = [pair("Say it.", " ".join([*words[:at], "other", *words[at:]])) for at in range(0, 60, 4)]
    result = found(tmp_path, rows)
    assert not result.whole and 1 <= len(result.pairs) <= 3


def test_rows_that_are_all_alike_are_found(tmp_path: Path) -> None:
    words = texts(1)[0].split()
    rows = [pair("Say it.", " ".join([*words[:at], "other", *words[at:]])) for at in range(0, 60, 4)]
    assert len(found(tmp_path, rows).pairs) == len(rows) - 1


def test_one_row_has_no_like(tmp_path: Path) -> None:
    assert found(tmp_path, [pair("a", "b")]) == alike.Alike((), 1, True)
