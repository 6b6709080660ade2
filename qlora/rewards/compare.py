"""When an answer is the one that was wanted: in training by grpo, in evaluations and in tables of them."""

from __future__ import annotations

import re
import unicodedata

_THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)


def same_answer(given: str, expected: str) -> bool:
    """Equal after NFC, strip and casefold; a leading block of reasoning is not part of an answer."""
    return _normal(given) == _normal(expected)


def without_thoughts(text: str) -> str:
    """An answer without a leading block of reasoning."""
    return _THINKING.sub("", text)


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", without_thoughts(text)).strip().casefold()
