"""What steers a terminal or hides in a line becomes visible, and can be encoded; all other text stays."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from qlora import shown

STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_nothing_that_steers_is_left_of_all_that_unicode_has() -> None:
    every = [chr(code) for code in range(sys.maxunicode + 1)]
    left = {letter for letter in map(shown.one_line, every) if unicodedata.category(letter[0]) in STEERING}
    assert left == {"\u200c", "\u200d"}
    for letter in every:
        if unicodedata.category(letter) not in STEERING:
            assert shown.one_line(letter) == letter
    "".join(map(shown.one_line, every)).encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b]0;owned\x07", "␛]0;owned␇"),
        ("a\nb\tc\rd\x7f", "a␊b␉c␍d␡"),
        ("\x9b31m", "\\x9b31m"),
        ("abc\u202efdp.exe", "abc\\u202efdp.exe"),
        ("\udcff\ud800", "\\xff\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("می\u200cخواهم 👩\u200d🔬 ␀ é", "می\u200cخواهم 👩\u200d🔬 ␀ é"),
    ],
)
def test_one_line(text: str, expected: str) -> None:
    assert shown.one_line(text) == expected


def test_a_block_keeps_its_lines() -> None:
    assert shown.block("a\r\n\tb\rc\x1b\u2028d") == "a\n\tb␍c␛\\u2028d"


def test_values_of_plain_types() -> None:
    value = {"k\x1b": ["a\n", ("b\x07", 1, None)]}
    assert shown.plain_values(value) == {"k␛": ["a␊", ("b␇", 1, None)]}
    assert shown.plain_values(value, blocks=True) == {"k␛": ["a\n", ("b␇", 1, None)]}
