"""A regular expression of a file, matched without backtracking (qlora/README.md, strangers' files are data).

Python's own engine can be kept busy for years by twenty characters. Rust's, which comes with pydantic, takes time
linear in the text; what it cannot do so, look-around and references, is refused.
"""

from __future__ import annotations

import re

from pydantic_core import SchemaError, SchemaValidator, core_schema

_REPEATED = re.compile(r"\{(\d+)(?:,(\d*))?\}")
MOST_COST = 20_000_000


class UnsafePatternError(ValueError):
    """A pattern that cannot be matched in linear time, or is none. The text says why."""


def engine(pattern: str) -> SchemaValidator:
    """What says of a text whether the pattern is found in it, by `isinstance_python`. Raises UnsafePatternError."""
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
    except SchemaError as error:
        reason = " ".join(str(error).split()).rpartition("rror: ")[2] or "it is too large"
        raise UnsafePatternError(reason[:100]) from error


def cost(pattern: str) -> int:
    """The pattern's length, times what its counted repetitions could multiply it by, up to MOST_COST + 1. Measured for
    the worst patterns found: 0.1 µs for each unit and text."""
    total = len(pattern)
    for least, most in _REPEATED.findall(pattern):
        total = min(total * max(1, int(least[:9]), int(most[:9] or 0)), MOST_COST + 1)
    return total
