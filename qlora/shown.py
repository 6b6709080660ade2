"""Text that somebody else wrote, as it may be shown: what steers a terminal or hides in a line becomes visible.

A terminal takes control characters for orders (set the title, clear the screen, fill the clipboard), a page takes the
marks of bidirectional text for an order of words that is not there. Each becomes a symbol; all other text stays. What
is shown can always be encoded: bytes of a file's name that are no UTF-8 (Python's lone surrogates) become `\\xff`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

# Persian, Hindi and many emoji are spelled with these two, which steer nothing.
_JOINERS = "\u200c\u200d"
# Controls, formats (bidirectional marks, zero widths), surrogates, line and paragraph separators.
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")


def one_line(text: str) -> str:
    """The text with every control character as a symbol, line breaks and tabs included."""
    return text if _is_plain(text) else "".join(map(_symbol, text))


def block(text: str) -> str:
    """The same for text of several lines: its line feeds and tabs stay, and a CR LF is one line feed."""
    if _is_plain(text):
        return text
    return "".join(letter if letter in "\n\t" else _symbol(letter) for letter in text.replace("\r\n", "\n"))


def plain_values(value: Any, blocks: bool = False) -> Any:
    """A value of plain types with every text in it, keys too, on one line; with `blocks` on as many as it has."""
    if isinstance(value, str):
        return block(value) if blocks else one_line(value)
    if isinstance(value, tuple | list):
        return type(value)(plain_values(item, blocks) for item in value)
    if isinstance(value, Mapping):
        return {plain_values(key): plain_values(item, blocks) for key, item in value.items()}
    return value


def _is_plain(text: str) -> bool:
    # Far faster than a look at each letter, and never wrong: what steers is not printable.
    return text.isprintable()


def _symbol(letter: str) -> str:
    code = ord(letter)
    if letter in _JOINERS or unicodedata.category(letter) not in _STEERING:
        return letter
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's own pictures of them: ␀ … ␟
    if code == 0x7F:
        return "\u2421"
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
