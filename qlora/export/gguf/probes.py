"""Awkward texts, by which two tokenizers are compared: what real text rarely has and tokenizers disagree about.

They stand in probe_texts.json: spaces of all kinds, numbers, code, scripts, emoji, control characters and what looks
like a special token. Where llama.cpp is known to differ from a tokenizer (`Limit`), `comparable` makes of them the
texts that must be tokenized equally all the same.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Sequence
from enum import Enum
from importlib.resources import files

_RESOURCE = files("qlora.export.gguf") / "probe_texts.json"
PROBE_TEXTS: tuple[str, ...] = tuple(json.loads(_RESOURCE.read_text(encoding="utf-8")))


class Limit(Enum):
    """What llama.cpp does differently with some texts, whatever the file holds."""

    COMPOSITION = "llama.cpp does not compose characters: a letter with a separate combining mark becomes other tokens"
    LETTER_CASE = (
        "llama.cpp knows only A to Z as capital and a to z as small letters here, and no combining marks: "
        "some words of other alphabets (Hindi, Arabic with vowel signs, mixed capitals) are split elsewhere"
    )
    LEADING_SPACE = "llama.cpp puts a space before text that begins with one already, the tokenizer does not"
    PLAIN_TEXT = (
        "llama.cpp puts no space before a text's beginning, the tokenizer does where it is no special token: "
        "conversations are tokenized alike, other texts begin differently"
    )
    OPENING = (
        "llama.cpp puts one token before a text at most, the tokenizer more: conversations, whose template writes them "
        "itself, are tokenized alike, other texts begin without them"
    )
    AFTER_SPECIAL = "llama.cpp puts a space after every special token, the tokenizer before the text's beginning only"
    SPACE_MARKS = "llama.cpp looks for runs of spaces where the tokenizer looks for runs of the sign \u2581"


def comparable(texts: Sequence[str], limits: Collection[Limit], specials: Collection[str]) -> list[str]:
    """The texts, changed or left out so that llama.cpp must give the tokenizer's ids under these limits.

    `specials` are the texts of all added tokens, BOS first; under PLAIN_TEXT every text gets that in front.
    """
    kept = list(texts)
    if Limit.COMPOSITION in limits:
        kept = [unicodedata.normalize("NFC", text) for text in kept]
    if Limit.LETTER_CASE in limits:
        kept = [text for text in kept if not any(_has_case(character) for character in text)]
    if Limit.LEADING_SPACE in limits or Limit.AFTER_SPECIAL in limits:
        kept = [text for text in kept if not any(special in text for special in specials)]
    if Limit.LEADING_SPACE in limits:
        kept = [text for text in kept if not text.startswith((" ", "▁"))]
    if Limit.SPACE_MARKS in limits:
        kept = [text for text in kept if "▁" not in text]
    if Limit.PLAIN_TEXT in limits:
        kept = [next(iter(specials)) + text for text in kept]
    return list(dict.fromkeys(kept))


def _has_case(character: str) -> bool:
    return ord(character) > 127 and unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me")
