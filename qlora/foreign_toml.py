"""TOML that a stranger wrote, bounded before it is parsed: a recipe, or one value of it on the command line.

The parser keeps every prefix of a dotted key (16,000 parts take 1 GiB), recurses with each bracket, and reads numbers
of any length. What could become large is therefore looked for first, in the text without its strings and comments.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from qlora import files
from qlora.foreign_json import depth_of

MAX_BYTES = 1_000_000  # a recipe with every key and a thousand sources has 0.1 MB
MAX_DEPTH = 16  # a recipe has 4: [[data.train]] and columns = {a = "b"}
MAX_WORD = 200  # characters of a bare key or number: the longest key has 22
MAX_NAMES = 500  # of files that are compared with a name
_SHOWN = 200  # characters of the parser's own words, which may quote a key

# Strings and comments as TOML delimits them; one that has no end takes the rest, where the parser fails too.
_QUOTED = re.compile(
    r'"""(?:\\.|[^\\])*?(?:"""|\\?\Z)' r"|'''.*?(?:'''|\Z)" r'|"(?:\\.|[^"\\\n])*"?' r"|'[^'\n]*'?" r"|#[^\n]*",
    re.DOTALL,
)
_LONG_KEY = re.compile(rf"(?:\.[ \t]*[\w-]+[ \t]*){{{MAX_DEPTH}}}")
_LONG_WORD = re.compile(rf"(?<!\w)\w{{{MAX_WORD + 1}}}")
_PLACE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$")


class ForeignTomlError(ValueError):
    """What is wrong with a text that should be TOML, and its line (None where it is the last one)."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def beside(path: Path) -> list[str]:
    """Names of the TOML files in the folder of a path that leads nowhere, the one most like it first; five at most."""
    names = sorted(near.name for near in path.parent.glob("*.toml"))[:MAX_NAMES]
    return difflib.get_close_matches(path.name[:MAX_WORD], names, 5, 0.0)


def read_text(path: Path) -> str:
    """The text of a file, with line ends as Python has them.

    Raises FileNotFoundError, and ForeignTomlError for what is no regular file of UTF-8 of at most MAX_BYTES.
    """
    try:
        mode = os.stat(path).st_mode  # by its own name: /dev/fd/63 is a pipe, but nothing is where that link leads
        regular = stat.S_ISREG(mode)
        text = files.read_bytes(Path(os.path.realpath(path)), MAX_BYTES).decode("utf-8-sig") if regular else ""
    except UnicodeDecodeError as error:
        raise ForeignTomlError(f"cannot be read: it is not UTF-8 text (byte {error.start:,})") from error
    except files.UnsafePathError as error:
        raise ForeignTomlError(
            f"cannot be read: more than {MAX_BYTES:,} bytes, or changed while it was read"
        ) from error
    except ValueError as error:
        raise ForeignTomlError("cannot be read: its name holds a NUL character") from error
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ForeignTomlError(f"cannot be read: {error.strerror or error}") from error
    if not regular:
        raise ForeignTomlError("is a folder" if stat.S_ISDIR(mode) else "is not a regular file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse(text: str) -> dict[str, Any]:
    """The table of a TOML text. Raises ForeignTomlError."""
    bare = _QUOTED.sub(lambda match: ("" if match[0][0] == "#" else "q") + "\n" * match[0].count("\n"), text)
    if found := _LONG_KEY.search(bare):
        raise ForeignTomlError(f"a key of more than {MAX_DEPTH} parts", _line(bare, found))
    if found := _LONG_WORD.search(bare):
        raise ForeignTomlError(f"a key or number of more than {MAX_WORD} characters", _line(bare, found))
    try:
        table = tomllib.loads(text)
    except RecursionError as error:
        raise ForeignTomlError(f"it is nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:  # TOMLDecodeError is one; the others are of numbers and dates
        message = str(error)
        place = _PLACE.search(message, max(0, len(message) - 80))
        reason = (message[: place.start()] if place else message)[:_SHOWN] or "it cannot be read"
        at = int(place[1]) if place and place[1] else None
        raise ForeignTomlError(f"{reason[0].lower()}{reason[1:]}", at) from error
    if depth_of(table, MAX_DEPTH) > MAX_DEPTH:
        raise ForeignTomlError(f"it is nested deeper than {MAX_DEPTH} levels")
    return table


def _line(text: str, found: re.Match[str]) -> int:
    return text.count("\n", 0, found.start()) + 1
