"""Strict JSON of rows: bounds on depth, numbers and reasons, and what a text may hold."""

from __future__ import annotations

import json

import pytest

from qlora.data.row_json import MAX_DEPTH, MAX_REASON_CHARS, RowError, check_value, json_text, kind_of, load_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": -1e999}', "the number -1e999 is too large"),
        ('{"a": ' + "9" * 10_000 + "}", "a whole number has more than 4,300 digits"),
        ("[" * 65 + "]" * 65, "more than 64 levels"),
        ('{"a":' * 65 + "1" + "}" * 65, "more than 64 levels"),
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ('["\\u0000"]', "NUL"),
        ('{"a": [{"\\udc00": 1}]}', r"half of a surrogate pair \(\\udc00\)"),
    ],
)
def test_what_is_out_of_bounds_is_named(text: str, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        load_json(text)


def test_what_is_within_bounds_is_read_to_the_letter() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(load_json(deep)) == deep
    assert load_json('{"n": ' + "9" * 4_000 + "}")["n"] == 10**4000 - 1
    assert load_json('["\\ud83d\\ude00", 1e308, 0.5, "\\u00e9"]') == ["😀", 1e308, 0.5, "é"]


def test_text_is_searched_in_keys_and_at_any_depth() -> None:
    values: list[object] = [{"a\0": 1}, [["a\0"]], {"a": {"b": ["\ud800"]}}]
    for value in values:
        with pytest.raises(RowError):
            check_value(value)


def test_a_reason_is_one_line_of_bounded_length() -> None:
    assert len(RowError("x" * 10_000_000).reason) == MAX_REASON_CHARS + 1
    assert RowError("a\nb").reason == "a b"


class Strange:
    def __str__(self) -> str:
        return "stranger"


def test_what_has_no_json_is_named_with_its_kind() -> None:
    assert json_text({"a": ["é", 1.5]}, "here") == '{"a": ["é", 1.5]}'
    strange: list[tuple[object, str]] = [
        ([Strange()], "here holds a stranger, which is no JSON value"),
        ({"a": float("inf")}, "here holds a number that is not finite"),
        ([10**5000], "here holds a number of more than 4,300 digits"),
    ]
    for value, what in strange:
        with pytest.raises(RowError, match=what):
            json_text(value, "here")
    each: list[object] = [None, True, 1, "", [], {}]
    assert [kind_of(value) for value in each] == [
        *("missing", "true or false", "a number", "text", "a list", "an object")
    ]
