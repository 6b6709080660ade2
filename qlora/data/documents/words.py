"""How many words a text has; where words are written without blanks, by its characters."""

from __future__ import annotations

import re

CHARACTERS_PER_WORD = 1.6  # of Chinese: mean length of a word in running text, of Thai and Japanese about the same
# Letters of scripts that part no words: Han, kana, Thai, Lao, Khmer, Burmese.
_UNPARTED = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1780-\u17ff\u1000-\u109f\U00020000-\U0002fa1f]"
)


def count_words(text: str) -> int:
    """Words of a text: what blanks part, and of scripts without blanks their characters / CHARACTERS_PER_WORD."""
    unparted = len(_UNPARTED.findall(text))
    if not unparted:
        return len(text.split())
    rest = len(re.findall(r"\w[^\s\u3000-\u303f\uff00-\uffef]*", _UNPARTED.sub(" ", text)))
    return rest + round(unparted / CHARACTERS_PER_WORD)
