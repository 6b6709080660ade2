"""What a path of Windows became in a recipe or on another system, and how it is written there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qlora.wsl import is_wsl

# TOML's double quotes read these as one letter each (toml.io/en/v1.0.0#string): C:\temp is no path then.
_ESCAPES = {"\t": "t", "\n": "n", "\r": "r", "\b": "b", "\f": "f", "\x1b": "e"}
_DRIVE = re.compile(r"(?:^|(?<=[/\\]))[A-Za-z]:(?=[\\\t\n\r\b\f\x1b])")
_IN_QUOTES = re.compile(r'"([^"]*\\[^"]*)"')


def in_single_quotes(line: str) -> str:
    """What to do about a line of TOML that is wrong for its backslashes; "" where it has none in double quotes."""
    found = _IN_QUOTES.search(line)
    return f"in double quotes a backslash begins an escape; write '{found[1]}'" if found else ""


def how_to_write(path: Path) -> str:
    """What to do about a path that is not there: whether it is one of Windows, and how it is to be written; else ""."""
    text = str(path)
    found = _DRIVE.search(text)
    meant = text[found.start() :] if found else path.name
    if any(letter in meant for letter in _ESCAPES):
        plain = "".join(f"\\{_ESCAPES[letter]}" if letter in _ESCAPES else letter for letter in meant)
        return f"in double quotes a backslash begins an escape; write '{plain}'"
    if found and os.name == "posix":
        seen = f"/mnt/{meant[0].lower()}/{meant[3:]}".replace("\\", "/")
        return f"it is a path of Windows; {f'WSL has it as {seen}' if is_wsl() else 'write it as this system has it'}"
    return ""
