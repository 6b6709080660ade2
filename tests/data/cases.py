"""Rows in files and all rows of a source, good ones and broken ones; a split of rows without any text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora.data.chat import TokenRow
from qlora.data.sources import SourceRow, read_rows
from qlora.data.token_cache import PreparedSplit
from qlora.recipe.sections import DataSection, SourceSection

ROWS = [{"text": "a"}, {"text": "b", "extra": {"k": [1, None]}}, {"text": "ç 🌧"}]


def read(path: Path | str, **keys: Any) -> list[SourceRow]:
    """All rows; a bad one fails the test."""
    rows = list(read_rows(SourceSection(path=str(path), **keys)))
    assert all(isinstance(row.row, dict) for row in rows), rows
    return rows


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def split_of(lengths: list[int], sources: list[int] | None = None) -> PreparedSplit:
    """Rows of these lengths, trained from their second token on; row 3 is of the tokens 300, 301, …"""
    rows = [TokenRow([100 * row + at for at in range(n)], [0.0] + [1.0] * (n - 1)) for row, n in enumerate(lengths)]
    wheres = [f"a.jsonl:{row + 1}" for row in range(len(rows))]
    return PreparedSplit(rows, lengths, [max(n - 1, 0) for n in lengths], wheres, sources or [0] * len(rows))


def data_of(packing: bool = True, max_length: int = 16, weights: tuple[float, ...] = (1.0,)) -> DataSection:
    train = tuple(SourceSection(path="a.jsonl", weight=weight) for weight in weights)
    return DataSection(train=train, packing=packing, max_length=max_length)


GOOD = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}]}
GOOD_LINE = json.dumps(GOOD)


def of(*messages: Any, **columns: Any) -> str:
    """A line of a .jsonl file with these messages."""
    return json.dumps({"messages": list(messages), **columns})


def says(content: Any, **keys: Any) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": content, **keys}


USER = {"role": "user", "content": "x"}

# (name, line that stands between two good ones of a .jsonl, part of the reason)
BROKEN_LINES: list[tuple[str, str | bytes, str]] = [
    ("cut off", '{"messages": [{"role": "us', "Unterminated string"),
    ("single quotes", "{'messages': []}", "property name"),
    ("trailing comma", '{"messages": [],}', "broken JSON"),
    ("two objects", GOOD_LINE + GOOD_LINE, "Extra data"),
    ("plain words", "hello", "broken JSON"),
    ("a comment", "// " + GOOD_LINE, "broken JSON"),
    ("an array", "[1, 2]", "not a JSON object but a list"),
    ("a number", "12", "not a JSON object but a number"),
    ("null", "null", "not a JSON object but null"),
    ("a string", '"x"', "not a JSON object but text"),
    ("NaN", '{"text": "x", "score": NaN}', "NaN"),
    ("infinity", '{"text": "x", "score": -Infinity}', "Infinity"),
    ("endless number", '{"n": ' + "9" * 5000 + "}", "broken JSON"),
    ("raw NUL", GOOD_LINE.replace("What", "Wh\0at"), "control character"),
    ("escaped NUL", of(says("a\0b")), "NUL"),
    ("lone surrogate", '{"messages": [{"role": "assistant", "content": "\\ud83d"}]}', "surrogate"),
    ("surrogate in a key", '{"\\udc00": 1}', "surrogate"),
    ("not UTF-8", b'{"text": "caf\xe9"}', "not UTF-8 text at byte 14"),
    ("deep nesting", "[" * 100_000 + "]" * 100_000, "nested too deep"),
    ("deep objects", '{"a":' * 5_000 + "1" + "}" * 5_000, "nested too deep"),
    ("empty object", "{}", "messages needs the column messages"),
    ("missing key", '{"prompt": "x"}', "messages needs the column messages; this row has: prompt"),
    ("messages null", '{"messages": null}', "messages needs the column messages"),
    ("no messages", of(), "empty list"),
    ("messages a number", '{"messages": 3}', "messages is a number, not a list"),
    ("messages an object", '{"messages": {"role": "user"}}', "messages is an object, not a list"),
    ("messages words", '{"messages": "hello"}', "not JSON"),
    ("nested list", of([USER]), "messages[0] is a list"),
    ("message is text", of("hi", says("x")), "messages[0] is text"),
    ("wrong role", of({"role": "robot", "content": "x"}), "'robot'"),
    ("role a number", of({"role": 1, "content": "x"}), "messages[0].role is 1"),
    ("role a list", of({"role": ["user"], "content": "x"}), "messages[0].role is"),
    ("no role", of({"content": "x"}), "messages[0] has no role"),
    ("no content", of({"role": "user"}, says("x")), "messages[0].content is missing"),
    ("content a number", of({"role": "user", "content": 5}), "messages[0].content is a number"),
    ("content an object", of(says({"text": "x"})), "messages[0].content is an object"),
    ("content true", of(says(True)), "messages[0].content is true or false"),
    ("empty assistant", of(USER, says("")), "messages[1]: the assistant says nothing"),
    ("blank assistant", of(USER, says(" \n\t")), "messages[1]: the assistant says nothing"),
    ("assistant null", of(USER, says(None)), "messages[1].content is missing"),
    ("picture", of({"role": "user", "content": [{"type": "image_url"}]}), "only text"),
    ("calls a number", of(says("x", tool_calls=5)), "tool_calls is a number"),
    ("call without name", of(says("x", tool_calls=[{"arguments": {}}])), "not a tool call"),
    ("call with broken arguments", of(says("", tool_calls=[{"name": "f", "arguments": "{"}])), "not JSON"),
    ("tools words", of(USER, says("x"), tools="search"), "tools is text that is not JSON"),
    ("tools without names", of(USER, says("x"), tools=[{}]), "tools[0] is not a tool"),
    ("weight 0.5", of(USER, says("x", weight=0.5)), "weight is 0.5"),
    ("nobody answers", of(USER), "no token of it would be trained"),
    ("nobody trained", of(USER, says("x", train=False)), "no token of it would be trained"),
    ("mixed types", of(USER, 3, None, says("x")), "messages[1] is a number"),
    ("parts of mixed types", of({"role": "user", "content": ["a", 1]}, says("x")), "only text"),
    ("weight a text", of(USER, says("x", weight="1")), "weight is '1'"),
    ("train a number", of(USER, says("x", train=2)), "train is 2"),
    ("a key twice", '{"messages": [], "messages": []}', "the key 'messages' stands twice in one object"),
    (
        "a key twice below",
        of(USER, says("x")).replace('"role": "user"', '"role": "user", "role": "user"'),
        "'role' stands",
    ),
    ("a NUL in a key", '{"a\\u0000b": 1, "messages": []}', "NUL"),
    ("reasoning a list", of(USER, says("x", reasoning_content=[])), "reasoning_content is a list"),
    ("a BOM in the middle", "\ufeff" + GOOD_LINE, "broken JSON"),
    ("a line break in a role", of({"role": "a\nb", "content": "x"}), "role is 'a"),
    ("end token inside", of(USER, says("x<|im_end|>\n<|im_start|>user")), "<|im_end|>"),
]


def split_trained(*rows: tuple[int, int]) -> PreparedSplit:
    """Of (tokens, trained ones at the end)."""
    made = [TokenRow(list(range(n)), [0.0] * (n - trained) + [1.0] * trained) for n, trained in rows]
    wheres = [f"a.jsonl:{i + 1}" for i in range(len(rows))]
    return PreparedSplit(made, [n for n, _ in rows], [trained for _, trained in rows], wheres, [0] * len(rows))
