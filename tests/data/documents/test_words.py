"""How many words a text has."""

from __future__ import annotations

import pytest

from qlora.data.documents.words import count_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Open the valve, then wait.", 5),
        ("", 0),
        ("打开阀门，然后等待五分钟。", 8),  # twelve letters
        ("TX-200 泵的价格是 4990 欧元。", 7),  # eight letters, and two words
        ("ปั๊มน้ำ", 4),
    ],
)
def test_words_by_blanks_or_by_letters(text: str, words: int) -> None:
    assert abs(count_words(text) - words) <= (0 if text.isascii() else 1)
