"""The values of a row: strict JSON with bounds, and the error of a row that is none."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qlora.errors import one_line

MAX_REASON_CHARS = 600  # a row may have 300,000 columns, and a value millions of characters
MAX_DEPTH = 64  # of lists and objects in a row; schemas of tools have about ten
# Said of what the parser itself gives up on as well, which is another depth in each version of Python.
TOO_DEEP = f"values nested too deep to read (more than {MAX_DEPTH} levels)"

# What pandas writes into a CSV for a list of objects: Python's own notation, with single quotes.
_PYTHON_TEXT = re.compile(r"\s*\[?\s*\{\s*'")
_PYTHON_HINT = "that is Python's notation, not JSON: write the column with json.dumps, or the file as .jsonl"


class RowError(Exception):
    """A row that cannot be used. `reason` is half a sentence; whoever knows the row adds `file:line`.

    `hint`: the way out where the cause has one of its own. `file_hint`: the way out where most rows of the file fail
    like this one, so that the file is read in a wrong way; a single broken row is repaired.
    """

    def __init__(self, reason: str, hint: str = "", file_hint: str = "") -> None:
        self.reason = _shortened(reason)
        self.hint = _shortened(hint)
        self.file_hint = _shortened(file_hint)
        super().__init__(self.reason)


class RowTooLong(RowError):
    """A row that is larger than any that could be used; what becomes of it is a matter of `truncation`."""


def _shortened(text: str) -> str:
    text = one_line(text[: 4 * MAX_REASON_CHARS])
    return text if len(text) <= MAX_REASON_CHARS else f"{text[:MAX_REASON_CHARS]}…"


class UniqueKeys:
    """For json's `object_pairs_hook`: objects, and whether a key stands twice in one of them.

    Python keeps the last of two and says nothing of the first.
    """

    def __init__(self) -> None:
        self.twice: str | None = None

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs) and self.twice is None:
            self.twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return values

    def check(self) -> None:
        """Raise RowError for a key that stood twice since the last check."""
        twice, self.twice = self.twice, None
        if twice is not None:
            raise RowError(f"the key {twice[:40]!r} stands twice in one object, and only one of its values can be read")


def load_json(text: str) -> Any:
    """Strict JSON: no NaN or Infinity, no NUL, no half of a surrogate pair, no key twice. Raises RowError."""
    keys = UniqueKeys()
    try:
        value = json.loads(text, parse_constant=reject_constant, parse_float=finite_number, object_pairs_hook=keys)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise RowError(f"broken JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise RowError(TOO_DEEP) from None
    except ValueError as error:
        raise RowError(f"broken JSON: {number_error(error)}") from None
    keys.check()
    check_value(value, escapes="\\u" in text)
    return value


def check_value(value: Any, escapes: bool = True) -> None:
    """Raise RowError when `value` is nested too deep, or a string in it cannot be written as UTF-8 or holds a NUL.

    `escapes`: JSON text without any has such strings only where it is not UTF-8 itself, and is not searched for them.
    """
    level, depth = [value], 0
    while level:
        if depth == MAX_DEPTH and any(isinstance(item, dict | list) for item in level):
            raise RowError(TOO_DEEP)
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if escapes:
                    _check_text(item)
            elif isinstance(item, dict):
                deeper += item.values()
                if escapes:
                    deeper += item
            elif isinstance(item, list):
                deeper += item
        level, depth = deeper, depth + 1


def _check_text(text: str) -> None:
    if "\0" in text:
        raise RowError("a text holds a NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise RowError(f"a text holds half of a surrogate pair ({half})") from None


def reject_constant(constant: str) -> Any:
    """For json's `parse_constant`: NaN, Infinity and -Infinity raise ValueError."""
    raise ValueError(f"{constant} is no JSON value")


def finite_number(text: str) -> float:
    """For json's `parse_float`: 1e999, which Python takes for infinity, raises ValueError too."""
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def number_error(error: ValueError) -> str:
    """What a ValueError of json's parser says; of Python's own limit on digits, in our words."""
    return "a whole number has more than 4,300 digits" if "digits" in str(error) else str(error)


def json_text(value: Any, place: str) -> str:
    """A value as JSON. Raises RowError for what has no JSON: a Parquet file has more kinds of values."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_no_json)
    except ValueError as error:
        reason = "a number that is not finite" if "float" in str(error) else "a number of more than 4,300 digits"
        raise RowError(f"{place} holds {reason}") from None
    except TypeError as error:
        raise RowError(f"{place} holds {error}, which is no JSON value") from None


def _no_json(value: Any) -> Any:
    raise TypeError(kind_of(value))


def kind_of(value: Any) -> str:
    """What a JSON value is, in words that fit after "is"."""
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return "true or false"
    kinds = ((str, "text"), (int | float, "a number"), (Mapping, "an object"), (list | tuple, "a list"))
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a {value}")


def parsed(value: Any, place: str) -> Any:
    """JSON text (as in CSV cells and in ShareGPT) parsed, anything else as it is; blank text is null. Raises RowError.

    Text in the text is parsed once more: some exports encode twice.
    """
    for _ in range(2):
        if not isinstance(value, str):
            break
        if not value.strip():
            return None
        try:
            value = load_json(value.strip())
        except RowError as error:
            hint = _PYTHON_HINT if _PYTHON_TEXT.match(value) else ""
            raise RowError(f"{place} is text that is not JSON: {error.reason}", file_hint=hint) from None
    return value


def object_of(value: Any) -> Mapping[str, Any] | None:
    """An object, or the one that a JSON text holds; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = load_json(value.strip())
        except RowError:
            return None
    return value if isinstance(value, Mapping) else None


def list_of(value: Any, place: str) -> list[Any]:
    """The items of a list. Raises RowError."""
    if not isinstance(value, list | tuple):
        hint = "write it as a list in every row, or name the column that is: columns = { … }"
        raise RowError(f"{place} is {kind_of(value)}, not a list", file_hint=hint)
    return list(value)


def text_of(value: Any, place: str) -> str:
    """A text as it stands. Raises RowError."""
    if not isinstance(value, str):
        hint = "write it as text in every row, or name the column that is: columns = { … }"
        raise RowError(f"{place} is {kind_of(value)}, not text", file_hint=hint)
    return value


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: null, an empty list or object, a text of blanks."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | tuple | Mapping) and not value)
